"""Softmax attention: x + proj(attention(qkv(norm(x)))), for the few tokens of a pyramid's last stage."""

import operator

from tvm.script.ir_builder import tirx as T

from kernels_tvm.attention import projection
from kernels_tvm.descriptions import LANES, SoftmaxAttention, round_up
from kernels_tvm.elementary import exp
from kernels_tvm.emit import (
    Arguments,
    constant,
    fold,
    kernel,
    lanes,
    local,
    scratch,
    splat,
    split,
    store_lanes,
)
from kernels_tvm.linear import apply_layer, few_rows
from kernels_tvm.mlp import part
from kernels_tvm.targets import Target


def softmax_attention_kernel(target: Target, threads: int, attention: SoftmaxAttention):
    """From x [batch, tokens, channels] and the parameters to the scratch arrays and y, like x."""
    tokens, channels, heads = attention.tokens, attention.channels, attention.heads

    def body(arguments: Arguments):
        x = arguments("x", ("batch", tokens, channels), "float32")
        buffers = {name: arguments(name, shape, dtype) for name, shape, dtype in attention.arguments()}
        qkv = arguments("qkv", ("batch", tokens, 3 * channels), "float32")
        mixed = arguments("mixed", ("batch", tokens, channels), "float32")
        y = arguments("y", ("batch", tokens, channels), "float32")
        rows = arguments.symbols["batch"] * tokens

        def load_mixed(row, buffer, offset):
            image, token = split(row, tokens)
            with T.serial(0, channels // LANES) as vector:
                value = mixed[image, token, lanes(vector * LANES)]
                T.buffer_store(buffer, value, [lanes(offset + vector * LANES)])

        def store(row, column, value, lanes_):
            image, token = split(row, tokens)
            store_lanes(y, value + x[image, token, lanes(column)], [image, token], column, lanes_)

        def apply(layer, name, load_row, store):
            few = few_rows(tokens, layer)
            apply_layer(target, threads, layer, part(buffers, name), rows, load_row, store, few)

        apply(attention.qkv, "qkv_", *projection(attention, buffers, lambda row: split(row, tokens), x, qkv))
        with T.parallel(0, arguments.symbols["batch"] * heads) as task:
            image, head = split(task, heads)
            _attend(attention, qkv, image, head, mixed)
        apply(attention.proj, "proj_", load_mixed, store)

    return kernel(body)


def _attend(attention, qkv, image, head, mixed):
    """softmax(q k^T / sqrt(head_dim)) v for one head of one image."""
    tokens, channels, head_dim = attention.tokens, attention.channels, attention.head_dim
    others = round_up(tokens, LANES)
    first = T.bind(head * head_dim)
    keys, weights = scratch(head_dim * others), scratch(others)
    with T.serial(0, tokens) as token, T.serial(0, head_dim) as d:
        T.buffer_store(keys, qkv[image, token, channels + first + d], [d * others + token])
    for token in range(tokens, others):
        with T.serial(0, head_dim) as d:
            T.buffer_store(keys, T.float32(0), [d * others + token])

    width = 16 if head_dim % 16 == 0 else 8
    with T.serial(0, tokens) as token:
        best, total = local(LANES), local(LANES)
        T.buffer_store(best, constant(-3e38), [lanes(0)])
        T.buffer_store(total, constant(0), [lanes(0)])
        with T.serial(0, others // LANES) as vector:
            score = local(LANES)
            T.buffer_store(score, constant(0), [lanes(0)])
            with T.serial(0, head_dim) as d:
                key = keys[lanes(d * others + vector * LANES)]
                T.buffer_store(score, score[lanes(0)] + splat(qkv[image, token, first + d]) * key, [lanes(0)])
            is_token = T.ramp(vector * LANES, 1, LANES) < splat(T.int32(tokens))
            scaled = T.Select(is_token, score[lanes(0)] * constant(head_dim**-0.5), constant(-3e38))
            T.buffer_store(weights, scaled, [lanes(vector * LANES)])
            T.buffer_store(best, T.max(best[lanes(0)], weights[lanes(vector * LANES)]), [lanes(0)])
        largest = T.bind(fold(best[lanes(0)], T.max))
        with T.serial(0, others // LANES) as vector:
            at = lanes(vector * LANES)
            is_token = T.ramp(vector * LANES, 1, LANES) < splat(T.int32(tokens))
            T.buffer_store(weights, T.Select(is_token, exp(weights[at] - splat(largest)), constant(0)), [at])
            T.buffer_store(total, total[lanes(0)] + weights[at], [lanes(0)])
        inverse = T.bind(T.float32(1) / fold(total[lanes(0)], operator.add))
        out = local(head_dim)
        for v in range(head_dim // width):
            T.buffer_store(out, constant(0, width), [lanes(v * width, width)])
        with T.serial(0, tokens) as other:
            weight = T.bind(splat(weights[other], width))
            for v in range(head_dim // width):
                at = lanes(v * width, width)
                value = qkv[image, other, lanes(2 * channels + first + v * width, width)]
                T.buffer_store(out, out[at] + weight * value, [at])
        for v in range(head_dim // width):
            value = out[lanes(v * width, width)] * splat(inverse, width)
            T.buffer_store(mixed, value, [image, token, lanes(first + v * width, width)])
