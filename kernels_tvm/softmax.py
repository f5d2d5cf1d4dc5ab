"""Softmax attention: x + proj(attention(qkv(norm(x)))), for the few tokens of a pyramid's last stage."""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.attention import project_tokens
from kernels_tvm.descriptions import LANES, SoftmaxAttention, round_up
from kernels_tvm.emit import (
    Arguments,
    add,
    constant,
    exp,
    fold,
    kernel,
    lanes,
    local,
    maximum,
    scratch,
    splat,
    store_lanes,
)
from kernels_tvm.linear import Layer, prepare_layers
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

        project, proj = (
            Layer(target, getattr(attention, name), part(buffers, f"{name}_")) for name in ("qkv", "proj")
        )
        prepare_layers([project, proj], threads)
        tiles = project.row_tiles(rows, threads)
        with T.parallel(0, tiles.count) as tile:
            start, count = tiles[tile]
            project_tokens(
                attention,
                project,
                buffers,
                tiles.limit,
                count,
                lambda row: _place(start + row, tokens),
                x,
                qkv,
            )
        with T.parallel(0, arguments.symbols["batch"] * heads) as task:
            image, head = T.bind(T.floordiv(task, heads)), T.bind(T.floormod(task, heads))
            _attend(attention, qkv, image, head, mixed)
        with T.parallel(0, tiles.count) as tile:
            start_, count_ = tiles[tile]

            def load_row(row, buffer, offset):
                image, token = _place(start_ + row, tokens)
                with T.serial(0, channels // LANES) as vector:
                    value = mixed[image, token, lanes(vector * LANES)]
                    T.buffer_store(buffer, value, [lanes(offset + vector * LANES)])

            def store(row, column, value, lanes_):
                image, token = _place(start_ + row, tokens)
                store_lanes(y, value + x[image, token, lanes(column)], [image, token], column, lanes_)

            proj.tile(tiles.limit, count_, load_row, store)

    return kernel(body)


def _place(row, tokens):
    return T.bind(T.floordiv(row, tokens)), T.bind(T.floormod(row, tokens))


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
        largest = T.bind(fold(best[lanes(0)], maximum))
        with T.serial(0, others // LANES) as vector:
            at = lanes(vector * LANES)
            is_token = T.ramp(vector * LANES, 1, LANES) < splat(T.int32(tokens))
            T.buffer_store(weights, T.Select(is_token, exp(weights[at] - splat(largest)), constant(0)), [at])
            T.buffer_store(total, total[lanes(0)] + weights[at], [lanes(0)])
        inverse = T.bind(T.float32(1) / fold(total[lanes(0)], add))
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
