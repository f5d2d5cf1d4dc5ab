"""Pieces that kernels are written with: vectors, reductions, elementary functions, tiles of rows.

Kernels are Python functions that emit TVM's TIR through its IRBuilder. A Python loop unrolls; a loop of
`T.serial` or `T.parallel` stays one. Vectors have 16 lanes on every target: LLVM cuts them into the
registers that there are, and the tiles in `kernels_tvm.targets` keep what is cut in registers.
"""

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import numpy as np
from tvm import tirx
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from kernels_tvm.descriptions import CACHE_BYTES, LANES
from kernels_tvm.targets import Target


class Arguments:
    """The buffers of a kernel, in the order in which it declares them."""

    def __init__(self):
        self.symbols = {}

    def __call__(self, name: str, shape: tuple[int | str, ...], dtype: str):
        """A buffer; a string in ``shape`` is a size known only at run time, equal wherever it stands."""
        sizes = []
        handle = T.arg(name, T.handle())
        for size in shape:
            if isinstance(size, str):
                size = self.symbols.setdefault(size, T.int32())
            sizes.append(size)
        return T.match_buffer(handle, tuple(sizes), dtype)


def kernel(body: Callable[[Arguments], None]):
    """The TIR function ``main`` that ``body`` emits."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name("main")
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        body(Arguments())
    return builder.get()


@contextmanager
def when(condition) -> Iterator[None]:
    """What is inside runs where ``condition`` holds."""
    with T.If(condition), T.Then():
        yield


@contextmanager
def otherwise(condition) -> Iterator[None]:
    """What is inside runs where ``condition`` does not hold."""
    with T.If(T.Not(condition)), T.Then():
        yield


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


ACCUMULATORS = 4  # at once: each waits for its last addition


def accumulate(count: int, load: Callable, combine: Callable, dtype: str = "float32"):
    """The scalar that ``combine`` makes of all lanes of load(0), ... load(count - 1), starting from 0."""
    chains = max(number for number in range(1, ACCUMULATORS + 1) if count % number == 0)
    totals = local(chains * LANES, dtype)
    for chain in range(chains):
        T.buffer_store(totals, splat(getattr(T, dtype)(0)), [lanes(chain * LANES)])
    with T.serial(0, count // chains) as block:
        for chain in range(chains):
            at = lanes(chain * LANES)
            T.buffer_store(totals, combine(totals[at], load(block * chains + chain)), [at])
    vectors = [totals[lanes(chain * LANES)] for chain in range(chains)]
    return fold(functools.reduce(combine, vectors), combine, dtype)


def bits_of(mask, count: int):
    """An unsigned number of ``count`` bits (8 or 16): lane 0 of a vector of truth values is the lowest."""
    # To LLVM a truth value is one bit; TVM's `reinterpret` has a check that counts it as more.
    return tirx.call_intrin(f"uint{count}", "tirx.reinterpret", mask)


def split(index, size: int):
    """Quotient and remainder: which part of ``size`` an index is in, and where in it."""
    return T.bind(T.floordiv(index, size)), T.bind(T.floormod(index, size))


def polynomial(x, coefficients):
    """Horner's rule; coefficients from the lowest power."""
    result = constant(coefficients[-1])
    for coefficient in reversed(coefficients[:-1]):
        result = T.bind(result * x + constant(coefficient))
    return result


def exp(x):
    """e^x for vectors, to 2 units in the last place; results below 2^-126 are not denormal but 2^-126."""
    x = T.bind(T.max(T.min(x, constant(88.0)), constant(-87.0)))
    whole = T.bind(T.nearbyint(x * constant(1 / math.log(2))))
    # ln 2 in two parts, the first exact in few bits, as in Cody and Waite.
    rest = T.bind(x - whole * constant(0.693359375) - whole * constant(-2.12194440e-4))
    power = polynomial(rest, [1, 1, 0.5, 1 / 6, 1 / 24, 1 / 120, 1 / 720])
    bits = T.shift_left(T.Cast(f"int32x{LANES}", whole) + splat(T.int32(127)), splat(T.int32(23)))
    return T.bind(power * T.reinterpret(f"float32x{LANES}", bits))


def sigmoid(x):
    """1 / (1 + e^-x) for vectors."""
    return T.bind(constant(1) / (constant(1) + exp(constant(0) - x)))


def gelu(target: Target, x):
    """Return x Phi(x) for vectors, without exponential and division, to 3e-6."""
    return _gelu_by_table(x) if target.tables else _gelu_by_polynomial(x)


def _half_erf(x: np.ndarray) -> np.ndarray:
    """Phi(x) - 1/2."""
    return np.array([math.erf(value / math.sqrt(2)) / 2 for value in x])


