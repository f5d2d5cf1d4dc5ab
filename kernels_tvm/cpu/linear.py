"""Linear layers of every kind: dense, shift, or a mixture of both.

All CPU kernels emit their linear layers with these functions, and say where rows come from and where results
go. Each thread decodes the weights that it multiplies for itself: fetching them from another core, which has
just written them, takes longer.
"""

import operator
from collections.abc import Callable, Sequence

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu import amx
from kernels_tvm.cpu.elementary import sigmoid
from kernels_tvm.cpu.emit import (
    Claims,
    RowTiles,
    accumulate_rows,
    for_each_vector,
    lanes,
    load_lanes,
    local,
    row_lanes,
    scratch,
    splat,
    store_lanes,
)
from kernels_tvm.cpu.experts import DenseExpert, FloatShiftExpert, Int8Expert, Int8ShiftExpert, ShiftedExpert
from kernels_tvm.cpu.targets import Target, without_matrices
from kernels_tvm.descriptions import LANES, LinearDescription, round_up
from kernels_tvm.emit import Arguments, kernel, otherwise, when

ROUTED_BYTES = 16 * 1024  # of rows that are routed together


VECTOR_ROWS = 12  # at most, for which vectors are faster than laying the weights out for matrix registers


def linear_kernel(target: Target, threads: int, linear: LinearDescription):
    """``y = linear(x)``: x [rows, inputs] float32, the parameters, y [rows, outputs] float32."""

    def body(arguments: Arguments):
        x = arguments("x", ("rows", linear.inputs), "float32")
        buffers = arguments.parameters(linear)
        y = arguments("y", ("rows", linear.outputs), "float32")

        def load_row(row, buffer, offset):
            _copy_row(x, row, linear.inputs, buffer, offset)

        multiply_rows(target, threads, linear, buffers, arguments.symbols["rows"], load_row, y)

    return kernel(body)


def multiply_rows(
    target: Target, threads: int, linear: LinearDescription, buffers: dict, rows, load_row: Callable, y
) -> None:
    """Emit a layer whose results are the rows of ``y``, for any number of ``rows`` at run time.

    ``load_row`` is the ``load_rows`` of `ThreadLayer.tile`, for one row.
    """

    def store(row, column, value, lanes_):
        store_lanes(y, value, [row], column, lanes_)

    def apply(target, few):
        apply_layer(target, threads, linear, buffers, rows, load_row, store, few)

    few = T.bind(few_rows(rows, linear))
    with when(few):
        if target.dot == "amx":
            with when(rows <= VECTOR_ROWS):
                apply(without_matrices(target), True)
            with otherwise(rows <= VECTOR_ROWS):
                apply(target, True)
        else:
            apply(target, True)
    with otherwise(few):
        apply(target, False)


def _copy_row(x, row, channels: int, buffer, offset) -> None:
    """Copy a row of ``x`` to scratch memory, with zeros up to the next whole vector."""

    def copy(column, count):
        T.buffer_store(buffer, load_lanes(x, [row], column, count), [lanes(offset + column)])

    for_each_vector(channels, copy)


def few_rows(rows, linear: LinearDescription):
    """Whether the outputs rather than the rows of a layer are cut among threads, see `by_columns`.

    With few rows, decoding takes most of the time, and threads that share the rows each decode all weights.
    """
    return rows < min(linear.inputs, linear.outputs)


def apply_layer(
    target: Target,
    threads: int,
    linear: LinearDescription,
    buffers: dict,
    rows,
    load_rows: Callable,
    store: Callable,
    few: bool,
    group: int = 1,
) -> None:
    """Emit a layer for ``rows`` rows on all threads, `by_columns` if they are ``few``.

    ``load_rows``, ``store`` and ``group`` are those of `ThreadLayer.tile`.
    """

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
        layer = ThreadLayer(target, linear, buffers, keep=True)
        with claims.of(thread) as tile:
            start, count = tiles[tile]
            layer.tile(tiles.limit, count, *callbacks(start), group)


