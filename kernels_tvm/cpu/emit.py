"""Pieces that kernels are written with: vectors, reductions, tiles of rows.

Kernels are Python functions that emit TVM's TIR through its IRBuilder. A Python loop unrolls; a loop of
`T.serial` or `T.parallel` stays one. Vectors have 16 lanes on every target: LLVM cuts them into the
registers that there are, and the tiles in `kernels_tvm.cpu.targets` keep what is cut in registers.
"""

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.targets import Target
from kernels_tvm.cpu.tiles import rows_at_once
from kernels_tvm.descriptions import LANES, round_up
from kernels_tvm.emit import when


def lanes(base, count: int = LANES):
    """The indices base, base + 1, ..."""
    return T.ramp(base, 1, count)


def splat(value, count: int = LANES):
    """``value`` in every lane."""
    return T.broadcast(value, count)


def constant(value: float, count: int = LANES):
    """A float32 constant in every lane."""
    return T.broadcast(T.float32(float(value)), count)


def local(size: int, dtype: str = "float32"):
    """A small buffer that ends up in registers where its indices are known at compile time."""
    return T.alloc_buffer((size,), dtype, scope="local")


def opaque(value, dtype: str = "int32", count: int = 1):
    """A number, or a vector of ``count`` lanes, that TVM does not look into.

    Its simplifier puts what a variable is bound to in the place of each use; of numbers that follow from each
    other that makes expressions without end.
    """
    place = local(count, dtype)
    at = lanes(0, count) if count > 1 else 0
    T.buffer_store(place, value, [at])
    return T.bind(place[at])


def scratch(size: int, dtype: str = "float32"):
    """A buffer of the thread that runs the enclosing iteration."""
    return T.alloc_buffer((size,), dtype, scope="global")


def fold(vector, combine: Callable, dtype: str = "float32", count: int = LANES):
    """The scalar that ``combine`` makes of all lanes, whose number is a power of two, by halves."""
    buffer = local(count, dtype)
    T.buffer_store(buffer, vector, [lanes(0, count)])
    while count > 2:
        count //= 2
        halves = buffer[lanes(0, count)], buffer[lanes(count, count)]
        T.buffer_store(buffer, combine(*halves), [lanes(0, count)])
    return T.bind(combine(buffer[0], buffer[1]))


