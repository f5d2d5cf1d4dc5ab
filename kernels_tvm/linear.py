"""A linear layer of any kind for a tile of rows: multiplications, shifts, or a mixture of both.

The kernels that contain a linear layer (`kernels_tvm.matshift`, `kernels_tvm.mlp`,
`kernels_tvm.attention`) emit it from here: they say where rows come from and where results go.
"""

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from kernels_tvm.emit import (
    LANES,
    RowTiles,
    add,
    constant,
    fold,
    lanes,
    local,
    otherwise,
    round_up,
    scratch,
    sigmoid,
    splat,
    when,
)
from kernels_tvm.decoding import (
    code_table,
    column_offsets,
    decode_float,
    decode_int8,
    decode_shifts,
    power_of_two,
    quantize_row,
)
from kernels_tvm.descriptions import Linear
from kernels_tvm.packing import TILE_INPUTS
from kernels_tvm.products import float_product, int8_product, shift_product
from kernels_tvm.targets import Target


def row_tiles(target: Target, linear: Linear, rows, threads: int) -> RowTiles:
    """Tiles that `linear_tile` works on."""
    return RowTiles(rows, linear.row_bytes, target.float_tile[0], threads)


def linear_tile(
    target: Target,
    linear: Linear,
    buffers: dict,
    limit: int,
    count,
    load_rows: Callable,
    store: Callable,
    group: int = 1,
) -> None:
    """Emit the layer for ``count`` rows, ``limit`` at most.

    ``load_rows(row, buffer, offset)`` writes ``group`` rows of the tile from ``row`` on, each `Linear.width`
    float32 numbers with zeros after the inputs; ``count`` must be a multiple of ``group``.
    ``store(row, column, value, count)`` takes ``count`` results of a row, from a column on.
    """
    # The last block of a product reads as many rows as registers hold.
    capacity = limit + max(target.float_tile[0], target.int8_tile[0])
    width = linear.width
    if linear.kind == "moe":
        _mixture(target, linear, buffers, capacity, count, load_rows, store, group)
    elif linear.kind == "shift" and linear.activations == "int8":
        x, whole, scale = scratch(group * width), scratch(capacity * width, "uint8"), scratch(capacity)
        with T.serial(0, T.floordiv(count, group)) as first:
            load_rows(first * group, x, 0)
            with T.serial(0, group) as member:
                row = T.bind(first * group + member)
                quantize_row(target, x, member * width, width, whole, row * width, scale, row)
        _shift_int8(target, linear, buffers, whole, scale, count, store)
    else:
        x = scratch(capacity * width)
        with T.serial(0, T.floordiv(count, group)) as first:
            load_rows(first * group, x, first * group * width)
        product = _dense if linear.kind == "dense" else _shift_float
        product(target, linear, buffers, x, count, store)


