"""LayerNorm of rows, while they are loaded."""

import operator

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.emit import accumulate_rows, constant, element, lanes, row_lanes, splat
from kernels_tvm.descriptions import LANES


def layer_norm_rows(rows: int, load, channels: int, scale, bias, epsilon: float, write) -> None:
    """Emit the LayerNorm of ``rows`` rows, each of whole vectors.

    ``load(row, column)`` is a vector of a row, and ``write(row, column, vector)`` takes the normalized one.
    The variance is the mean square minus the squared mean, and at least 0, as in Flax.
    """

    def vector(row, number):
        return T.bind(load(row, number * LANES))

    def squared(row, number):
        value = vector(row, number)
        return value * value

    def each(value):
        return constant(value, row_lanes(rows))

    mean, mean_square = (
        T.bind(accumulate_rows(rows, channels // LANES, terms, operator.add) * each(1 / channels))
        for terms in (vector, squared)
    )
    variance = T.max(mean_square - mean * mean, each(0))
    inverse = T.bind(each(1) / T.sqrt(variance + each(epsilon)))
    means, inverses = ([T.bind(splat(element(of, row))) for row in range(rows)] for of in (mean, inverse))
    with T.serial(0, channels // LANES) as number:
        at = lanes(number * LANES)
        for row in range(rows):
            value = (load(row, number * LANES) - means[row]) * (inverses[row] * scale[at]) + bias[at]
            write(row, number * LANES, value)


def load_normalized(
    rows: int, x, image, token, channels: int, buffers: dict, epsilon: float, buffer, offset
) -> None:
    """Write ``rows`` tokens of ``x``, from ``token`` on, to ``buffer``, after the kernel's LayerNorm."""
    layer_norm_rows(
        rows,
        lambda row, column: x[image, token + row, lanes(column)],
        channels,
        buffers["norm_scale"],
        buffers["norm_bias"],
        epsilon,
        lambda row, column, value: T.buffer_store(buffer, value, [lanes(offset + row * channels + column)]),
    )