def fold_rows(vectors: Sequence, combine: Callable, dtype: str = "float32", count: int = LANES):
    """A vector whose lane r is what ``combine`` makes of all ``count`` lanes of ``vectors[r]``.

    It has `row_lanes` lanes. Two vectors become one that has half as many partial results of each, and so on,
    so that a row takes a few instructions instead of a fold of its own.
    """
    size = row_lanes(len(vectors))
    padding = size - len(vectors)
    held = [(opaque(vector, dtype, count), [row]) for row, vector in enumerate(vectors)]
    held += held[-1:] * padding
    width = count  # lanes that a vector has for each of its rows
    while len(held) > 1:
        width //= 2
        pairs = zip(held[::2], held[1::2], strict=True)
        held = [_merge(first, second, width, count, combine) for first, second in pairs]
    ((total, rows),) = held
    while width > 1:
        width //= 2
        total = T.bind(combine(total, T.Shuffle([total], [lane ^ width for lane in range(count)])))
    lanes_ = [rows.index(row) * (count // size) for row in range(len(vectors))]
    return opaque(T.Shuffle([total], lanes_ + [0] * padding), dtype, size)


def row_lanes(rows: int) -> int:
    """Lanes of a vector with a number of each of ``rows``: a power of two."""
    return max(2, 1 << (rows - 1).bit_length())


def _merge(first, second, width: int, count: int, combine: Callable):
    """Of two vectors and their rows, one with ``width`` lanes for each row, and the order of these."""
    starts = range(0, 2 * count, 2 * width)
    if width < 4:
        # Numbers stay in their quarter of a register, within which shuffles are faster.
        starts = [
            start
            for quarter in range(0, count, 4)
            for base in (quarter, count + quarter)
            for start in range(base, base + 4, 2 * width)
        ]
    (a, rows_of_a), (b, rows_of_b) = first, second
    halves = [[start + at + lane for start in starts for lane in range(width)] for at in (0, width)]
    total = T.bind(combine(*(T.Shuffle([a, b], indices) for indices in halves)))
    return total, [(rows_of_a + rows_of_b)[start // (2 * width)] for start in starts]


ACCUMULATORS = 4  # at once: each waits for its last addition


def accumulate_rows(rows: int, count: int, load: Callable, combine: Callable, dtype: str = "float32"):
    """A vector as of `fold_rows` for ``load(row, 0)``, ... ``load(row, count - 1)``, starting from 0."""
    chains = max(number for number in range(1, max(1, ACCUMULATORS // rows) + 1) if count % number == 0)
    totals = local(rows * chains * LANES, dtype)

    def at(row, chain):
        return lanes((row * chains + chain) * LANES)

    each = list(itertools.product(range(rows), range(chains)))
    for row, chain in each:
        T.buffer_store(totals, splat(getattr(T, dtype)(0)), [at(row, chain)])
    with T.serial(0, count // chains) as block:
        for row, chain in each:
            value = combine(totals[at(row, chain)], load(row, block * chains + chain))
            T.buffer_store(totals, value, [at(row, chain)])
    vectors = [
        functools.reduce(combine, [totals[at(row, chain)] for chain in range(chains)]) for row in range(rows)
    ]
    return fold_rows(vectors, combine, dtype)


def element(vector, lane: int):
    """The number in a lane of a vector."""
    return T.Shuffle([vector], [lane])


def bits_of(mask, count: int):
    """An unsigned number of ``count`` bits (8 or 16): lane 0 of a vector of truth values is the lowest."""
    # To LLVM a truth value is one bit; TVM's `reinterpret` has a check that counts it as more.
    return tirx.call_intrin(f"uint{count}", "tirx.reinterpret", mask)


def split(index, size: int):
    """Quotient and remainder: which part of ``size`` an index is in, and where in it."""
    return T.bind(T.floordiv(index, size)), T.bind(T.floormod(index, size))


@contextmanager
def turns(images, at_once: int) -> Iterator[tuple]:
    """What is inside runs for some images at a time: the number of the first one, and how many they are."""
    with T.serial(0, T.ceildiv(images, at_once)) as turn:
        first = T.bind(turn * at_once)
        yield first, T.bind(T.min(images - first, at_once))


class RowTiles:
    """A number of rows known at run time, cut into tiles of about equal size, as many as threads divide.

    Rows and the sizes of tiles are multiples of ``group``.

    Attributes:
      count: how many tiles there are; some may be empty.
      limit: rows that a tile has at most, known at compile time.
    """

    def __init__(self, rows, row_bytes: int, threads: int, group: int = 1):
        self.rows, self.limit = rows, round_up(rows_at_once(row_bytes), group)
        per_thread = T.ceildiv(T.ceildiv(rows, self.limit), threads)
        self.count = T.bind(T.max(per_thread, 1) * threads)
        self.size = T.bind(T.ceildiv(T.ceildiv(rows, self.count), group) * group)

    def __getitem__(self, tile):
        """The first row of a tile and how many it has."""
        start = T.bind(tile * self.size)
        return start, T.bind(T.max(T.min(self.size, self.rows - start), 0))


CLAIMS = 32  # for each thread, at most: how finely work can move from a slow thread to a fast one


class Claims:
    """The numbers below ``count``, each for the thread that claims it first.

    To be made outside of the parallel loop, which ends with its last thread. Cores are neither equally fast
    nor free at the same time: one works for other programs, or comes late from other work. Here each thread
    starts with a share of its own, upwards, since neighbouring numbers have data in common that its cache
    then holds. When it is through, it takes what others have left, from the ends of their shares: what an
    owner keeps is still a run of neighbours.

    `lock bts` reads a bit and sets it at once, so of any number of threads one finds it unset. More order
    isn't needed: the loop begins after what was written before it, and what is written in it can be seen
    when it has ended. Within the loop, the work of a number must not read what that of another one writes.

    LLVM has such an intrinsic for x86 alone; elsewhere each thread works on its own share.
    """

    def __init__(self, target: Target, count, threads: int):
        limit = CLAIMS * threads
        if isinstance(count, int):
            limit = min(count, limit)
        self.count, self.threads = count, threads
        self.turns = threads if target.claims else 1
        self.run = T.bind(T.ceildiv(count, limit))  # numbers that are claimed at once
        self.claims = T.bind(T.ceildiv(count, T.max(self.run, 1)))
        self.share = T.bind(T.ceildiv(self.claims, threads))
        if self.turns > 1:
            self.taken = scratch(limit, "int32")
            with T.serial(0, limit) as claim:
                T.buffer_store(self.taken, T.int32(0), [claim])

    @contextmanager
    def of(self, thread) -> Iterator:
        """What is inside runs for each number that ``thread`` claims."""
        with T.serial(0, self.turns) as turn:
            first = T.bind(T.floormod(thread + turn, self.threads) * self.share)
            size = T.bind(T.max(T.min(self.claims - first, self.share), 0))
            with T.serial(0, size) as step:
                claim = T.bind(first + T.Select(turn == 0, step, size - 1 - step))
                with self._taking(claim):
                    start = T.bind(claim * self.run)
                    with T.serial(0, T.min(self.run, self.count - start)) as member:
                        yield opaque(start + member)

    @contextmanager
    def _taking(self, claim):
        if self.turns == 1:
            yield
            return
        # Looking first is cheap: a locked instruction takes the claim from the cache of who has it.
        with when(self.taken[claim] == 0):
            address = T.address_of(self.taken[claim])
            taken = T.bind(T.call_llvm_intrin("int32", "llvm.x86.atomic.bts.i32", address, T.int8(0)))
            with when(taken == 0):
                yield


def for_each_row(target: Target, rows, row_bytes: int, threads: int, body: Callable):
    """``body(row)`` for a number of rows known at run time, on all threads."""
    tiles = RowTiles(rows, row_bytes, threads)
    claims = Claims(target, tiles.count, threads)
    with T.parallel(0, threads) as thread, claims.of(thread) as tile:
        start, count = tiles[tile]
        with T.serial(0, count) as row:
            body(T.bind(start + row))


def load_lanes(buffer, index: list, column, count: int = LANES):
    """A vector from the last axis of ``buffer``; lanes past ``count`` are 0."""
    if count == LANES:
        return buffer[(*index, lanes(column))]
    part = local(LANES, buffer.dtype)
    T.buffer_store(part, splat(getattr(T, buffer.dtype)(0)), [lanes(0)])
    for lane in range(count):
        T.buffer_store(part, buffer[(*index, column + lane)], [lane])
    return part[lanes(0)]


def store_lanes(buffer, value, index: list, column, count: int = LANES):
    """The first ``count`` lanes of ``value`` to the last axis of ``buffer``."""
    if count == LANES:
        T.buffer_store(buffer, value, [*index, lanes(column)])
        return
    part = local(LANES, buffer.dtype)
    T.buffer_store(part, value, [lanes(0)])
    for lane in range(count):
        T.buffer_store(buffer, part[lane], [*index, column + lane])


def for_each_vector(size: int, body: Callable):
    """``body(column, count)`` for each vector of an axis of ``size``; the last may have fewer lanes."""
    if size >= LANES:
        with T.serial(0, size // LANES) as vector:
            body(vector * LANES, LANES)
    if size % LANES:
        body(size - size % LANES, size % LANES)
