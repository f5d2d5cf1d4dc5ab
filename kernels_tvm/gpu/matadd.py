"""MatAdd on GPUs: sums of values that the codes 0, 1 and -1 choose.

Bitwise logic applies a code to a value: it keeps the value, negates it, or makes it 0. Then each value takes
one addition.
"""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.descriptions import MatAddDescription, round_up
from kernels_tvm.emit import Arguments, kernel, when
from kernels_tvm.gpu.emit import WORD_LANES, barrier, fill, launch, quad, registers, words_of
from kernels_tvm.gpu.targets import GpuTarget
from kernels_tvm.gpu.tiles import padded_tile

SIDE = 8  # threads along the rows, and along the columns, of a block's tile
THREADS = SIDE * SIDE
TILE = 4 * SIDE  # rows, columns and inner size of a block's tile
# Long sums are cut into parts, one a block: a context k^T v has few outputs, but each is a sum of many
# tokens.
PART, MOST_PARTS = 128, 16
ADDING_THREADS = 256


def _part(inner: int) -> int:
    """How many values a block adds up."""
    return round_up(max(PART, -(-inner // MOST_PARTS)), TILE)


def scratch(matadd: MatAddDescription, batch, rows) -> list[tuple[str, tuple, str]]:
    """Name, shape and dtype of the arrays that pass from launch to launch."""
    parts = -(-matadd.inner // _part(matadd.inner))
    return [("parts", (parts, batch, rows, matadd.columns), _sum_dtype(matadd))] if parts > 1 else []


def _sum_dtype(matadd):
    return "int32" if matadd.dtype == "int8" else "float32"


def matadd_kernel(target: GpuTarget, matadd: MatAddDescription):
    """From codes [batch, rows, inner], values [batch, inner, columns] -> [batch, rows, columns]."""
    inner, columns, dtype = matadd.inner, matadd.columns, matadd.dtype

    def body(arguments: Arguments):
        codes = arguments("codes", ("batch", "rows", inner), dtype)
        values = arguments("values", ("batch", inner, columns), dtype)
        parts = [arguments(*argument) for argument in scratch(matadd, "batch", "rows")]
        y = arguments("y", ("batch", "rows", columns), _sum_dtype(matadd))
        batch, rows = arguments.symbols["batch"], arguments.symbols["rows"]
        with when(T.And(batch > 0, rows > 0)):
            _launch_sums(matadd, codes, values, parts[0] if parts else y, batch, rows)
            if parts:
                _launch_total(parts[0], y, batch * rows * columns)

    return kernel(body)


def _launch_sums(matadd, codes, values, sums_of, batch, rows):
    """Write the sums, or their parts."""
    part, down, across = _part(matadd.inner), T.ceildiv(rows, TILE), -(-matadd.columns // TILE)
    parts = -(-matadd.inner // part)
    dtype = _sum_dtype(matadd)
    if dtype == "float32":
        values = words_of(values, values.shape)
    with launch(THREADS, batch * down, across * parts) as (x, y, thread):
        image, first_row = T.bind(T.truncdiv(x, down)), T.bind(T.truncmod(x, down) * TILE)
        number, first_column = T.bind(y // across), T.bind(y % across * TILE)
        code_tile, value_tile = (padded_tile(TILE, TILE, "int32") for _ in range(2))
        my_row, my_column = T.bind(thread // SIDE), T.bind(thread % SIDE * 4)
        sums, corrections = registers(16, dtype), registers(4, "int32")
        fill(sums, T.Cast(dtype, 0), 16)
        fill(corrections, T.int32(0), 4)
        with T.serial(0, part // TILE) as step:
            first = T.bind(number * part + step * TILE)
            _load_tile(code_tile, codes, image, first_row, rows, first, matadd.inner, thread)
            _load_tile(value_tile, values, image, first, matadd.inner, first_column, matadd.columns, thread)
            barrier()
            with T.serial(0, TILE // 4) as group:
                chosen, added = registers(16, "int32"), registers(4, "int32")
                for i in range(4):
                    T.buffer_store(chosen, code_tile[my_row + i * SIDE, quad(group * 4)], [quad(i * 4)])
                for k in range(4):
                    T.buffer_store(added, value_tile[group * 4 + k, quad(my_column)], [quad(0)])
                    for i in range(4):
                        _add_row(sums, corrections, i, chosen[i * 4 + k], added, dtype)
            barrier()
        for i in range(4):
            row = T.bind(first_row + my_row + i * SIDE)
            for j in range(4):
                column = T.bind(first_column + my_column + j)
                with when(T.And(row < rows, column < matadd.columns)):
                    total = sums[i * 4 + j]
                    if dtype == "int32":
                        total = total + corrections[i]
                    at = [image, row, column]
                    T.buffer_store(sums_of, total, [number, *at] if parts > 1 else at)


def _add_row(sums, corrections, i, code, added, dtype):
    """Add four values, times the code 1, -1 or 0, to a row's four sums."""
    code = T.bind(code)
    mask = T.bind(T.int32(0) - T.bitwise_and(code, 1))
    if dtype == "float32":
        sign = T.bind(T.bitwise_and(code, T.int32(-(2**31))))
        for j in range(4):
            bits = T.bitwise_and(T.bitwise_xor(added[j], sign), mask)
            T.buffer_store(sums, sums[i * 4 + j] + T.reinterpret("float32", bits), [i * 4 + j])
        return
    # The complement of an integer is its negative less 1. The ones are counted, and added at the end.
    negative = T.bind(T.shift_right(code, T.int32(31)))
    T.buffer_store(corrections, corrections[i] - negative, [i])
    for j in range(4):
        value = T.bitwise_and(T.bitwise_xor(added[j], negative), mask)
        T.buffer_store(sums, sums[i * 4 + j] + value, [i * 4 + j])


def _load_tile(tile, source, image, first_row, rows, first_column, columns: int, thread):
    """Fill a tile with rows and columns of an image, and with zeros outside of it."""
    width = WORD_LANES if columns % WORD_LANES == 0 else 1
    vectors = TILE // width
    with T.unroll(0, TILE * vectors // THREADS) as turn:
        number = T.bind(turn * THREADS + thread)
        row, column = T.bind(number // vectors), T.bind(number % vectors * width)
        part = registers(width, tile.dtype)
        fill(part, T.Cast(tile.dtype, 0), width)
        with when(T.And(first_row + row < rows, first_column + column < columns)):
            place = image, first_row + row
            for i, value in enumerate(_read(source, place, T.bind(first_column + column), width)):
                T.buffer_store(part, T.Cast(tile.dtype, value), [i])
        lanes = quad(0) if width > 1 else 0
        T.buffer_store(tile, part[lanes], [row, column + lanes])


def _read(source, place, column, width):
    """``width`` neighbours of a row; one load reads four."""
    if width == 1:
        return [source[(*place, column)]]
    if source.dtype == "int8":
        *leading, columns = source.shape
        words = words_of(source, (*leading, columns // WORD_LANES))
        word = T.bind(words[(*place, column // WORD_LANES)])
        return [T.shift_right(T.shift_left(word, T.int32(24 - 8 * i)), T.int32(24)) for i in range(width)]
    values = registers(width, source.dtype)
    T.buffer_store(values, source[(*place, quad(column))], [quad(0)])
    return [values[i] for i in range(width)]


def _launch_total(parts, y, size):
    count = parts.shape[0].value
    flat = T.decl_buffer((count, size), y.dtype, data=parts.data)
    result = T.decl_buffer((size,), y.dtype, data=y.data)
    with launch(ADDING_THREADS, T.ceildiv(size, ADDING_THREADS)) as (block, _, thread):
        place = T.bind(block * ADDING_THREADS + thread)
        with when(place < size):
            total = registers(1, y.dtype)
            fill(total, T.Cast(y.dtype, 0), 1)
            with T.unroll(0, count) as part:
                T.buffer_store(total, total[0] + flat[part, place], [0])
            T.buffer_store(result, total[0], [place])
