"""Products in the eight matrix registers of Intel's AMX; each register has up to 16 rows of 64 bytes.

A thread shapes the registers before its products (`begin`) and releases them afterwards (`end`).
"""

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.emit import lanes, scratch
from kernels_tvm.descriptions import LANES
from kernels_tvm.emit import otherwise, when

ROWS = 16  # of a register, at most
BF16_INPUTS, INT8_INPUTS = 32, 64  # inputs that one instruction sums over


def begin(count) -> None:
    """Shape the matrix registers for products of ``count`` rows.

    The last two registers hold weights, 16 rows of 64 bytes. The others hold rows and sums, `_rows` rows of
    64 bytes: an instruction takes one cycle for each row.
    """
    shape, rows = scratch(64, "uint8"), T.Cast("uint8", _rows(count))
    T.buffer_store(shape, T.broadcast(T.uint8(0), 64), [lanes(0, 64)])
    T.buffer_store(shape, T.uint8(1), [0])
    for register in range(8):
        T.buffer_store(shape, T.uint8(64), [16 + 2 * register])
        T.buffer_store(shape, rows if register < 6 else T.uint8(ROWS), [48 + register])
    _instruction("ldtilecfg", T.address_of(shape[0]))


def end() -> None:
    """Release the matrix registers: the system switches slowly to and from a thread that keeps them."""
    _instruction("tilerelease")


def float_product(x, count, panels, panel, columns: int, finish: Callable) -> None:
    """`products.float_product` with bfloat16 factors and float32 sums.

    A float32 number is the sum of two bfloat16 numbers, so a product is (x' + x")(w' + w") without x" w".
    Rows or weights that are bfloat16 numbers have no second part, and its products are left out.
    """
    vectors, start = columns // LANES, T.bind(panels.start(panel))
    sums = scratch(2 * ROWS * columns)
    products = [(1, 0), (0, 0), (0, 1)]
    products = [(i, j) for i, j in products if i < len(x.parts) and j < len(panels.parts)]

    def compute(starts):
        with T.serial(0, panels.pairs // ROWS) as chunk:
            held = (None, None)
            for x_part, weight_part in products:
                if x_part != held[0]:
                    for i, first in enumerate(starts):
                        at = first * x.stride + chunk * (BF16_INPUTS // 2)
                        _load(4 + i, x.parts[x_part], at, 4 * x.stride)
                if weight_part != held[1]:
                    for j in range(vectors):
                        at = start + chunk * (ROWS * columns) + j * LANES
                        _load(6 + j, panels.parts[weight_part], at, 4 * columns)
                held = (x_part, weight_part)
                for i in range(len(starts)):
                    for j in range(vectors):
                        _instruction("tdpbf16ps", 2 * i + j, 4 + i, 6 + j)

    def start_sums(register, vector):
        _instruction("tilezero", register)

    _blocks(count, columns, sums, start_sums, compute, finish)


def int8_product(x, count, panels, start, offset, columns: int, finish: Callable) -> None:
    """`products.int8_product` with the panel that begins at ``start``.

    The sums of the panel's columns begin with ``panels.offsets`` from ``offset`` on.
    """
    vectors = columns // LANES
    sums = scratch(2 * ROWS * columns, "int32")

    def compute(starts):
        with T.serial(0, panels.inputs // INT8_INPUTS) as chunk:
            for i, first in enumerate(starts):
                at = first * x.width + chunk * INT8_INPUTS
                _load(4 + i, x.whole, at, x.width)
            for j in range(vectors):
                at = start + (chunk * (ROWS * columns) + j * LANES) * 4
                _load(6 + j, panels.weights, at, 4 * columns)
            for i in range(len(starts)):
                for j in range(vectors):
                    _instruction("tdpbusd", 2 * i + j, 4 + i, 6 + j)

    def start_sums(register, vector):
        # Without a stride, every row of the register is the same.
        _load(register, panels.offsets, offset + vector * LANES, 0)

    _blocks(count, columns, sums, start_sums, compute, finish)


def _blocks(count, columns, sums, start_sums: Callable, compute: Callable, finish: Callable) -> None:
    """Emit the products of two registers of rows at a time, or of the last one, with up to 32 columns.

    ``start_sums(register, vector)`` writes into a register what the sums of a vector of the columns begin
    with. ``compute(first rows)`` takes the first row of each register of rows. It adds the products to the
    registers 0 to 3, two for each register of rows.
    """
    vectors, rows = columns // LANES, _rows(count)
    with T.serial(0, T.ceildiv(count, 2 * rows)) as block:
        first = T.bind(block * 2 * rows)
        starts = [first, T.bind(first + rows)]
        is_one = T.bind(count - first <= rows)
        for condition, present in ((when, starts[:1]), (otherwise, starts)):
            with condition(is_one):
                registers = [(i, j) for i in range(len(present)) for j in range(vectors)]
                for i, j in registers:
                    start_sums(2 * i + j, j)
                compute(present)
                for i, j in registers:
                    address = T.address_of(sums[i * rows * columns + j * LANES])
                    _instruction("tilestored64", 2 * i + j, address, T.int64(4 * columns))
        with T.serial(0, T.min(2 * rows, count - first)) as row:
            for j in range(vectors):
                finish(first + row, j, sums[lanes(row * columns + j * LANES)])


def _rows(count):
    """Rows of a matrix register: the fewest that cut ``count`` rows into no more pairs of registers."""
    return T.bind(T.ceildiv(count, 2 * T.ceildiv(count, 2 * ROWS)))


def _load(register, buffer, at, stride_bytes):
    _instruction("tileloadd64", register, T.address_of(buffer[at]), T.int64(stride_bytes))


def _instruction(name, *arguments):
    arguments = [T.int8(value) if isinstance(value, int) else value for value in arguments]
    T.evaluate(T.call_llvm_intrin("void", f"llvm.x86.{name}", *arguments))
