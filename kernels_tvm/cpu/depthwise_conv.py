"""Depthwise convolutions, zero-padded: 3 x 3 over the grid of tokens, or over the tokens as one row."""

from collections.abc import Callable, Sequence

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.elementary import gelu
from kernels_tvm.cpu.emit import constant, for_each_vector, lanes, load_lanes, local, split, store_lanes
from kernels_tvm.cpu.targets import Target
from kernels_tvm.descriptions import LANES, DepthwiseConvDescription
from kernels_tvm.emit import Arguments, kernel, when


def convolve_tokens(
    x, places: Sequence, count: int, channels: int, width: int, weights, bias, finish: Callable
) -> None:
    """Emit the convolutions over 3 x 3 tokens of ``count`` neighbours, which share the vectors they load.

    Args:
      x: the tokens, flat, with zeros around the grid. Each line is [channels / LANES, width, LANES], so that
        vectors that are loaded together lie together.
      places: where the tokens to the left of the first neighbour are: in the line above, its own, and below.
      count: neighbours.
      channels: of a token, a multiple of LANES.
      width: tokens of a line.
      weights: [9, channels].
      bias: [channels].
      finish: ``finish(member, column, vector)`` takes a neighbour's results from a channel on.
    """
    with T.serial(0, channels // LANES) as vector:
        column = vector * LANES
        start = T.bind(bias[lanes(column)])
        totals = [start] * count
        for dy, place in enumerate(places):
            row = [T.bind(weights[3 * dy + dx, lanes(column)]) for dx in range(3)]
            for i in range(count + 2):
                value = T.bind(x[lanes(place + column * width + i * LANES)])
                for dx in range(3):
                    if 0 <= i - dx < count:
                        totals[i - dx] = T.bind(totals[i - dx] + value * row[dx])
        for member, total in enumerate(totals):
            finish(member, column, total)


def depthwise_conv_kernel(target: Target, threads: int, conv: DepthwiseConvDescription):
    """From x [images, height, width, channels], kernel [taps, channels] -> y like x.

    With ``conv.gelu`` a bias [channels] comes after the kernel.
    """
    height, width, channels = conv.height, conv.width, conv.channels
    rows, columns = conv.kernel

    def body(arguments: Arguments):
        x = arguments("x", ("images", height, width, channels), "float32")
        weights = arguments("kernel", (rows * columns, channels), "float32")
        bias = arguments("bias", (channels,), "float32") if conv.gelu else None
        y = arguments("y", ("images", height, width, channels), "float32")
        with T.parallel(0, arguments.symbols["images"] * height) as task:
            image, row = split(task, height)
            with T.serial(0, width) as place:

                def convolve(column, count):
                    total = local(LANES)
                    T.buffer_store(total, constant(0), [lanes(0)])
                    for i in range(rows):
                        for j in range(columns):
                            source, beside = row + i - rows // 2, place + j - columns // 2
                            with when(
                                T.And(T.And(source >= 0, source < height), T.And(beside >= 0, beside < width))
                            ):
                                value = load_lanes(x, [image, source, beside], column, count)
                                weight = load_lanes(weights, [i * columns + j], column, count)
                                T.buffer_store(total, total[lanes(0)] + value * weight, [lanes(0)])
                    result = total[lanes(0)]
                    if conv.gelu:
                        result = gelu(target, T.bind(result + load_lanes(bias, [], column, count)))
                    store_lanes(y, result, [image, row, place], column, count)

                for_each_vector(channels, convolve)

    return kernel(body)
