"""Depthwise convolutions, zero-padded: 3 x 3 over the grid of tokens, or over the tokens as one row."""

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from kernels_tvm.emit import LANES, lanes


def convolve_tokens(
    x, place, count: int, padded_width: int, channels: int, kernel, bias, finish: Callable
) -> None:
    """``finish(member, column, vector)`` for ``count`` neighbours' convolutions over 3 x 3 tokens.

    ``x`` is flat, rows of ``padded_width`` tokens with zeros around; ``place`` is the token up and left of the
    first one. ``kernel`` is [9, channels], whole vectors only. Neighbours share what they load.
    """
    with T.serial(0, channels // LANES) as vector:
        column = vector * LANES
        start = T.bind(bias[lanes(column)])
        totals = [start] * count
        for dy in range(3):
            weights = [T.bind(kernel[3 * dy + dx, lanes(column)]) for dx in range(3)]
            for i in range(count + 2):
                value = T.bind(x[lanes((place + dy * padded_width + i) * channels + column)])
                for dx in range(3):
                    if 0 <= i - dx < count:
                        totals[i - dx] = T.bind(totals[i - dx] + value * weights[dx])
        for member, total in enumerate(totals):
            finish(member, column, total)
