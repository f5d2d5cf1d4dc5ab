"""Products of a tile of rows with a panel of columns: the two inner loops that the linear layers share."""

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from kernels_tvm.emit import LANES, constant, lanes, local, splat, when
from kernels_tvm.targets import Target

# What becomes of a row's sums: (row in the tile, column of the panel / LANES, the vector of sums).
Finish = Callable


def float_product(target: Target, x, stride: int, count, weights: Callable, inputs: int, columns: int, finish):
    """Rows of ``x`` (a flat float32 buffer with rows of ``stride``) times ``weights(k, vector)``.

    Rows are computed as many at a time as registers hold; of the last ones, those past ``count`` are
    computed on whatever the buffer has there and dropped.
    """
    rows, vectors = target.float_tile[0], columns // LANES
    with T.serial(0, T.ceildiv(count, rows)) as block:
        first = T.bind(block * rows)
        sums = local(rows * columns)
        for i in range(rows * vectors):
            T.buffer_store(sums, constant(0), [lanes(i * LANES)])
        with T.serial(0, inputs) as k:
            weight = [T.bind(weights(k, j)) for j in range(vectors)]
            for i in range(rows):
                value = T.bind(splat(x[(first + i) * stride + k]))
                for j in range(vectors):
                    at = lanes((i * vectors + j) * LANES)
                    T.buffer_store(sums, sums[at] + value * weight[j], [at])
        _finish_rows(rows, vectors, first, count, sums, finish)


def int8_product(target: Target, x, stride: int, count, panel, start, inputs: int, columns: int, finish):
    """Rows of int8 numbers (see `Target.activation_offset`) times an int8 panel, in int32 sums.

    The panel is [inputs / 4, columns, 4], flat. ``start(vector)`` is what the sums start from.
    """
    rows, vectors = target.int8_tile[0], columns // LANES
    with T.serial(0, T.ceildiv(count, rows)) as block:
        first = T.bind(block * rows)
        sums = local(rows * columns, "int32")
        for j in range(vectors):
            value = T.bind(start(j))
            for i in range(rows):
                T.buffer_store(sums, value, [lanes((i * vectors + j) * LANES)])
        with T.serial(0, inputs // 4) as group:
            for i in range(rows):
                four = T.bind(T.reinterpret("int32", x[lanes((first + i) * stride + group * 4, 4)]))
                for j in range(vectors):
                    dot4(target, sums, (i * vectors + j) * LANES, four, panel, (group * vectors + j) * 4 * LANES)
        _finish_rows(rows, vectors, first, count, sums, finish)


def shift_product(target: Target, x, stride: int, count, weights, inputs: int, columns: int, finish):
    """As `int8_product`, with shifts and additions alone: the pure MatShift.

    ``weights`` are three flat int32 buffers [inputs, columns], see `kernels_tvm.decoding.decode_shifts`.
    """
    rows, vectors = target.int8_tile[0], columns // LANES
    left, sign, present = weights
    with T.serial(0, T.ceildiv(count, rows)) as block:
        first = T.bind(block * rows)
        sums = local(rows * columns, "int32")
        for i in range(rows * vectors):
            T.buffer_store(sums, splat(T.int32(0)), [lanes(i * LANES)])
        with T.serial(0, inputs) as k:
            values = [
                T.bind(splat(T.Cast("int32", x[(first + i) * stride + k]) - target.activation_offset))
                for i in range(rows)
            ]
            for j in range(vectors):
                at = lanes(k * columns + j * LANES)
                shift, negative, mask = T.bind(left[at]), T.bind(sign[at]), T.bind(present[at])
                for i in range(rows):
                    shifted = T.bind(T.shift_left(values[i], shift))
                    signed = T.bind(T.bitwise_xor(shifted, negative) - negative)
                    total = lanes((i * vectors + j) * LANES)
                    T.buffer_store(sums, sums[total] + T.bitwise_and(signed, mask), [total])
        _finish_rows(rows, vectors, first, count, sums, finish)


def _finish_rows(rows, vectors, first, count, sums, finish):
    for i in range(rows):
        with when(first + i < count):
            for j in range(vectors):
                finish(first + i, j, sums[lanes((i * vectors + j) * LANES)])


def dot4(target: Target, sums, at, four, panel, offset):
    """sums[at + c] += the dot product of ``four`` (int8 numbers in an int32) and panel[offset + 4c ...].

    vpmaddubsw adds two products in 16 bits, which saturates for general weights; for weights of at most
    64 the sum is at most 2 * 255 * 64 = 32640 and does not.
    """

    def lanes_of(count, part):
        return lanes(at + part * count, count), panel[lanes(offset + part * 4 * count, 4 * count)]

    def add_up(count, part, product):
        at, weights = lanes_of(count, part)
        T.buffer_store(sums, product(sums[at], weights), [at])

    match target.dot:
        case "vpdpbusd_512":
            add_up(16, 0, lambda s, w: _vpdpbusd("512", 16, s, four, w))
        case "vpdpbusd_256":
            for part in range(2):
                add_up(8, part, lambda s, w: _vpdpbusd("256", 8, s, four, w))
        case "vpmaddubsw_512":
            add_up(16, 0, lambda s, w: s + _vpmadd("avx512.pmaddubs.w.512", "avx512.pmaddw.d.512", 16, four, w))
        case "vpmaddubsw_256":
            for part in range(2):
                add_up(8, part, lambda s, w: s + _vpmadd("avx2.pmadd.ub.sw", "avx2.pmadd.wd", 8, four, w))
        case "sdot_128":
            for part in range(4):
                add_up(
                    4,
                    part,
                    lambda s, w: T.call_llvm_pure_intrin(
                        "int32x4",
                        "llvm.aarch64.neon.sdot.v4i32.v16i8",
                        s,
                        T.reinterpret("int8x16", splat(four, 4)),
                        w,
                    ),
                )


def _vpdpbusd(width, count, sums, four, weights):
    return T.call_llvm_pure_intrin(
        f"int32x{count}",
        f"llvm.x86.avx512.vpdpbusd.{width}",
        sums,
        T.reinterpret(f"int8x{4 * count}", splat(four, count)),
        weights,
    )


def _vpmadd(multiply, widen, count, four, weights):
    pairs = T.call_llvm_pure_intrin(
        f"int16x{2 * count}",
        f"llvm.x86.{multiply}",
        T.reinterpret(f"int8x{4 * count}", splat(four, count)),
        weights,
    )
    return T.call_llvm_pure_intrin(
        f"int32x{count}", f"llvm.x86.{widen}", pairs, T.broadcast(T.int16(1), 2 * count)
    )
