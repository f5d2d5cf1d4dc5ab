"""Softmax attention: x + proj(attention(qkv(norm(x)))), for the few tokens of a pyramid's last stage.

Other attentions that have a softmax differ in their scores alone, see `attention_kernel`.
"""

import operator
from collections.abc import Callable
from functools import partial

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.elementary import exp
from kernels_tvm.cpu.emit import (
    Claims,
    constant,
    fold,
    lanes,
    local,
    scratch,
    splat,
    split,
    store_lanes,
    turns,
)
from kernels_tvm.cpu.hamming_attention import projection
from kernels_tvm.cpu.linear import apply_layer, few_rows
from kernels_tvm.cpu.targets import Target
from kernels_tvm.cpu.tiles import images_at_once, rows_together
from kernels_tvm.descriptions import LANES, AttentionDescription, SoftmaxAttentionDescription, round_up
from kernels_tvm.emit import Arguments, kernel, part

ROWS = 6  # tokens computed together: their vectors of sums fit the registers of every target
LOWEST = -3e38  # score of a lane without a token: its exponential vanishes in the sum


def softmax_attention_kernel(target: Target, threads: int, attention: SoftmaxAttentionDescription):
    """From x [batch, tokens, channels] and the parameters to y, like x."""
    return attention_kernel(target, threads, attention, _product_scores)


