"""LayerNorm of one row, as the first step of what reads it."""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.emit import LANES, add, constant, fold, lanes, local, splat


def layer_norm_row(load, channels: int, scale, bias, epsilon: float, buffer, offset) -> None:
    """Write the normalized row; ``load(column)`` is a vector of it. Whole vectors only.

    The variance is the mean square less the squared mean, and at least 0, as in Flax.
    """
    total, square = local(LANES), local(LANES)
    for accumulator in (total, square):
        T.buffer_store(accumulator, constant(0), [lanes(0)])
    with T.serial(0, channels // LANES) as vector:
        value = T.bind(load(vector * LANES))
        T.buffer_store(total, total[lanes(0)] + value, [lanes(0)])
        T.buffer_store(square, square[lanes(0)] + value * value, [lanes(0)])
    mean = T.bind(fold(total[lanes(0)], add) * T.float32(1 / channels))
    mean_square = T.bind(fold(square[lanes(0)], add) * T.float32(1 / channels))
    variance = T.max(mean_square - mean * mean, T.float32(0))
    inverse = T.bind(T.float32(1) / T.sqrt(variance + T.float32(epsilon)))
    with T.serial(0, channels // LANES) as vector:
        at = lanes(vector * LANES)
        value = (load(vector * LANES) - splat(mean)) * (splat(inverse) * scale[at]) + bias[at]
        T.buffer_store(buffer, value, [lanes(offset + vector * LANES)])
