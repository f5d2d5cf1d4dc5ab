"""Pieces of CPU kernels: vectors, reductions, tiles of rows, the sharing of work among threads.

Kernels are Python functions that emit TVM's TIR through its IRBuilder. A Python loop unrolls; a loop of
`T.serial` or `T.parallel` stays a loop. Vectors have 16 lanes on every target: LLVM cuts them into the
target's registers, and the tiles of `kernels_tvm.cpu.targets` are small enough to stay there.
"""

import functools
import itertools
from collections.abc import Callable, Generator, Sequence
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
    """A small buffer, which becomes registers if its indices are known at compile time."""
    return T.alloc_buffer((size,), dtype, scope="local")


def opaque(value, dtype: str = "int32", count: int = 1):
    """A number, or a vector of ``count`` lanes, that TVM's simplifier does not replace by its expression.

    The simplifier puts a variable's expression in the place of each use. A chain of variables, each made of
    the last one, would become an expression of exponential size.
    """
    place = local(count, dtype)
    at = lanes(0, count) if count > 1 else 0
    T.buffer_store(place, value, [at])
    return T.bind(place[at])


def scratch(size: int, dtype: str = "float32"):
    """A buffer in memory that the thread of the enclosing iteration has for itself."""
    return T.alloc_buffer((size,), dtype, scope="global")


def fold(vector, combine: Callable, dtype: str = "float32", count: int = LANES):
    """The scalar that ``combine`` makes of all lanes, half by half; ``count`` is a power of two."""
    buffer = local(count, dtype)
    T.buffer_store(buffer, vector, [lanes(0, count)])
    while count > 2:
        count //= 2
        halves = buffer[lanes(0, count)], buffer[lanes(count, count)]
        T.buffer_store(buffer, combine(*halves), [lanes(0, count)])
    return T.bind(combine(buffer[0], buffer[1]))


def fold_rows(vectors: Sequence, combine: Callable, dtype: str = "float32", count: int = LANES):
    """A vector whose lane r is what ``combine`` makes of all ``count`` lanes of ``vectors[r]``.

    The result has `row_lanes` lanes. Each step merges two vectors into one with half as many partial results
    of each, so a row takes a few instructions instead of a fold of its own.
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
    """Lanes of a vector that has a number for each of ``rows``: a power of two."""
    return max(2, 1 << (rows - 1).bit_length())


def _merge(first, second, width: int, count: int, combine: Callable):
    """Two vectors merged into one with ``width`` lanes for each row, and the order of the rows in it."""
    starts = range(0, 2 * count, 2 * width)
    if width < 4:
        # Numbers stay in their quarter of a register: shuffles within quarters are faster.
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


ACCUMULATORS = 4  # at once, since each addition waits for the last one of its accumulator


def accumulate_rows(rows: int, count: int, load: Callable, combine: Callable, dtype: str = "float32"):
    """`fold_rows` of each row's ``load(row, 0)``, ..., ``load(row, count - 1)`` combined, starting from 0."""
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
    """A vector of ``count`` truth values (8 or 16) as an unsigned number; lane 0 is its lowest bit."""
    # LLVM has one bit for a truth value, but the check in TVM's `reinterpret` counts more.
    return tirx.call_intrin(f"uint{count}", "tirx.reinterpret", mask)


def split(index, size: int):
    """Which part of ``size`` elements an index is in, and its place there: quotient and remainder."""
    return T.bind(T.floordiv(index, size)), T.bind(T.floormod(index, size))


@contextmanager
def turns(images, at_once: int) -> Generator[tuple]:
    """A context that runs for ``at_once`` images at a time; yields the first one's number and their count."""
    with T.serial(0, T.ceildiv(images, at_once)) as turn:
        first = T.bind(turn * at_once)
        yield first, T.bind(T.min(images - first, at_once))


class RowTiles:
    """Rows cut into tiles of about equal size; the number of tiles is a multiple of the threads.

    The number of rows is known at run time. It and the sizes of tiles are multiples of ``group``.

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


CLAIMS = 32  # for each thread, at most: more would let work move from slow to fast threads in finer pieces


class Claims:
    """The numbers below ``count``, each for the thread that claims it first.

    The object is made outside of the parallel loop. Cores differ in speed, and some come late from other
    work, so equal shares would keep the fast ones waiting. Each thread starts with its own share, from the
    lowest number up, since neighbouring numbers use data in common that its cache then holds. After its share
    it takes numbers that others have left, from the ends of their shares, so the owner's rest is still a run
    of neighbours.

    `lock bts` reads a bit and sets it at once, so only one thread finds it unset. Memory needs no other
    order: the loop begins after all earlier writes, and its own writes are visible when it has ended. The
    work of a number must not read what the work of another number writes.

    LLVM has such an intrinsic for x86 only; on other machines each thread works on its own share.
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
    def of(self, thread) -> Generator:
        """A context that runs for each number that ``thread`` claims; yields the number."""
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
        # A plain read first: the locked instruction would take the line from another core's cache.
        with when(self.taken[claim] == 0):
            address = T.address_of(self.taken[claim])
            taken = T.bind(T.call_llvm_intrin("int32", "llvm.x86.atomic.bts.i32", address, T.int8(0)))
            with when(taken == 0):
                yield


def for_each_row(target: Target, rows, row_bytes: int, threads: int, body: Callable):
    """Emit ``body(row)`` for all rows, whose number is known at run time, on all threads."""
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
    """Write the first ``count`` lanes of ``value`` to the last axis of ``buffer``."""
    if count == LANES:
        T.buffer_store(buffer, value, [*index, lanes(column)])
        return
    part = local(LANES, buffer.dtype)
    T.buffer_store(part, value, [lanes(0)])
    for lane in range(count):
        T.buffer_store(buffer, part[lane], [*index, column + lane])


def for_each_vector(size: int, body: Callable):
    """Emit ``body(column, count)`` for each vector of an axis of ``size``; the last may have fewer lanes."""
    if size >= LANES:
        with T.serial(0, size // LANES) as vector:
            body(vector * LANES, LANES)
    if size % LANES:
        body(size - size % LANES, size % LANES)
