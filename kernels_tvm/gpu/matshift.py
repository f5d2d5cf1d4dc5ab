"""MatShift on GPUs: rows times a packed power-of-two weight, plus a bias."""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.descriptions import Linear
from kernels_tvm.emit import Arguments, kernel, when
from kernels_tvm.gpu.emit import barrier, fill, launch, quad, registers, shared, words_of
from kernels_tvm.gpu.targets import GpuTarget
from kernels_tvm.packing import TILE_BYTES, TILE_INPUTS, TILE_OUTPUTS

THREADS = 256
SIDE = 16  # threads along the rows, and along the columns, of a block's tile
ROWS, COLUMNS, INPUTS = 64, 64, 32  # a block's tile of results, and how many inputs it takes at once
PADDING = 4  # words after each row of shared memory: neighbours lie in other banks, still at 128 bits
HALF = TILE_OUTPUTS // 2


def linear_kernel(target: GpuTarget, linear: Linear):
    """``y = linear(x)``: x [rows, inputs] float32, the parameters, y [rows, outputs] float32."""

    def body(arguments: Arguments):
        x = arguments("x", ("rows", linear.inputs), "float32")
        buffers = {name: arguments(name, shape, dtype) for name, shape, dtype in linear.arguments()}
        y = arguments("y", ("rows", linear.outputs), "float32")
        rows = arguments.symbols["rows"]
        tiles = T.ceildiv(rows, ROWS), -(-linear.outputs // COLUMNS)
        with when(rows > 0), launch(THREADS, *tiles) as (row_tile, column_tile, thread):
            _float_product(linear, x, buffers, y, rows, row_tile * ROWS, column_tile * COLUMNS, thread)

    return kernel(body)


def _float_product(linear, x, buffers, y, rows, first_row, first_column, thread):
    x_tile, w_tile = shared((ROWS, INPUTS + PADDING)), shared((INPUTS, COLUMNS + PADDING))
    tall, wide = ROWS // SIDE, COLUMNS // SIDE
    my_row, my_column = T.bind(thread // SIDE * tall), T.bind(thread % SIDE * wide)
    sums = registers(tall * wide)
    fill(sums, T.float32(0), tall * wide)
    with T.serial(0, -(-linear.inputs // INPUTS)) as step:
        _load_rows(x, x_tile, rows, first_row, step * INPUTS, linear.inputs, thread)
        _decode_weights(linear, buffers, w_tile, first_column, step * INPUTS, thread)
        barrier()
        with T.serial(0, INPUTS // 4) as group:
            a, b = registers(4 * tall), registers(wide)
            with T.unroll(0, tall) as i:
                T.buffer_store(a, x_tile[my_row + i, quad(group * 4)], [quad(i * 4)])
            with T.unroll(0, 4) as k:
                T.buffer_store(b, w_tile[group * 4 + k, quad(my_column)], [quad(0)])
                with T.unroll(0, tall) as i, T.unroll(0, wide) as j:
                    T.buffer_store(sums, sums[i * wide + j] + a[i * 4 + k] * b[j], [i * wide + j])
        barrier()
    with T.unroll(0, tall) as i:
        row = T.bind(first_row + my_row + i)
        with when(row < rows), T.unroll(0, wide) as j:
            column = T.bind(first_column + my_column + j)
            with when(column < linear.outputs):
                T.buffer_store(y, sums[i * wide + j] + buffers["shift_bias"][column], [row, column])


def _load_rows(x, tile, rows, first_row, first_input, inputs, thread):
    """Fill the tile with rows of ``x``, with zeros outside of it."""
    width = 4 if inputs % 4 == 0 else 1
    lanes = T.ramp(0, 1, width) if width > 1 else 0
    zero = T.broadcast(T.float32(0), width) if width > 1 else T.float32(0)
    vectors = INPUTS // width
    with T.unroll(0, ROWS * vectors // THREADS) as turn:
        number = T.bind(turn * THREADS + thread)
        row, column = T.bind(number // vectors), T.bind(number % vectors * width)
        at = [row, column + lanes]
        inside = T.And(first_row + row < rows, first_input + column < inputs)
        with T.If(inside):
            with T.Then():
                T.buffer_store(tile, x[first_row + row, first_input + column + lanes], at)
            with T.Else():
                T.buffer_store(tile, zero, at)


def _decode_weights(linear, buffers, tile, first_column, first_input, thread):
    """Fill the tile with weights as float32: those whose bits are their sign and their exponent."""
    output_tiles, groups, _ = buffers["codes"].shape
    tile_words = TILE_BYTES[linear.bits] // 4
    codes = words_of(buffers["codes"], (output_tiles, groups, tile_words))
    tile_groups = INPUTS // TILE_INPUTS
    with T.unroll(0, INPUTS * COLUMNS // 8 // THREADS) as turn:
        number = T.bind(turn * THREADS + thread)
        lane, group = T.bind(number % HALF), T.bind(number // HALF % tile_groups)
        block = T.bind(number // (HALF * tile_groups))
        output_tile = T.bind(first_column // TILE_OUTPUTS + block)
        input_group = T.bind(first_input // TILE_INPUTS + group)
        inside = T.bind(T.And(output_tile < output_tiles, input_group < groups))
        words = registers(3, "int32")
        fill(words, T.int32(0), 3)
        with when(inside):
            T.buffer_store(words, codes[output_tile, input_group, lane], [0])
            if linear.bits == 5:
                for half in range(2):
                    T.buffer_store(words, codes[output_tile, input_group, 8 + half], [1 + half])
        for half in range(2):
            column = T.bind(block * TILE_OUTPUTS + half * HALF + lane)
            exponent = registers(1, "int32")
            T.buffer_store(exponent, T.int32(0), [0])
            with when(inside):
                T.buffer_store(exponent, T.Cast("int32", buffers["exponent"][first_column + column]), [0])
            with T.unroll(0, TILE_INPUTS) as k:
                shifted = T.shift_right(words[0], 8 * k + 4 * half)
                if linear.bits == 5:
                    code = T.bind(T.bitwise_and(shifted, 15))
                    negative = T.bitwise_and(T.shift_right(words[1 + half], 4 * lane + k), 1)
                else:
                    code = T.bind(T.bitwise_and(shifted, 7))
                    negative = T.bitwise_and(T.shift_right(shifted, 3), 1)
                bits = T.bitwise_or(
                    T.shift_left(code + exponent[0] + 126, T.int32(23)), T.shift_left(negative, T.int32(31))
                )
                value = T.reinterpret("float32", T.Select(code == 0, T.int32(0), bits))
                T.buffer_store(tile, value, [group * TILE_INPUTS + k, column])
