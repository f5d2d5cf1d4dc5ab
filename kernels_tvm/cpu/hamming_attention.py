"""Linear attention in Hamming space: x + proj(attention(qkv(norm(x)))), in three passes over the tokens.

1. Compute queries, keys and values; normalize queries and keys, and sum them: their means are the thresholds.
2. Compute the context: its row for a bit is the sum of the values of all tokens whose key has the bit set.
3. For each token, add the context's rows whose bits are set in the query; normalize, add the convolution of
   the values, and project.

Sums over tokens and bits need no multiplications. They take a few bits of a code at once, by the method of
four Russians: a table holds the sum for each number that these bits can make.
"""

import math
import operator
from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.emit import (
    Claims,
    bits_of,
    constant,
    element,
    fold,
    fold_rows,
    lanes,
    local,
    row_lanes,
    scratch,
    splat,
    split,
    store_lanes,
    turns,
)
from kernels_tvm.cpu.linear import ThreadLayer
from kernels_tvm.cpu.normalization import load_normalized
from kernels_tvm.cpu.targets import Target
from kernels_tvm.cpu.tiles import image_tiles, images_at_once, rows_together
from kernels_tvm.descriptions import LANES, VALUE_TAPS, HammingLinearDescription
from kernels_tvm.emit import Arguments, kernel, otherwise, part, when

SUBSET_BITS = 4  # bits of a code that are looked up together; they choose a subset of 4 rows of the context
SUBSETS = 1 << SUBSET_BITS


