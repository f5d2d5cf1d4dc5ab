"""Binarization: codes of the values above their mean or above 0, as numbers or as bits."""

import operator

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.emit import constant, fold, for_each_vector, lanes, load_lanes, local, splat, store_lanes
from kernels_tvm.cpu.targets import Target
from kernels_tvm.descriptions import LANES, BinarizeDescription
from kernels_tvm.emit import Arguments, kernel

WORD = 32  # codes in a word


def binarize_kernel(target: Target, threads: int, binarize: BinarizeDescription):
    """From x [batch, rows, channels] -> codes of the same shape, or bits [batch, rows, words]."""
    channels = binarize.channels

    def body(arguments: Arguments):
        x = arguments("x", ("batch", "rows", channels), "float32")
        if binarize.packed:
            y = arguments("y", ("batch", "rows", -(-channels // WORD)), "uint32")
        else:
            y = arguments("y", ("batch", "rows", channels), "float32")
        rows = arguments.symbols["rows"]
        with T.parallel(0, arguments.symbols["batch"]) as image:
            limit = _mean(x, image, rows, channels) if binarize.sample_threshold else T.float32(0)
            with T.serial(0, rows) as row:
                write = _pack_row if binarize.packed else _code_row
                write(binarize, x, y, image, row, limit)

    return kernel(body)


def _mean(x, image, rows, channels):
    total = local(LANES)
    T.buffer_store(total, constant(0), [lanes(0)])
    with T.serial(0, rows) as row:

        def accumulate(column, count):
            value = total[lanes(0)] + load_lanes(x, [image, row], column, count)
            T.buffer_store(total, value, [lanes(0)])

        for_each_vector(channels, accumulate)
    return T.bind(fold(total[lanes(0)], operator.add) / T.Cast("float32", rows * channels))


def _code_row(binarize, x, y, image, row, limit):
    def code(column, count):
        above = load_lanes(x, [image, row], column, count) > splat(limit)
        value = T.Select(above, constant(binarize.high), constant(binarize.low))
        store_lanes(y, value, [image, row], column, count)

    for_each_vector(binarize.channels, code)


def _pack_row(binarize, x, y, image, row, limit):
    """Write a row as bits: the code of channel c is bit c % 32 of word c / 32."""
    channels = binarize.channels
    for word in range(-(-channels // WORD)):
        bits = T.uint32(0)
        for start in range(word * WORD, min(channels, (word + 1) * WORD), LANES):
            count = min(LANES, channels - start)
            above = load_lanes(x, [image, row], start, count) > splat(limit)
            present = T.ramp(T.int32(0), T.int32(1), LANES) < splat(T.int32(count))
            weight = T.shift_left(splat(T.uint32(1)), T.Cast("uint32x16", T.ramp(start % WORD, 1, LANES)))
            chosen = T.Select(T.And(above, present), weight, splat(T.uint32(0)))
            bits = T.bitwise_or(bits, fold(chosen, T.bitwise_or, "uint32"))
        T.buffer_store(y, bits, [image, row, word])