def by_columns(
    target: Target,
    threads: int,
    linear: LinearDescription,
    buffers: dict,
    limit: int,
    count,
    load_rows: Callable,
    store: Callable,
    group: int = 1,
) -> None:
    """Emit a layer, as `ThreadLayer.tile` does, whose outputs are cut among the threads.

    Every thread loads all rows, and decodes the panels of weights that it claims, one after the other.
    """
    panels = -(-linear.outputs // min(target.float_tile[1], target.int8_tile[1]))  # of an expert, at most
    claims = [Claims(target, panels, threads) for _ in linear.experts]
    with T.parallel(0, threads) as thread:
        shares = [claim.of(thread) for claim in claims]
        layer = ThreadLayer(target, linear, buffers, keep=False, shares=shares)
        layer.tile(limit, count, load_rows, store, group)


class ThreadLayer:
    """A linear layer of one thread, for any number of tiles of rows.

    The first `tile` decodes the weights. With ``keep`` the next ones find them decoded; without it each panel
    is decoded where the last one was, in the nearest cache, which is faster for a single tile an image.

    Args:
      target: the CPU.
      linear: what the layer computes.
      buffers: its parameters, by the names of `LinearDescription.arguments`.
      keep: whether decoded weights are kept from tile to tile.
      shares: for each kind of weights a context that yields the numbers of the panels to compute; by default
        all are computed.
    """

    def __init__(
        self,
        target: Target,
        linear: LinearDescription,
        buffers: dict,
        keep: bool,
        shares: Sequence | None = None,
    ):
        self.target, self.linear, self.buffers, self.keep = target, linear, buffers, keep
        shares = shares or [None] * len(linear.experts)
        self.experts = [self._expert(*each) for each in zip(linear.experts, shares, strict=True)]

    def _expert(self, kind, share):
        linear = self.linear
        if kind == "dense":
            expert = Int8Expert if linear.precision == "int8" else DenseExpert
        elif linear.activations == "float":
            expert = FloatShiftExpert
        else:
            expert = ShiftedExpert if linear.shifts else Int8ShiftExpert
        return expert(self.target, linear, self.buffers, self.keep, share)

    def tile(
        self,
        limit: int,
        count,
        load_rows: Callable,
        store: Callable,
        group: int = 1,
        place: Callable = lambda row: row,
    ) -> None:
        """Emit the layer for a tile of rows.

        Args:
          limit: rows at most, known at compile time.
          count: rows, a multiple of ``group``.
          load_rows: ``load_rows(row, buffer, offset)`` writes ``group`` rows of the tile from ``row`` on,
            each of `LinearDescription.width` float32 numbers with zeros after the inputs.
          store: ``store(place(row), column, value, count)`` takes ``count`` results of a row, from a column
            on.
          group: rows that are loaded together.
          place: what ``store`` gets for a row; in a mixture it is computed once for each row.
        """
        # The last block of a product reads past the last row, up to as many rows as registers hold.
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
        """Give all rows to the only expert, without a copy if it takes them as they arrive."""
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
        """Sort rows by expert as they arrive, so that each expert's rows lie one after the other.

        A CPU can't predict a router's choices, and each wrong prediction of a branch costs time. So the rows
        that are routed together are put into two queues without a branch.
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
        """The weights and the bias of the first logit minus the second."""
        weights, kernel = scratch(self.linear.width), self.buffers["router_kernel"]
        for column in range(self.linear.inputs, self.linear.width):
            T.buffer_store(weights, T.float32(0), [column])
        with T.serial(0, self.linear.inputs) as k:
            T.buffer_store(weights, kernel[k, 0] - kernel[k, 1], [k])
        return weights, T.bind(self.buffers["router_bias"][0] - self.buffers["router_bias"][1])


def _dot_rows(rows: int, x, base, y, size):
    """The dot products of rows of ``x`` with ``y``, as a vector of `accumulate_rows`."""

    def product(row, vector):
        return x[lanes(base + row * size + vector * LANES)] * y[lanes(vector * LANES)]

    return accumulate_rows(rows, size // LANES, product, operator.add)
