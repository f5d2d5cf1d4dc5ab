"""The head of a classifier: linear(mean of the tokens of norm(x))."""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.emit import constant, lanes
from kernels_tvm.cpu.linear import multiply_rows
from kernels_tvm.cpu.normalization import layer_norm_rows
from kernels_tvm.cpu.targets import Target
from kernels_tvm.cpu.tiles import rows_together
from kernels_tvm.descriptions import LANES, HeadDescription
from kernels_tvm.emit import Arguments, kernel, part


def head_kernel(target: Target, threads: int, head: HeadDescription):
    """From x [images, tokens, channels] and the parameters to y [images, outputs], all float32."""
    linear, together = head.projection, rows_together(head.tokens)
    channels = linear.inputs

    def body(arguments: Arguments):
        x = arguments("x", ("images", head.tokens, channels), "float32")
        buffers = arguments.parameters(head)
        y = arguments("y", ("images", linear.outputs), "float32")

        def load_mean(image, buffer, offset):
            def update(column, function):
                at = lanes(offset + column)
                T.buffer_store(buffer, function(buffer[at]), [at])

            with T.serial(0, channels // LANES) as vector:
                T.buffer_store(buffer, constant(0), [lanes(offset + vector * LANES)])
            with T.serial(0, head.tokens // together) as group:
                layer_norm_rows(
                    together,
                    lambda row, column: x[image, group * together + row, lanes(column)],
                    channels,
                    buffers["norm_scale"],
                    buffers["norm_bias"],
                    head.epsilon,
                    lambda row, column, value: update(column, lambda total: total + value),
                )
            with T.serial(0, channels // LANES) as vector:
                update(vector * LANES, lambda total: total * constant(1 / head.tokens))

        parameters = part(buffers, "projection_")
        multiply_rows(target, threads, linear, parameters, arguments.symbols["images"], load_mean, y)

    return kernel(body)
