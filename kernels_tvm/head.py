"""The head of a classifier: the mean of an image's tokens, through a linear layer."""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.descriptions import LANES, Head
from kernels_tvm.emit import Arguments, constant, for_each_vector, kernel, lanes, load_lanes, local
from kernels_tvm.matshift import multiply_rows
from kernels_tvm.targets import Target


def head_kernel(target: Target, threads: int, head: Head):
    """From x [images, tokens, inputs] and the parameters to y [images, outputs], all float32."""
    linear = head.projection

    def body(arguments: Arguments):
        x = arguments("x", ("images", head.tokens, linear.inputs), "float32")
        buffers = arguments.parameters(head)
        y = arguments("y", ("images", linear.outputs), "float32")

        def load_mean(image, buffer, offset):
            def average(column, count):
                total = local(LANES)
                T.buffer_store(total, constant(0), [lanes(0)])
                with T.serial(0, head.tokens) as token:
                    value = load_lanes(x, [image, token], column, count)
                    T.buffer_store(total, total[lanes(0)] + value, [lanes(0)])
                mean = total[lanes(0)] * constant(1 / head.tokens)
                T.buffer_store(buffer, mean, [lanes(offset + column)])

            for_each_vector(linear.inputs, average)

        multiply_rows(target, threads, linear, buffers, arguments.symbols["images"], load_mean, y)

    return kernel(body)