def _mixture(target, linear, buffers, capacity, count, load_rows, store, group):
    """Rows are sorted by expert as they arrive: each expert then sees its own rows, one after the other."""
    width = linear.width
    router = scratch(width)
    for column in range(linear.inputs, width):
        T.buffer_store(router, T.float32(0), [column])
    with T.serial(0, linear.inputs) as k:
        kernel = buffers["router_kernel"]
        T.buffer_store(router, kernel[k, 0] - kernel[k, 1], [k])
    bias = T.bind(buffers["router_bias"][0] - buffers["router_bias"][1])

    slots = round_up(capacity, LANES)
    rows = {expert: scratch(slots, "int32") for expert in ("dense", "shift")}
    gates = {expert: scratch(slots) for expert in ("dense", "shift")}
    taken = local(2, "int32")
    int8 = linear.activations == "int8"
    arriving, dense_x = scratch(group * width), scratch(capacity * width)
    shift_x = scratch(capacity * width, "uint8" if int8 else "float32")
    scale = scratch(capacity) if int8 else None
    for expert in range(2):
        T.buffer_store(taken, T.int32(0), [expert])

    def copy(base, x, slot):
        with T.serial(0, width // LANES) as vector:
            value = arriving[lanes(base + vector * LANES)]
            T.buffer_store(x, value, [lanes(slot * width + vector * LANES)])

    with T.serial(0, T.floordiv(count, group)) as first:
        load_rows(first * group, arriving, 0)
        with T.serial(0, group) as member:
            row, base = T.bind(first * group + member), T.bind(member * width)
            logit = T.bind(_dot(arriving, base, router, width) + bias)
            # Of equal logits the first expert wins, as in `jax.lax.top_k`.
            is_dense = T.bind(logit >= T.float32(0))
            with when(is_dense):
                slot = T.bind(taken[0])
                T.buffer_store(rows["dense"], row, [slot])
                T.buffer_store(gates["dense"], logit, [slot])
                copy(base, dense_x, slot)
                T.buffer_store(taken, slot + 1, [0])
            with otherwise(is_dense):
                slot = T.bind(taken[1])
                T.buffer_store(rows["shift"], row, [slot])
                T.buffer_store(gates["shift"], T.float32(0) - logit, [slot])
                if int8:
                    quantize_row(target, arriving, base, width, shift_x, slot * width, scale, slot)
                else:
                    copy(base, shift_x, slot)
                T.buffer_store(taken, slot + 1, [1])
    counts = [T.bind(taken[expert]) for expert in range(2)]
    for expert, expert_count in zip(("dense", "shift"), counts, strict=True):
        with T.serial(0, T.ceildiv(expert_count, LANES)) as vector:
            at = lanes(vector * LANES)
            T.buffer_store(gates[expert], sigmoid(gates[expert][at]), [at])

    def gated(expert):
        return lambda slot, column, value, lanes_: store(
            rows[expert][slot], column, value * splat(gates[expert][slot]), lanes_
        )

    _dense(target, linear, buffers, dense_x, counts[0], gated("dense"))
    if int8:
        _shift_int8(target, linear, buffers, shift_x, scale, counts[1], gated("shift"))
    else:
        _shift_float(target, linear, buffers, shift_x, counts[1], gated("shift"))


def _dot(x, base, y, size):
    total = local(LANES)
    T.buffer_store(total, constant(0), [lanes(0)])
    with T.serial(0, size // LANES) as vector:
        at = vector * LANES
        T.buffer_store(total, total[lanes(0)] + x[lanes(base + at)] * y[lanes(at)], [lanes(0)])
    return fold(total[lanes(0)], add)


def _for_each_panel(outputs: int, columns: int, body: Callable):
    """``body(first column, columns, columns of the last that count)`` for panels of whole vectors."""
    whole = outputs // columns
    if whole:
        with T.serial(0, whole) as panel:
            body(panel * columns, columns, lambda vector: LANES)
    rest = outputs - whole * columns
    if rest:
        body(whole * columns, round_up(rest, LANES), lambda vector: min(LANES, rest - vector * LANES))


def _dense(target, linear, buffers, x, count, store):
    def panel(first, columns, valid):
        def weights(k, vector):
            return buffers["kernel"][k, lanes(first + vector * LANES)]

        def finish(row, vector, sums):
            column = first + vector * LANES
            store(row, column, sums + buffers["bias"][lanes(column)], valid(vector))

        float_product(target, x, linear.width, count, weights, linear.inputs, columns, finish)

    _for_each_panel(linear.outputs, target.float_tile[1], panel)


def _shift_float(target, linear, buffers, x, count, store):
    decoded = scratch(round_up(linear.inputs, TILE_INPUTS) * target.float_tile[1])

    def panel(first, columns, valid):
        def weights(k, vector):
            return decoded[lanes(k * columns + vector * LANES)]

        def finish(row, vector, sums):
            column = first + vector * LANES
            store(row, column, sums + buffers["shift_bias"][lanes(column)], valid(vector))

        with when(count > 0):
            decode_float(linear, buffers, first, columns, decoded)
            float_product(target, x, linear.width, count, weights, linear.inputs, columns, finish)

    _for_each_panel(linear.outputs, target.float_tile[1], panel)


def _shift_int8(target, linear, buffers, whole, scale, count, store):
    inputs = round_up(linear.inputs, TILE_INPUTS)
    columns = target.int8_tile[1]
    if linear.shifts:
        decoded = [scratch(inputs * columns, "int32") for _ in range(3)]
    else:
        decoded, start, table = scratch(inputs * columns, "int8"), scratch(columns, "int32"), code_table()

    def panel(first, columns, valid):
        def finish(row, vector, sums):
            column = first + vector * LANES
            channel = power_of_two(T.Cast(f"int32x{LANES}", buffers["exponent"][lanes(column)]))
            value = T.Cast(f"float32x{LANES}", sums) * (channel * splat(scale[row]))
            store(row, column, value + buffers["shift_bias"][lanes(column)], valid(vector))

        with when(count > 0):
            if linear.shifts:
                decode_shifts(linear, buffers["codes"], first, columns, decoded)
                shift_product(target, whole, linear.width, count, decoded, linear.inputs, columns, finish)
            else:
                decode_int8(target, linear, buffers["codes"], first, columns, decoded, table)
                column_offsets(target, decoded, inputs, columns, start)
                int8_product(
                    target,
                    whole,
                    linear.width,
                    count,
                    decoded,
                    lambda vector: start[lanes(vector * LANES)],
                    inputs,
                    columns,
                    finish,
                )

    _for_each_panel(linear.outputs, columns, panel)
