"""A linear layer of any kind, for tiles of rows: multiplications, shifts, or a mixture of both.

The kernels that contain linear layers emit them from here: they say where rows come from and where results
go. Each thread decodes the weights that it multiplies into the form that the products read, for itself: to
fetch what another core has just written takes longer than to decode it again.
"""

import operator
from collections.abc import Callable, Sequence

from tvm.script.ir_builder import tirx as T

from kernels_tvm import amx
from kernels_tvm.bfloat16 import from_bfloat16
from kernels_tvm.decoding import decode_float, decode_int8, decode_shifts, power_of_two
from kernels_tvm.descriptions import LANES, Linear, round_up
from kernels_tvm.elementary import sigmoid
from kernels_tvm.emit import (
    Claims,
    RowTiles,
    accumulate_rows,
    lanes,
    local,
    row_lanes,
    scratch,
    splat,
    when,
)
from kernels_tvm.products import (
    FloatPanels,
    FloatRows,
    Int8Panels,
    Int8Rows,
    ShiftPanels,
    float_product,
    int8_product,
    shift_product,
)
from kernels_tvm.targets import Target

ROUTED_BYTES = 16 * 1024  # of rows that are routed together


class Layer:
    """A linear layer in a kernel.

    ``buffers`` are its parameters, by the names of `Linear.arguments`. To be made by each thread, for any
    number of `tile`: the first one decodes the weights, and if the layer is to ``keep`` them the others find
    them decoded. For one tile an image they are better not kept: a panel that is decoded where the last one
    was stays in the nearest cache. Where ``shares`` are given, `tile` computes some of the outputs: they are
    contexts that yield numbers of panels, one for each kind of weights.
    """

    def __init__(
        self, target: Target, linear: Linear, buffers: dict, keep: bool, shares: Sequence | None = None
    ):
        self.target, self.linear, self.buffers, self.keep = target, linear, buffers, keep
        shares = shares or [None] * len(linear.experts)
        self.experts = [self._expert(*each) for each in zip(linear.experts, shares, strict=True)]

    def _expert(self, kind, share):
        kinds = {"dense": _Dense, "shift": _ShiftFloat if self.linear.activations == "float" else _ShiftInt8}
        return kinds[kind](self.target, self.linear, self.buffers, self.keep, share)

    def tile(
        self,
        limit: int,
        count,
        load_rows: Callable,
        store: Callable,
        group: int = 1,
        place: Callable = lambda row: row,
    ) -> None:
        """Emit the layer for ``count`` rows, ``limit`` at most.

        ``load_rows(row, buffer, offset)`` writes ``group`` rows of the tile from ``row`` on, each
        `Linear.width` float32 numbers with zeros after the inputs; ``count`` must be a multiple of ``group``.
        ``store(place(row), column, value, count)`` takes ``count`` results of a row, from a column on;
        ``place`` is asked once for a row that is routed.
        """
        # The last block of a product reads as many rows as registers hold.
        capacity = limit + max(self.target.float_sums, self.target.int8_sums) // LANES
        rows = [expert.rows(capacity) for expert in self.experts]
        if len(self.experts) == 2:
            counts, stores = self._route(rows, capacity, count, load_rows, store, group, place)
        else:
            self._load(rows[0], count, load_rows, group)
            counts = [count]
            stores = [lambda row, column, value, lanes_: store(place(row), column, value, lanes_)]
        for expert, rows_, count_, store_ in zip(self.experts, rows, counts, stores, strict=True):
            with when(count_ > 0):
                if self.target.dot == "amx":
                    amx.begin(count_)
                expert.multiply(rows_, count_, store_)
        if self.target.dot == "amx":
            amx.end()

    def _load(self, rows, count, load_rows, group):
        """All rows to the only expert, without a copy where they lie there as they arrive."""
        width = self.linear.width
        if rows.plain:
            with T.serial(0, T.floordiv(count, group)) as first:
                load_rows(T.bind(first * group), rows.parts[0], T.bind(first * (group * width)))
            return
        arriving = scratch(group * width)
        with T.serial(0, T.floordiv(count, group)) as first:
            load_rows(first * group, arriving, 0)
            with T.serial(0, group) as member:
                rows.put(arriving, member * width, first * group + member)

    def _route(self, expert_rows, capacity, count, load_rows, store, group, place):
        """Sort rows by expert as they arrive, so that each expert sees its own, one after the other.

        What a router chooses can't be foreseen, and a CPU that foresees the wrong branch starts again. So
        the choices of some rows together become two queues, without a branch.
        """
        width, slots = self.linear.width, round_up(capacity, LANES)
        router, bias = self._router()
        places, gates = ([scratch(slots, dtype) for _ in range(2)] for dtype in ("int32", "float32"))
        together = group * max(1, ROUTED_BYTES // (group * self.linear.row_bytes))
        arriving, logits = scratch(together * width), scratch(together + row_lanes(group))
        queues = [scratch(together, "int32") for _ in range(2)]
        taken, queued = local(2, "int32"), local(2, "int32")
        for expert in range(2):
            T.buffer_store(taken, T.int32(0), [expert])

        with T.serial(0, T.ceildiv(count, together)) as turn:
            first = T.bind(turn * together)
            present = T.bind(T.min(count - first, together))
            with T.serial(0, T.floordiv(present, group)) as part:
                start = T.bind(part * group)
                load_rows(T.bind(first + start), arriving, T.bind(start * width))
                products = _dot_rows(group, arriving, T.bind(start * width), router, width)
                at = lanes(start, row_lanes(group))
                T.buffer_store(logits, products + splat(bias, row_lanes(group)), [at])
            for expert in range(2):
                T.buffer_store(queued, T.int32(0), [expert])
            with T.serial(0, present) as member:
                # Of equal logits the first expert wins, as in `jax.lax.top_k`.
                is_dense = T.bind(T.Cast("int32", logits[member] >= T.float32(0)))
                for expert, chosen in enumerate((is_dense, 1 - is_dense)):
                    T.buffer_store(queues[expert], member, [queued[expert]])
                    T.buffer_store(queued, queued[expert] + chosen, [expert])
            for expert, sign in enumerate((1, -1)):
                with T.serial(0, queued[expert]) as number:
                    member, slot = T.bind(queues[expert][number]), T.bind(taken[expert] + number)
                    T.buffer_store(places[expert], place(T.bind(first + member)), [slot])
                    T.buffer_store(gates[expert], T.float32(sign) * logits[member], [slot])
                    expert_rows[expert].put(arriving, T.bind(member * width), slot)
                T.buffer_store(taken, taken[expert] + queued[expert], [expert])
        counts = [T.bind(taken[expert]) for expert in range(2)]
        for expert in range(2):
            with T.serial(0, T.ceildiv(counts[expert], LANES)) as vector:
                at = lanes(vector * LANES)
                T.buffer_store(gates[expert], sigmoid(gates[expert][at]), [at])

        def gated(expert):
            return lambda slot, column, value, lanes_: store(
                places[expert][slot], column, value * splat(gates[expert][slot]), lanes_
            )

        return counts, [gated(expert) for expert in range(2)]

    def _router(self):
        """Weights and bias of the first logit less the second."""
        weights, kernel = scratch(self.linear.width), self.buffers["router_kernel"]
        for column in range(self.linear.inputs, self.linear.width):
            T.buffer_store(weights, T.float32(0), [column])
        with T.serial(0, self.linear.inputs) as k:
            T.buffer_store(weights, kernel[k, 0] - kernel[k, 1], [k])
        return weights, T.bind(self.buffers["router_bias"][0] - self.buffers["router_bias"][1])


def few_rows(rows, linear: Linear):
    """Whether `by_columns` suits a layer better than tiles of rows, where each thread decodes all weights."""
    return rows < min(linear.inputs, linear.outputs)


def by_columns(
    target: Target,
    threads: int,
    linear: Linear,
    buffers: dict,
    limit: int,
    count,
    load_rows: Callable,
    store: Callable,
    group: int = 1,
) -> None:
    """Emit a layer, as `Layer.tile` does, whose outputs are cut among the threads.

    Every thread loads all rows, and decodes panel after panel of the weights that it claims in its cache.
    """
    panels = -(-linear.outputs // min(target.float_tile[1], target.int8_tile[1]))  # of an expert, at most
    claims = [Claims(target, panels, threads) for _ in linear.experts]
    with T.parallel(0, threads) as thread:
        shares = [claim.of(thread) for claim in claims]
        layer = Layer(target, linear, buffers, keep=False, shares=shares)
        layer.tile(limit, count, load_rows, store, group)


def apply_layer(
    target: Target,
    threads: int,
    linear: Linear,
    buffers: dict,
    rows,
    load_rows: Callable,
    store: Callable,
    few: bool,
    group: int = 1,
) -> None:
    """Emit a layer for ``rows`` rows, by columns if they are ``few``; the rest as of `Layer.tile`."""

    def callbacks(start):
        return (
            lambda row, buffer, offset: load_rows(T.bind(start + row), buffer, offset),
            lambda row, column, value, count: store(T.bind(start + row), column, value, count),
        )

    if few:
        limit = max(1, target.strip_bytes // (group * linear.row_bytes)) * group
        with T.serial(0, T.ceildiv(rows, limit)) as turn:
            start = T.bind(turn * limit)
            count = T.bind(T.min(limit, rows - start))
            by_columns(target, threads, linear, buffers, limit, count, *callbacks(start), group)
        return
    tiles = RowTiles(rows, linear.row_bytes, threads, group)
    claims = Claims(target, tiles.count, threads)
    with T.parallel(0, threads) as thread:
        layer = Layer(target, linear, buffers, keep=True)
        with claims.of(thread) as tile:
            start, count = tiles[tile]
            layer.tile(tiles.limit, count, *callbacks(start), group)


def _dot_rows(rows: int, x, base, y, size):
    """The products of rows of ``x`` with ``y``, as a vector of `accumulate_rows`."""

    def product(row, vector):
        return x[lanes(base + row * size + vector * LANES)] * y[lanes(vector * LANES)]

    return accumulate_rows(rows, size // LANES, product, operator.add)


def _for_each_panel(panels, share, body: Callable) -> None:
    """``body(panel, columns)`` for each panel of a share, what yields their numbers, or for all.

    The number of the panel that is not whole is known at compile time.
    """
    with share or T.serial(0, panels.count) as panel:
        if panels.whole:
            with when(panel < panels.whole):
                body(panel, panels.columns)
        if panels.rest:
            with when(panel == panels.whole):
                body(panels.whole, panels.rest)


class _Expert:
    """What the kinds of weights share: ``panels``, each decoded right before it is multiplied."""

    def __init__(self, target, linear, buffers, share, panels):
        self.target, self.linear, self.buffers = target, linear, buffers
        self.share, self.panels = share, panels
        self.decoded = local(1, "int32")
        T.buffer_store(self.decoded, T.int32(0), [0])

    def multiply(self, rows, count, store):
        """``store`` takes the results of ``count`` rows, see `Layer.tile`."""

        def multiply(panel, columns):
            first = panel * self.panels.columns
            if self.panels.needed:
                with when(self.decoded[0] == 0):
                    self.prepare(panel, columns)

            def finish(row, vector, sums):
                column = first + vector * LANES
                valid = min(LANES, self.linear.outputs - column) if isinstance(panel, int) else LANES
                store(row, column, self.result(rows, row, column, sums), valid)

            self.product(rows, count, panel, columns, finish)

        _for_each_panel(self.panels, self.share, multiply)
        if self.panels.kept:
            T.buffer_store(self.decoded, T.int32(1), [0])


class _Dense(_Expert):
    def __init__(self, target, linear, buffers, keep, share, packed=False):
        given = None if packed else self.weights
        self.rounded = linear.precision == "bfloat16" and not packed
        # A power of two is a bfloat16 number.
        exact = packed or self.rounded
        panels = FloatPanels(target, linear.inputs, linear.outputs, keep, exact, given)
        super().__init__(target, linear, buffers, share, panels)

    def weights(self, first):
        def load(k, vector):
            weights = self.buffers["blocks"][T.floordiv(first, LANES) + vector, k, lanes(0)]
            return from_bfloat16(weights) if self.rounded else weights

        return load

    def prepare(self, panel, columns):
        self.panels.write(panel, columns, self.weights(panel * self.panels.columns))

    def rows(self, capacity):
        return FloatRows(self.target, capacity, self.linear.width, self.rounded)

    def product(self, rows, count, panel, columns, finish):
        float_product(self.target, rows, count, self.panels, panel, columns, finish)

    def result(self, rows, row, column, sums):
        return sums + self.buffers["bias"][lanes(column)]


class _ShiftFloat(_Dense):
    def __init__(self, target, linear, buffers, keep, share):
        buffers = buffers | {"bias": buffers["shift_bias"]}
        super().__init__(target, linear, buffers, keep, share, packed=True)

    def prepare(self, panel, columns):
        decoded = scratch(round_up(self.linear.inputs, 4) * columns)
        decode_float(self.linear, self.buffers, panel * self.panels.columns, columns, decoded)
        self.panels.write(panel, columns, lambda k, vector: decoded[lanes(k * columns + vector * LANES)])


class _ShiftInt8(_Expert):
    def __init__(self, target, linear, buffers, keep, share):
        panels = ShiftPanels if linear.shifts else Int8Panels
        panels = panels(target, linear.inputs, linear.outputs, keep)
        super().__init__(target, linear, buffers, share, panels)
        self.scales = scratch(round_up(linear.outputs, LANES))  # 2^exponent of each output

    def prepare(self, panel, columns):
        first = panel * self.panels.columns
        for vector in range(columns // LANES):
            at = lanes(first + vector * LANES)
            exponent = T.Cast(f"int32x{LANES}", self.buffers["exponent"][at])
            T.buffer_store(self.scales, power_of_two(exponent), [at])
        if self.linear.shifts:
            decode_shifts(self.linear, self.buffers["codes"], first, columns, self.panels, panel)
        else:
            decode_int8(self.target, self.linear, self.buffers["codes"], first, columns, self.panels, panel)
            self.panels.sum_columns(panel, columns)

    def rows(self, capacity):
        return Int8Rows(self.target, capacity, self.linear.width)

    def product(self, rows, count, panel, columns, finish):
        product = shift_product if self.linear.shifts else int8_product
        product(self.target, rows, count, self.panels, panel, columns, finish)

    def result(self, rows, row, column, sums):
        at = lanes(column)
        scale = self.scales[at] * splat(rows.scale[row])
        return T.Cast(f"float32x{LANES}", sums) * scale + self.buffers["shift_bias"][at]