def hamming_linear_kernel(target: Target, threads: int, attention: HammingLinearDescription):
    """From x [batch, tokens, channels], the parameters -> y [batch, tokens, channels]."""
    tokens, channels = attention.tokens, attention.channels
    tiles, size = image_tiles(attention, threads)
    together = rows_together(tokens)
    chunk = -(-tokens // threads)
    at_once = images_at_once(tokens * 3 * channels)

    def body(arguments: Arguments):
        x = arguments("x", ("batch", tokens, channels), "float32")
        buffers = arguments.parameters(attention)
        y = arguments("y", ("batch", tokens, channels), "float32")
        qkv = T.alloc_buffer((at_once, tokens, 3 * channels), "float32")
        sums = T.alloc_buffer((at_once, tiles, 2 * attention.heads), "float32")
        contexts = T.alloc_buffer((at_once, threads, channels * attention.head_dim), "float32")

        def place(index, parts, length):
            image, number = split(index, parts)
            start = T.bind(number * length)
            return image, number, start, T.bind(T.max(T.min(tokens - start, length), 0))

        def layer(name):
            return ThreadLayer(
                target, getattr(attention, name), part(buffers, f"{name}_"), keep=tiles > threads
            )

        with turns(arguments.symbols["batch"], at_once) as (first, images):
            claims = Claims(target, images * tiles, threads)
            with T.parallel(0, threads) as thread:
                project = layer("qkv")
                with claims.of(thread) as index:
                    image, tile, start, count = place(index, tiles, size)

                    def at(row):
                        return image, T.bind(start + row)

                    load_rows, store = projection(attention, buffers, at, x, first, qkv)
                    project.tile(size, count, load_rows, store, together)
                    _normalize(attention, qkv, image, tile, start, count, sums)
            claims = Claims(target, images * threads, threads)
            with T.parallel(0, threads) as thread, claims.of(thread) as index:
                image, number, start, count = place(index, threads, chunk)
                _context(attention, qkv, sums, tiles, image, number, start, count, contexts)
            claims = Claims(target, images * tiles, threads)
            with T.parallel(0, threads) as thread:
                proj = layer("proj")
                with claims.of(thread) as index:
                    image, tile, start, count = place(index, tiles, size)
                    mixed = _mix(
                        attention, qkv, sums, tiles, contexts, threads, buffers, image, start, size, count
                    )

                    def load_mixed(row, buffer, offset):
                        with T.serial(0, together * channels // LANES) as vector:
                            value = mixed[lanes(row * channels + vector * LANES)]
                            T.buffer_store(buffer, value, [lanes(offset + vector * LANES)])

                    def store(row, column, value, lanes_):
                        at = [first + image, start + row]
                        store_lanes(y, value + x[(*at, lanes(column))], at, column, lanes_)

                    proj.tile(size, count, load_mixed, store, together)

    return kernel(body)


def projection(attention, buffers, place: Callable, x, first, qkv) -> tuple[Callable, Callable]:
    """The ``load_rows`` and ``store`` of `ThreadLayer.tile` for queries, keys and values.

    ``place(row)`` is a row's image in ``qkv``, and its token. The first image of ``qkv`` is image ``first``
    of ``x``. Rows are loaded in groups of `rows_together`.
    """
    together, channels = rows_together(attention.tokens), attention.channels

    def load_rows(row, buffer, offset):
        image, token = place(row)
        image = T.bind(first + image)
        load_normalized(together, x, image, token, channels, buffers, attention.epsilon, buffer, offset)

    def store(row, column, value, lanes_):
        image, token = place(row)
        store_lanes(qkv, value, [image, token], column, lanes_)

    return load_rows, store


def _vectors(attention):
    """Lanes and vectors of a head."""
    width = 16 if attention.head_dim % 16 == 0 else 8
    return width, attention.head_dim // width


def _normalize(attention, qkv, image, tile, start, count, sums):
    """Divide queries and keys by their norms, in place, and sum the results by head."""
    width, vectors = _vectors(attention)
    together = rows_together(attention.tokens)
    with T.serial(0, 2 * attention.heads) as index:
        total = local(width)
        T.buffer_store(total, T.broadcast(T.float32(0), width), [lanes(0, width)])
        with T.serial(0, T.floordiv(count, together)) as block:
            token = T.bind(start + block * together)

            def at(vector):
                return lanes(index * attention.head_dim + vector * width, width)

            rows = [
                [T.bind(qkv[image, token + row, at(v)]) for v in range(vectors)] for row in range(together)
            ]
            normalized = _normalized(rows, width)
            for row, values in enumerate(normalized):
                for vector, value in enumerate(values):
                    T.buffer_store(qkv, value, [image, token + row, at(vector)])
            added = _add_up([value for values in normalized for value in values])
            T.buffer_store(total, total[lanes(0, width)] + added, [lanes(0, width)])
        T.buffer_store(sums, fold(total[lanes(0, width)], operator.add, count=width), [image, tile, index])


def _add_up(vectors):
    """The sum of vectors, by halves: a chain of additions is as short as can be."""
    if len(vectors) == 1:
        return vectors[0]
    half = len(vectors) // 2
    return _add_up(vectors[:half]) + _add_up(vectors[half:])


def _normalized(rows, width):
    """Rows, each a list of vectors, divided by their norms; 0 where the square of a norm is below 1e-30."""

    def each(value):
        return constant(value, row_lanes(len(rows)))

    squares = [_add_up([value * value for value in values]) for values in rows]
    square = fold_rows(squares, operator.add, count=width)
    positive = square > each(1e-30)
    root = T.sqrt(T.Select(positive, square, each(1)))
    inverse = T.bind(T.Select(positive, each(1) / root, each(0)))
    normalized = []
    for row, values in enumerate(rows):
        factor = T.bind(splat(element(inverse, row), width))
        normalized.append([T.bind(value * factor) for value in values])
    return normalized


def _threshold(attention, sums, tiles, image, index):
    """The threshold of codes; ``index`` is the head for queries, and the number of heads more for keys."""
    if not attention.sample_threshold:
        return T.float32(0)
    total = local(1)
    T.buffer_store(total, T.float32(0), [0])
    with T.serial(0, tiles) as tile:
        T.buffer_store(total, total[0] + sums[image, tile, index], [0])
    return T.bind(total[0] * T.float32(1 / (attention.tokens * attention.head_dim)))


def _numbers(attention, qkv, image, token, first, limit):
    """A token's code for the head whose channels start at ``first``: a number for each SUBSET_BITS bits."""
    width, vectors = _vectors(attention)
    numbers = []
    for vector in range(vectors):
        above = qkv[image, token, lanes(first + vector * width, width)] > splat(limit, width)
        word = T.bind(T.Cast("int32", bits_of(above, width)))
        for shift in range(0, width, SUBSET_BITS):
            numbers.append(T.bind(T.bitwise_and(T.shift_right(word, shift), SUBSETS - 1)))
    return numbers


def _context(attention, qkv, sums, tiles, image, number, start, count, contexts):
    """Write the context: row d is the sum of the values of all tokens whose key has bit d set.

    A value is first added to one sum in each group of bits: that of the subset of bits that its key has set.
    Row d is then the total over the subsets that contain bit d.
    """
    width, vectors = _vectors(attention)
    head_dim = attention.head_dim
    groups = head_dim // SUBSET_BITS
    collected = scratch(groups * SUBSETS * head_dim)
    with T.serial(0, attention.heads) as head:
        limit = _threshold(attention, sums, tiles, image, attention.heads + head)
        with T.serial(0, groups * SUBSETS * vectors) as vector:
            T.buffer_store(collected, T.broadcast(T.float32(0), width), [lanes(vector * width, width)])
        first = T.bind(attention.channels + head * head_dim)
        with T.serial(0, count) as row:
            token = T.bind(start + row)
            values = [
                T.bind(qkv[image, token, lanes(first + attention.channels + v * width, width)])
                for v in range(vectors)
            ]
            for group, subset in enumerate(_numbers(attention, qkv, image, token, first, limit)):
                for v in range(vectors):
                    at = lanes((group * SUBSETS + subset) * head_dim + v * width, width)
                    T.buffer_store(collected, collected[at] + values[v], [at])
        with T.serial(0, groups) as group:
            for bit in range(SUBSET_BITS):
                for v in range(vectors):
                    total = _add_up(
                        [
                            collected[lanes((group * SUBSETS + subset) * head_dim + v * width, width)]
                            for subset in range(SUBSETS)
                            if subset >> bit & 1
                        ]
                    )
                    at = ((head * groups + group) * SUBSET_BITS + bit) * head_dim + v * width
                    T.buffer_store(contexts, total, [image, number, lanes(at, width)])


def _sum_subsets(attention, contexts, chunks, image, head, table):
    """Write the sum of each subset of SUBSET_BITS rows of a head's context, [groups, SUBSETS, head_dim]."""
    width, vectors = _vectors(attention)
    head_dim = attention.head_dim
    groups = head_dim // SUBSET_BITS
    with T.serial(0, groups) as group, T.serial(0, vectors) as vector:

        def row(bit):
            at = ((head * groups + group) * SUBSET_BITS + bit) * head_dim + vector * width
            return T.bind(_add_up([contexts[image, number, lanes(at, width)] for number in range(chunks)]))

        sums = [T.broadcast(T.float32(0), width)]
        for bit in range(SUBSET_BITS):
            added = row(bit)
            sums += [T.bind(total + added) for total in sums]
        for subset, total in enumerate(sums):
            at = lanes((group * SUBSETS + subset) * head_dim + vector * width, width)
            T.buffer_store(table, total, [at])


def _mix(attention, qkv, sums, tiles, contexts, chunks, buffers, image, start, limit, count):
    """The attention's output for a tile, [rows, channels], flat."""
    width, vectors = _vectors(attention)
    head_dim = attention.head_dim
    together = rows_together(attention.tokens)
    mixed = scratch(limit * attention.channels)
    table = scratch(head_dim // SUBSET_BITS * SUBSETS * head_dim)
    with T.serial(0, attention.heads) as head:
        threshold = _threshold(attention, sums, tiles, image, head)
        _sum_subsets(attention, contexts, chunks, image, head, table)
        column = T.bind(2 * attention.channels + head * head_dim)

        def mix(token):
            """V / 2 + q context / pi."""
            numbers = _numbers(attention, qkv, image, token, T.bind(head * head_dim), threshold)
            mixture = []
            for v in range(vectors):
                total = _add_up(
                    [
                        table[lanes((group * SUBSETS + subset) * head_dim + v * width, width)]
                        for group, subset in enumerate(numbers)
                    ]
                )
                value = qkv[image, token, lanes(column + v * width, width)]
                halves = value * constant(0.5, width) + total * constant(1 / math.pi, width)
                mixture.append(T.bind(halves))
            return mixture

        with T.serial(0, T.floordiv(count, together)) as block:
            first = T.bind(block * together)
            tokens = [T.bind(start + first + row) for row in range(together)]
            normalized = _normalized([mix(token) for token in tokens], width)
            for row, (token, values) in enumerate(zip(tokens, normalized, strict=True)):
                at = T.bind((first + row) * attention.channels + head * head_dim)
                _add_convolved(attention, qkv, buffers, image, token, head, values, mixed, at)
    return mixed


def _add_convolved(attention, qkv, buffers, image, token, head, added, mixed, place):
    """Write a head's values, convolved over the tokens, plus the vectors ``added``, to ``place``."""
    width, vectors = _vectors(attention)
    head_dim, channels = attention.head_dim, attention.channels
    column = T.bind(2 * channels + head * head_dim)

    def values(shift, v):
        return qkv[image, token + shift, lanes(column + v * width, width)]

    convolved = local(head_dim)
    for v in range(vectors):
        T.buffer_store(convolved, T.broadcast(T.float32(0), width), [lanes(v * width, width)])
    kernel_ = buffers["value_kernel"]
    reach = VALUE_TAPS // 2
    inside = T.bind(T.And(token >= reach, token < attention.tokens - reach))

    def tap(shift):
        weight = T.bind(splat(kernel_[shift + reach, head], width))
        for v in range(vectors):
            at = lanes(v * width, width)
            T.buffer_store(convolved, convolved[at] + values(shift, v) * weight, [at])

    with when(inside):
        for shift in range(-reach, reach + 1):
            tap(shift)
    with otherwise(inside):
        for shift in range(-reach, reach + 1):
            with when(T.And(token + shift >= 0, token + shift < attention.tokens)):
                tap(shift)
    for v in range(vectors):
        result = convolved[lanes(v * width, width)] + added[v]
        T.buffer_store(mixed, result, [lanes(place + v * width, width)])
