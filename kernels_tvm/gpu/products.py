"""Products of a block's tile of rows with its tile of weights: the inner loops of the linear layers."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from tvm.script.ir_builder import tirx as T

from kernels_tvm.gpu.emit import barrier, fill, quad, registers
from kernels_tvm.gpu.instructions import WARP, TensorCore, dot4
from kernels_tvm.gpu.targets import GpuTarget
from kernels_tvm.gpu.tiles import ThreadBlock, padded_tile

THREADS = 256
SIDE = 16  # threads along the rows, and along the columns, of a tile


@dataclass(frozen=True)
class Tile:
    """Rows and columns of a block's results, and how many words of shared memory a row of operands takes."""

    rows: int
    columns: int
    depth: int


OUTER_TILE = Tile(64, 64, 32)  # of single numbers
DOT_TILE = Tile(64, 64, 16)  # of words of four int8 numbers
TENSOR_TILE = Tile(128, 64, 16)  # of words, for tensor cores
WARP_TILE = (32, 32)  # of a warp, within TENSOR_TILE


@dataclass(frozen=True)
class Arithmetic:
    """How numbers are multiplied.

    Attributes:
      dtype: of the tiles' elements.
      sums: dtype of the sums.
      add: ``add(sum, row, weight)`` is the sum with a product added.
      row: prepares an element of a row, once for all its products.
      weight: prepares a weight, once for all its products.
    """

    dtype: str
    sums: str
    add: Callable
    row: Callable = T.bind
    weight: Callable = T.bind


def outer_product(block: ThreadBlock, inputs: int, arithmetic: Arithmetic, load: Callable, finish: Callable):
    """Emit the results of an ``OUTER_TILE`` as a sum of outer products over the inputs.

    ``load(x_tile, w_tile, first_input)`` fills [rows, depth] and [depth, columns]. In the end
    ``finish(row, column, values)`` takes four neighbouring results of a row.
    """
    tile = OUTER_TILE
    tall, wide = tile.rows // SIDE, tile.columns // SIDE
    x_tile = padded_tile(tile.rows, tile.depth, arithmetic.dtype)
    w_tile = padded_tile(tile.depth, tile.columns, arithmetic.dtype)
    row, column = T.bind(block.thread // SIDE * tall), T.bind(block.thread % SIDE * wide)
    sums = registers(tall * wide, arithmetic.sums)
    fill(sums, T.Cast(arithmetic.sums, 0), tall * wide)
    with T.serial(0, -(-inputs // tile.depth)) as step:
        load(x_tile, w_tile, T.bind(step * tile.depth))
        barrier()
        with T.serial(0, tile.depth // 4) as group:
            a, b = registers(4 * tall, arithmetic.dtype), registers(wide, arithmetic.dtype)
            for i in range(tall):
                T.buffer_store(a, x_tile[row + i, quad(group * 4)], [quad(i * 4)])
            for k in range(4):
                T.buffer_store(b, w_tile[group * 4 + k, quad(column)], [quad(0)])
                weights = [arithmetic.weight(b[j]) for j in range(wide)]
                for i in range(tall):
                    element = arithmetic.row(a[i * 4 + k])
                    for j in range(wide):
                        at = i * wide + j
                        T.buffer_store(sums, arithmetic.add(sums[at], element, weights[j]), [at])
        barrier()
    for i in range(tall):
        finish(row + i, column, [sums[i * wide + j] for j in range(wide)])


def _multiply_add(total, a, b):
    return total + a * b


FLOATS = Arithmetic("float32", "float32", _multiply_add)


def dot_product(target: GpuTarget, block: ThreadBlock, words: int, load: Callable, finish: Callable) -> None:
    """Emit the results of a ``DOT_TILE`` by `dot4`, as a sum over words of four int8 numbers.

    ``load(x_tile, w_tile, first_word)`` fills [rows, depth] and [columns, depth]. In the end
    ``finish(row, column, values)`` takes one result.
    """
    tile = DOT_TILE
    tall, wide = tile.rows // SIDE, tile.columns // SIDE
    x_tile, w_tile = (padded_tile(size, tile.depth, "int32") for size in (tile.rows, tile.columns))
    # A thread's columns lie SIDE apart, so that the threads' vectors lie in different banks.
    row, column = T.bind(block.thread // SIDE), T.bind(block.thread % SIDE)
    sums = registers(tall * wide, "int32")
    fill(sums, T.int32(0), tall * wide)
    with T.serial(0, -(-words // tile.depth)) as step:
        load(x_tile, w_tile, T.bind(step * tile.depth))
        barrier()
        with T.serial(0, tile.depth // 4) as group:
            a, b = registers(4 * tall, "int32"), registers(4 * wide, "int32")
            for i in range(tall):
                T.buffer_store(a, x_tile[row + i * SIDE, quad(group * 4)], [quad(i * 4)])
            for j in range(wide):
                T.buffer_store(b, w_tile[column + j * SIDE, quad(group * 4)], [quad(j * 4)])
            for k in range(4):
                for at in range(tall * wide):
                    i, j = divmod(at, wide)
                    T.buffer_store(sums, dot4(target, a[i * 4 + k], b[j * 4 + k], sums[at]), [at])
        barrier()
    for at in range(tall * wide):
        i, j = divmod(at, wide)
        finish(row + i * SIDE, column + j * SIDE, [sums[at]])


def tensor_product(
    target: GpuTarget,
    block: ThreadBlock,
    words: int,
    load: Callable,
    finish: Callable,
    kind: Literal["int8", "bits"] = "int8",
) -> None:
    """`dot_product` on tensor cores: ``TENSOR_TILE``, words of `TensorCore`, two results a ``finish``."""
    tile, core = TENSOR_TILE, TensorCore(target, kind, block.threads)
    tall, wide = WARP_TILE[0] // core.rows, WARP_TILE[1] // core.columns
    x_tile, w_tile = (padded_tile(size, tile.depth, "int32") for size in (tile.rows, tile.columns))
    warp, lane = T.bind(block.thread // WARP), T.bind(block.thread % WARP)
    across = tile.columns // WARP_TILE[1]
    row, column = T.bind(warp // across * WARP_TILE[0]), T.bind(warp % across * WARP_TILE[1])
    sums = registers(tall * wide * core.c_registers, "int32")
    fill(sums, T.int32(0), tall * wide * core.c_registers)
    with T.serial(0, -(-words // tile.depth)) as step:
        load(x_tile, w_tile, T.bind(step * tile.depth))
        barrier()
        with T.serial(0, tile.depth // core.words) as part:
            a = registers(tall * core.a_registers, "int32")
            b = registers(wide * core.b_registers, "int32")
            for at in range(tall * core.a_registers):
                i, register = divmod(at, core.a_registers)
                place, word = core.a_place(lane, register)
                T.buffer_store(a, x_tile[row + i * core.rows + place, part * core.words + word], [at])
            for at in range(wide * core.b_registers):
                j, register = divmod(at, core.b_registers)
                place, word = core.b_place(lane, register)
                T.buffer_store(b, w_tile[column + j * core.columns + place, part * core.words + word], [at])
            core.multiply(sums, a, b, tall, wide, block.thread)
        barrier()
    for i in range(tall):
        for j in range(wide):
            for register in range(0, core.c_registers, 2):
                down, right = core.c_place(lane, register)
                at = (i * wide + j) * core.c_registers + register
                finish(
                    row + i * core.rows + down, column + j * core.columns + right, [sums[at], sums[at + 1]]
                )
