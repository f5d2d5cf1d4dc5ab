"""Softmax attention of binary queries and keys, whose scores are XORs and counts of bits."""

import math
import operator
from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.emit import bits_of, constant, fold, lanes, local, scratch, splat, split
from kernels_tvm.cpu.softmax_attention import ROWS, attention_kernel, store_scores
from kernels_tvm.cpu.targets import Target
from kernels_tvm.descriptions import LANES, BinarySoftmaxDescription, round_up
from kernels_tvm.emit import otherwise, when

WORD = 32  # codes in a word
PART_TOKENS = 48  # at least, for each part of a head's queries: all keys are packed for each part


def binary_softmax_kernel(target: Target, threads: int, attention: BinarySoftmaxDescription):
    """From x [batch, tokens, channels] and the parameters to y, like x."""
    parts = max(1, attention.tokens // PART_TOKENS)
    return attention_kernel(target, threads, attention, _code_scores, parts)


def _code_scores(attention, buffers, qkv, image, head) -> Callable:
    """`attention_kernel`'s ``prepare`` for scores of codes: head_dim less twice the bits that differ."""
    tokens, channels, head_dim = attention.tokens, attention.channels, attention.head_dim
    others, words = round_up(tokens, LANES), -(-head_dim // WORD)
    starts = [T.bind(part * channels + head * head_dim) for part in range(2)]  # of queries and keys

    def mean(start, magnitudes=False):
        return _mean(attention, qkv, image, start, magnitudes)

    limits = [mean(start) if attention.sample_threshold else T.float32(0) for start in starts]
    scale = T.float32(head_dim**-0.5)
    if attention.grid:
        q, k = (mean(start, magnitudes=True) for start in starts)
        scale = T.bind(q * k * scale)
    keys = scratch(words * others, "uint32")
    with T.serial(0, tokens) as token:
        for word, bits in enumerate(_pack(attention, qkv, image, token, starts[1], limits[1])):
            T.buffer_store(keys, bits, [word * others + token])
    for word in range(words):
        for token in range(tokens, others):
            T.buffer_store(keys, T.uint32(0), [word * others + token])

    def write(queries, scores):
        codes = [_pack(attention, qkv, image, query, starts[0], limits[0]) for query in queries]
        if attention.grid:
            for row, query in enumerate(queries):
                _write_biases(attention, buffers["position_bias"], head, query, scores, row * others)
        with T.serial(0, others // LANES) as vector:
            compared = [T.bind(keys[lanes(word * others + vector * LANES)]) for word in range(words)]
            for row in range(ROWS):
                distance = splat(T.uint32(0))
                for code, key in zip(codes[row], compared, strict=True):
                    distance = distance + T.popcount(splat(code) ^ key)
                twice = T.shift_left(T.Cast(f"int32x{LANES}", distance), splat(T.int32(1)))
                similarity = T.Cast(f"float32x{LANES}", splat(T.int32(head_dim)) - twice)
                value = similarity * splat(scale)
                if attention.grid:
                    value = value + scores[lanes(row * others + vector * LANES)]
                store_scores(attention, scores, row, vector, value)

    return write


def _width(attention) -> int:
    """Lanes of the vectors of a head."""
    return 16 if attention.head_dim % 16 == 0 else 8


def _mean(attention, qkv, image, start, magnitudes: bool):
    """The mean over all tokens of the values or magnitudes of the head whose channels begin at ``start``."""
    width = _width(attention)
    total = local(width)
    T.buffer_store(total, constant(0, width), [lanes(0, width)])
    with T.serial(0, attention.tokens) as token:
        for column in range(0, attention.head_dim, width):
            value = T.bind(qkv[image, token, lanes(start + column, width)])
            if magnitudes:
                value = T.max(value, constant(0, width) - value)
            T.buffer_store(total, total[lanes(0, width)] + value, [lanes(0, width)])
    count = attention.tokens * attention.head_dim
    return T.bind(fold(total[lanes(0, width)], operator.add, count=width) * T.float32(1 / count))


def _pack(attention, qkv, image, token, start, limit) -> list:
    """A token's code for the head whose channels begin at ``start``, in words: bit c % 32 is channel c's."""
    width, words = _width(attention), []
    for first in range(0, attention.head_dim, WORD):
        word = T.uint32(0)
        for column in range(first, min(first + WORD, attention.head_dim), width):
            above = qkv[image, token, lanes(start + column, width)] > splat(limit, width)
            bits = T.Cast("uint32", bits_of(above, width))
            word = T.bitwise_or(word, T.shift_left(bits, T.uint32(column - first)))
        words.append(T.bind(word))
    return words


def _write_biases(attention, table, head, query, scores, base) -> None:
    """Write the biases of one query and all keys to ``scores``, from ``base`` on, and up to a vector more."""
    (height, width), first = attention.grid, attention.first
    pairs = (2 * height - 1) * (2 * width - 1)

    def fill(start, count, value):
        for at in range(start, start + count):
            T.buffer_store(scores, value, [base + at])

    is_before = query < first
    if first:
        with when(is_before):
            bias = splat(table[head, pairs])
            with T.serial(0, math.ceil(height * width / LANES)) as vector:
                T.buffer_store(scores, bias, [lanes(base + first + vector * LANES)])
            fill(0, first, table[head, pairs + 2])

    def write_grid():
        row, column = split(query - first, width)
        with T.serial(0, height) as y:
            start = T.bind((y - row + height - 1) * (2 * width - 1) + width - 1 - column)
            # What a vector has beyond its row is overwritten by the next one.
            for x in range(0, width, LANES):
                value = table[head, lanes(start + x)]
                T.buffer_store(scores, value, [lanes(base + first + y * width + x)])
        fill(0, first, table[head, pairs + 1])

    if first:
        with otherwise(is_before):
            write_grid()
    else:
        write_grid()
