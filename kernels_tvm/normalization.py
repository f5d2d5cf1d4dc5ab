"""LayerNorm of one row, as the first step of what reads it, or by itself."""

import operator

from tvm.script.ir_builder import tirx as T

from kernels_tvm.descriptions import LANES, LayerNorm
from kernels_tvm.emit import Arguments, accumulate, for_each_row, kernel, lanes, splat
from kernels_tvm.targets import Target


def layer_norm_row(load, channels: int, scale, bias, epsilon: float, write) -> None:
    """``write(column, vector)`` the normalized row; ``load(column)`` is a vector of it. Whole vectors only.

    The variance is the mean square less the squared mean, and at least 0, as in Flax.
    """

    def vector(number):
        return T.bind(load(number * LANES))

    def squared(number):
        value = vector(number)
        return value * value

    mean, mean_square = (
        T.bind(accumulate(channels // LANES, terms, operator.add) * T.float32(1 / channels))
        for terms in (vector, squared)
    )
    variance = T.max(mean_square - mean * mean, T.float32(0))
    inverse = T.bind(T.float32(1) / T.sqrt(variance + T.float32(epsilon)))
    with T.serial(0, channels // LANES) as vector:
        at = lanes(vector * LANES)
        value = (load(vector * LANES) - splat(mean)) * (splat(inverse) * scale[at]) + bias[at]
        write(vector * LANES, value)


def load_normalized(x, image, token, channels: int, buffers: dict, epsilon: float, buffer, offset) -> None:
    """Write a token's row of ``x`` to scratch memory, normalized by the kernel's own LayerNorm."""
    layer_norm_row(
        lambda column: x[image, token, lanes(column)],
        channels,
        buffers["norm_scale"],
        buffers["norm_bias"],
        epsilon,
        lambda column, value: T.buffer_store(buffer, value, [lanes(offset + column)]),
    )


def layer_norm_kernel(target: Target, threads: int, norm: LayerNorm):
    """From x [rows, channels] and the parameters to y, like x."""

    def body(arguments: Arguments):
        x = arguments("x", ("rows", norm.channels), "float32")
        scale, bias = (arguments(name, shape, dtype) for name, shape, dtype in norm.arguments())
        y = arguments("y", ("rows", norm.channels), "float32")

        def normalize(row):
            layer_norm_row(
                lambda column: x[row, lanes(column)],
                norm.channels,
                scale,
                bias,
                norm.epsilon,
                lambda column, value: T.buffer_store(y, value, [row, lanes(column)]),
            )

        for_each_row(target, arguments.symbols["rows"], 4 * norm.channels, threads, normalize)

    return kernel(body)