def attention_kernel(
    target: Target, threads: int, attention: AttentionDescription, prepare: Callable, parts: int = 1
):
    """From x [batch, tokens, channels] and the parameters to y, like x: softmax attention of any scores.

    ``prepare(attention, buffers, qkv, image, head)`` emits what a head's scores need, and returns a function
    (tokens, scores) that writes the scores of ``ROWS`` queries, each with all keys, to the buffer ``scores``,
    a query every `round_up(tokens, LANES)` numbers. ``parts`` of a head's queries are prepared for
    separately, on any thread.
    """
    tokens, channels, heads = attention.tokens, attention.channels, attention.heads
    together = rows_together(tokens)
    at_once = images_at_once(tokens * 4 * channels)

    def body(arguments: Arguments):
        x = arguments("x", ("batch", tokens, channels), "float32")
        buffers = arguments.parameters(attention)
        y = arguments("y", ("batch", tokens, channels), "float32")
        qkv = T.alloc_buffer((at_once, tokens, 3 * channels), "float32")
        mixed = T.alloc_buffer((at_once, tokens, channels), "float32")

        with turns(arguments.symbols["batch"], at_once) as (first, images):

            def load_mixed(row, buffer, offset):
                image, token = split(row, tokens)
                for member in range(together):
                    with T.serial(0, channels // LANES) as vector:
                        value = mixed[image, token + member, lanes(vector * LANES)]
                        T.buffer_store(buffer, value, [lanes(offset + member * channels + vector * LANES)])

            def store(row, column, value, lanes_):
                image, token = split(row, tokens)
                at = [first + image, token]
                store_lanes(y, value + x[(*at, lanes(column))], at, column, lanes_)

            def apply(layer, name, load_rows, store):
                few = few_rows(tokens, layer)
                parameters, rows = part(buffers, name), T.bind(images * tokens)
                apply_layer(target, threads, layer, parameters, rows, load_rows, store, few, together)

            place = partial(split, size=tokens)
            apply(attention.qkv, "qkv_", *projection(attention, buffers, place, x, first, qkv))
            claims = Claims(target, images * (heads * parts), threads)
            with T.parallel(0, threads) as thread, claims.of(thread) as task:
                image, place = split(task, heads * parts)
                head, number = split(place, parts)
                write_scores = prepare(attention, buffers, qkv, image, head)
                _attend(attention, qkv, image, head, number, parts, write_scores, mixed)
            apply(attention.proj, "proj_", load_mixed, store)

    return kernel(body)


def _attend(attention, qkv, image, head, number, parts, write_scores, mixed):
    """Write softmax(scores) v for one of the ``parts`` of the queries of one head of one image."""
    tokens, channels, head_dim = attention.tokens, attention.channels, attention.head_dim
    others = round_up(tokens, LANES)
    first = T.bind(head * head_dim)
    width = 16 if head_dim % 16 == 0 else 8
    weights = scratch(ROWS * others + LANES)
    blocks = -(-tokens // ROWS)
    size = -(-blocks // parts)
    start = T.bind(number * size)
    with T.serial(0, T.max(T.min(blocks - start, size), 0)) as block:
        # The last block's surplus rows repeat the last one.
        token = [T.bind(T.min((start + block) * ROWS + i, tokens - 1)) for i in range(ROWS)]
        write_scores(token, weights)
        inverse = [T.bind(T.float32(1) / _exponentiate(weights, i * others, others)) for i in range(ROWS)]
        for column in range(0, head_dim, width):
            at = lanes(2 * channels + first + column, width)
            sums = _multiply(
                tokens,
                lambda i, other: weights[i * others + other],
                lambda other, at=at: qkv[image, other, at],
                width,
            )
            for i in range(ROWS):
                value = sums[i] * splat(inverse[i], width)
                T.buffer_store(mixed, value, [image, token[i], lanes(first + column, width)])


def _product_scores(attention, buffers, qkv, image, head) -> Callable:
    """`attention_kernel`'s ``prepare`` for the scores q k^T / sqrt(head_dim)."""
    tokens, channels, head_dim = attention.tokens, attention.channels, attention.head_dim
    others = round_up(tokens, LANES)
    first = T.bind(head * head_dim)
    keys = scratch(head_dim * others)
    with T.serial(0, tokens) as token, T.serial(0, head_dim) as d:
        T.buffer_store(keys, qkv[image, token, channels + first + d], [d * others + token])
    for token in range(tokens, others):
        with T.serial(0, head_dim) as d:
            T.buffer_store(keys, T.float32(0), [d * others + token])

    def write(queries, scores):
        with T.serial(0, others // LANES) as vector:
            products = _multiply(
                head_dim,
                lambda i, d: qkv[image, queries[i], first + d],
                lambda d: keys[lanes(d * others + vector * LANES)],
            )
            for i in range(ROWS):
                store_scores(attention, scores, i, vector, products[i] * constant(head_dim**-0.5))

    return write


def store_scores(attention, scores, row: int, vector, value) -> None:
    """Write a vector of a row's scores; where there are no more tokens, the lowest one."""
    is_token = T.ramp(vector * LANES, 1, LANES) < splat(T.int32(attention.tokens))
    at = lanes(row * round_up(attention.tokens, LANES) + vector * LANES)
    T.buffer_store(scores, T.Select(is_token, value, constant(LOWEST)), [at])


def _multiply(inner: int, left: Callable, right: Callable, width: int = LANES) -> list:
    """A vector for each of ``ROWS`` rows: the sum over k of ``left(row, k)`` times ``right(k)``."""
    sums = local(ROWS * width)
    for i in range(ROWS):
        T.buffer_store(sums, constant(0, width), [lanes(i * width, width)])
    with T.serial(0, inner) as k:
        factor = T.bind(right(k))
        for i in range(ROWS):
            at = lanes(i * width, width)
            T.buffer_store(sums, sums[at] + splat(left(i, k), width) * factor, [at])
    return [sums[lanes(i * width, width)] for i in range(ROWS)]


def _exponentiate(scores, base, count: int):
    """Replace the scores of a row by e^(score - largest score), and return the sum of these."""
    best, total = local(LANES), local(LANES)
    T.buffer_store(best, constant(LOWEST), [lanes(0)])
    T.buffer_store(total, constant(0), [lanes(0)])
    with T.serial(0, count // LANES) as vector:
        T.buffer_store(best, T.max(best[lanes(0)], scores[lanes(base + vector * LANES)]), [lanes(0)])
    largest = T.bind(fold(best[lanes(0)], T.max))
    with T.serial(0, count // LANES) as vector:
        at = lanes(base + vector * LANES)
        T.buffer_store(scores, exp(scores[at] - splat(largest)), [at])
        T.buffer_store(total, total[lanes(0)] + scores[at], [lanes(0)])
    return fold(total[lanes(0)], operator.add)