def _normal_cdf_coefficients(bound: float, degree: int) -> list[float]:
    """Powers of u = 2 x^2 / bound^2 - 1 that sum to (Phi(x) - 1/2) / x for |x| <= bound."""
    u = np.cos(np.pi * (np.arange(400) + 0.5) / 400)
    x = bound * np.sqrt((u + 1) / 2)
    return list(
        np.polynomial.chebyshev.cheb2poly(np.polynomial.chebyshev.chebfit(u, _half_erf(x) / x, degree))
    )


# The result is off by 2.1e-6 at most, at the bound: beyond it Phi is 0 or 1 to 4e-7.
_GELU_BOUND = 5.0
_GELU_COEFFICIENTS = _normal_cdf_coefficients(_GELU_BOUND, 12)


def _gelu_by_polynomial(x):
    clipped = T.bind(T.max(T.min(x, constant(_GELU_BOUND)), constant(-_GELU_BOUND)))
    u = T.bind(clipped * clipped * constant(2 / _GELU_BOUND**2) - constant(1))
    return T.bind(x * (clipped * polynomial(u, _GELU_COEFFICIENTS) + constant(0.5)))


# Cubic polynomials of |x|, one for every 1 / 31 of the way to the bound; beyond it x Phi(x) is x or 0. The
# result is off by 8e-7 at most, at the bound.
_TABLE_BOUND, _TABLE_SIZE = 5.2, 32


def _gelu_table() -> np.ndarray:
    """Rows of coefficients, of |x|^3 to 1, that sum to |x| (Phi(|x|) - 1/2) around each multiple."""
    step = _TABLE_BOUND / (_TABLE_SIZE - 1)
    nodes = np.cos(np.pi * (np.arange(64) + 0.5) / 64)
    rows = []
    for index in range(_TABLE_SIZE - 1):
        # 0 is to become 0, so the first polynomial has no lower powers than the function.
        x, powers = (
            (step / 4 * (nodes + 1), (3, 2)) if index == 0 else (step * (index + nodes / 2), (3, 2, 1, 0))
        )
        fitted = np.linalg.lstsq(x[:, None] ** powers, x * _half_erf(x), rcond=None)[0]
        rows.append([*fitted, *[0] * (4 - len(fitted))])
    return np.array([*rows, [0, 0, 0.5, 0]])


_GELU_TABLE = _gelu_table()


def _gelu_by_table(x):
    bits = T.bitwise_and(T.reinterpret(f"uint32x{LANES}", x), splat(T.uint32(0x7FFFFFFF)))
    magnitude = T.bind(T.reinterpret(f"float32x{LANES}", bits))
    # 2^23 plus a small number is rounded to a whole one, in the lowest bits of the sum.
    scale = constant((_TABLE_SIZE - 1) / _TABLE_BOUND)
    place = T.min(magnitude, constant(_TABLE_BOUND)) * scale + constant(2**23)
    index = T.bind(T.reinterpret(f"int32x{LANES}", place))
    total = None
    for coefficients in _GELU_TABLE.T:
        value = look_up(coefficients, index)
        total = T.bind(value if total is None else total * magnitude + value)
    return T.bind(x * constant(0.5) + total)


def look_up(table: np.ndarray, index):
    """The numbers of a table of 32 at the lowest 5 bits of each lane; on targets with ``tables``."""
    low, high = (
        T.Shuffle([T.float32(float(value)) for value in half], list(range(LANES)))
        for half in np.split(table, 2)
    )
    return T.call_llvm_pure_intrin("float32x16", "llvm.x86.avx512.vpermi2var.ps.512", low, index, high)


class RowTiles:
    """A number of rows known at run time, cut into tiles of about equal size, as many as threads divide.

    Attributes:
      count: how many tiles there are; some may be empty.
      limit: rows that a tile has at most, known at compile time.
    """

    def __init__(self, rows, row_bytes: int, multiple: int, threads: int):
        self.rows = rows
        self.limit = max(multiple, min(512, CACHE_BYTES // row_bytes) // multiple * multiple)
        per_thread = T.ceildiv(T.ceildiv(rows, self.limit), threads)
        self.count = T.bind(T.max(per_thread, 1) * threads)
        self.size = T.bind(T.ceildiv(T.ceildiv(rows, self.count), multiple) * multiple)

    def __getitem__(self, tile):
        """The first row of a tile and how many it has."""
        start = T.bind(tile * self.size)
        return start, T.bind(T.max(T.min(self.size, self.rows - start), 0))


def for_each_row(rows, row_bytes: int, threads: int, body: Callable):
    """``body(row)`` for a number of rows known at run time, on all threads."""
    tiles = RowTiles(rows, row_bytes, 1, threads)
    with T.parallel(0, tiles.count) as tile:
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
