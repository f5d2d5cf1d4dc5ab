"""Tiles of rows and of weights in shared memory: they are loaded, and packed weights decoded, once a tile."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from kernels_tvm.descriptions import LinearDescription
from kernels_tvm.emit import when
from kernels_tvm.gpu.emit import WORD_LANES, fill, quad, registers, shared, words_of
from kernels_tvm.gpu.instructions import signed_byte
from kernels_tvm.packing import TILE_INPUTS, TILE_OUTPUTS

HALF = TILE_OUTPUTS // 2  # outputs whose codes are in the low halves of a tile's bytes
PADDING = 4  # words after each row of shared memory: rows start in different banks, aligned to 128 bits


@dataclass(frozen=True)
class Rows:
    """The rows of a launch: the first ``count``, or ``count`` entries of ``order`` from ``start`` on."""

    count: Any
    order: Any = None
    start: Any = 0

    def __getitem__(self, position):
        """The row of the inputs and outputs at a position below ``count``."""
        return position if self.order is None else self.order[self.start + position]


@dataclass(frozen=True)
class ThreadBlock:
    """A block of threads, and the first row and column of the results that it computes."""

    threads: int
    thread: Any
    first_row: Any
    first_column: Any

    def each(self, elements: int, body: Callable) -> None:
        """Emit ``body(number)`` for every number below ``elements``, shared among the threads."""
        with T.unroll(0, -(-elements // self.threads)) as turn:
            number = T.bind(turn * self.threads + self.thread)
            if elements % self.threads:
                with when(number < elements):
                    body(number)
            else:
                body(number)


def padded_tile(rows: int, columns: int, dtype: str):
    """A tile in shared memory, of elements of 32 bits."""
    return shared((rows, columns + PADDING), dtype)


def _shape(tile):
    """Rows and columns of a `padded_tile`."""
    rows, columns = (size.value for size in tile.shape)
    return rows, columns - PADDING


def load_rows(block: ThreadBlock, tile, count, width: int, valid: Callable, read: Callable) -> None:
    """Fill a tile with rows; elements past ``count`` rows, or whose column is not ``valid``, are 0.

    ``read(position, column)`` is ``width`` elements of a row from a column of the tile on.
    """
    rows, columns = _shape(tile)
    vectors = columns // width

    def load(number):
        row, column = T.bind(number // vectors), T.bind(number % vectors * width)
        position = T.bind(block.first_row + row)
        part = registers(width, tile.dtype)
        fill(part, T.Cast(tile.dtype, 0), width)
        with when(T.And(position < count, valid(column))):
            for i, value in enumerate(read(position, column)):
                T.buffer_store(part, value, [i])
        if width == WORD_LANES:
            T.buffer_store(tile, part[quad(0)], [row, quad(column)])
        else:
            T.buffer_store(tile, part[0], [row, column])

    block.each(rows * vectors, load)


def load_floats(block: ThreadBlock, tile, x, rows: Rows, first_input, convert=lambda value: value) -> None:
    """Fill a tile with ``convert`` of the numbers of ``x`` [rows, inputs], from ``first_input`` on."""
    inputs = x.shape[1].value
    width = WORD_LANES if inputs % WORD_LANES == 0 else 1

    def read(position, column):
        row, start = T.bind(rows[position]), T.bind(first_input + column)
        if width == 1:
            return [convert(x[row, start])]
        floats = registers(width)
        T.buffer_store(floats, x[row, quad(start)], [quad(0)])
        return [convert(floats[i]) for i in range(width)]

    load_rows(block, tile, rows.count, width, lambda column: first_input + column < inputs, read)


def load_blocks(block: ThreadBlock, tile, blocks, first_input) -> None:
    """Fill a tile [inputs, columns] with float32 weights in blocks, see `kernels_tvm.packing`."""
    count, inputs, outputs = (size.value for size in blocks.shape)
    depth, columns = _shape(tile)
    vectors = columns // WORD_LANES

    def load(number):
        k, column = T.bind(number // vectors), T.bind(number % vectors * WORD_LANES)
        source = T.bind(first_input + k), T.bind(block.first_column + column)
        with T.If(T.And(source[0] < inputs, source[1] < count * outputs)):
            with T.Then():
                at = [source[1] // outputs, source[0], quad(source[1] % outputs)]
                T.buffer_store(tile, blocks[at], [k, quad(column)])
            with T.Else():
                T.buffer_store(tile, T.broadcast(T.float32(0), WORD_LANES), [k, quad(column)])

    block.each(depth * vectors, load)


def _for_each_word(block, linear: LinearDescription, codes, inputs: int, columns: int, first_input, body):
    """Emit ``body(group, column, inside, words)`` for the words of a tile's codes, each of four inputs.

    The bytes of ``words[0]`` have the codes of the tile's ``column`` in their low halves and those of
    ``column + HALF`` in their high halves. With 5 bits, ``words[1]`` and ``words[2]`` hold their signs. Words
    that are not ``inside`` the weight are 0.
    """

    def decode(group, column, source, inside, all_words):
        words = registers(3, "int32")
        fill(words, T.int32(0), 3)
        with when(inside):
            T.buffer_store(words, all_words[source], [0])
            if linear.bits == 5:
                *tile, lane = source
                for half in range(2):
                    signs = T.shift_right(all_words[(*tile, HALF + half)], 4 * lane)
                    T.buffer_store(words, signs, [1 + half])
        body(group, column, inside, words)

    _for_each_lane(block, codes, HALF, inputs, columns, first_input, decode)


def _for_each_lane(block, tiles, lanes: int, inputs: int, columns: int, first_input, body):
    """Emit ``body(group, column, source, inside, words)`` for the first ``lanes`` words of a tile's weights.

    A word is of four inputs, ``group``, and ``column`` is that of the tile. It is ``words[source]`` if it is
    ``inside`` the weight.
    """
    output_tiles, groups, size = (size.value for size in tiles.shape)
    words = words_of(tiles, (output_tiles, groups, size // 4))
    tile_groups = inputs // TILE_INPUTS

    def visit(number):
        lane, group = T.bind(number % lanes), T.bind(number // lanes % tile_groups)
        output_tile = T.bind(number // (lanes * tile_groups))
        source = (
            T.bind(block.first_column // TILE_OUTPUTS + output_tile),
            T.bind(first_input // TILE_INPUTS + group),
            lane,
        )
        inside = T.bind(T.And(source[0] < output_tiles, source[1] < groups))
        body(group, T.bind(output_tile * TILE_OUTPUTS + lane), source, inside, words)

    block.each(inputs * columns * lanes // (TILE_INPUTS * TILE_OUTPUTS), visit)


def load_weights(
    block: ThreadBlock, tile, linear: LinearDescription, buffers, first_input, encode: Callable
) -> None:
    """Fill a tile [inputs, columns] with ``encode(code, negative, exponent)`` of each weight.

    All three are int32. The code 0 stands for a weight of 0, also outside of the layer.
    """

    def body(group, column, inside, words):
        for half in range(2):
            exponent = registers(1, "int32")
            T.buffer_store(exponent, T.int32(0), [0])
            with when(inside):
                index = block.first_column + column + half * HALF
                T.buffer_store(exponent, T.Cast("int32", buffers["exponent"][index]), [0])
            for k in range(TILE_INPUTS):
                bits = T.shift_right(words[0], T.int32(8 * k + 4 * half))
                if linear.bits == 5:
                    code, sign = T.bitwise_and(bits, 15), T.shift_right(words[1 + half], T.int32(k))
                else:
                    code, sign = T.bitwise_and(bits, 7), T.shift_right(bits, T.int32(3))
                weight = encode(T.bind(code), T.bind(T.bitwise_and(sign, 1)), exponent[0])
                T.buffer_store(tile, weight, [group * TILE_INPUTS + k, column + half * HALF])

    _for_each_word(block, linear, buffers["codes"], *_shape(tile), first_input, body)


def _for_each_int8_word(block, tiles, inputs: int, columns: int, first_input, body):
    """Emit ``body(group, column, inside, word)`` for a tile's words of whole numbers, of four inputs each.

    Words that are not ``inside`` the weight are 0.
    """

    def read(group, column, source, inside, words):
        word = registers(1, "int32")
        T.buffer_store(word, T.int32(0), [0])
        with when(inside):
            T.buffer_store(word, words[source], [0])
        body(group, column, inside, word[0])

    _for_each_lane(block, tiles, TILE_OUTPUTS, inputs, columns, first_input, read)


def load_int8_words(block: ThreadBlock, tile, tiles, first_input) -> None:
    """Fill a tile [columns, inputs / 4] with the words of int8 weights, as they lie in ``tiles``."""
    columns, words = _shape(tile)

    def body(group, column, inside, word):
        T.buffer_store(tile, word, [column, group])

    _for_each_int8_word(block, tiles, 4 * words, columns, first_input, body)


def load_numbers(block: ThreadBlock, tile, buffers, first_input, encode: Callable) -> None:
    """Fill a tile [inputs, columns] with ``encode(number, exponent)`` of each weight of two powers of two.

    Both are int32; outside of the layer they are 0.
    """

    def body(group, column, inside, word):
        exponent = registers(1, "int32")
        T.buffer_store(exponent, T.int32(0), [0])
        with when(inside):
            index = block.first_column + column
            T.buffer_store(exponent, T.Cast("int32", buffers["exponent"][index]), [0])
        for k in range(TILE_INPUTS):
            weight = encode(T.bind(signed_byte(word, k)), exponent[0])
            T.buffer_store(tile, weight, [group * TILE_INPUTS + k, column])

    _for_each_int8_word(block, buffers["codes"], *_shape(tile), first_input, body)


def load_float_weights(block: ThreadBlock, tile, linear: LinearDescription, buffers, first_input) -> None:
    """Fill a tile [inputs, columns] with packed weights as float32."""
    if linear.bits == 8:
        load_numbers(block, tile, buffers, first_input, _float_number)
    else:
        load_weights(block, tile, linear, buffers, first_input, _float_weight)


def power_of_two(exponent):
    """2^exponent as float32, for an int32 from -126 to 127."""
    return T.reinterpret("float32", T.shift_left(exponent + 127, T.int32(23)))


def _float_number(number, exponent):
    return T.Cast("float32", number) * power_of_two(exponent)


def _float_weight(code, negative, exponent):
    """The weight as float32, made of the bits of its sign and exponent without a multiplication."""
    magnitude = T.shift_left(code + exponent + 126, T.int32(23))
    bits = T.bitwise_or(magnitude, T.shift_left(negative, T.int32(31)))
    return T.reinterpret("float32", T.Select(code == 0, T.int32(0), bits))


def load_int8_weights(block: ThreadBlock, tile, linear: LinearDescription, codes, first_input) -> None:
    """Fill a tile [columns, inputs / 4] with words of four int8 weights: the powers of two / 2^exponent."""
    if codes.dtype == "int8":
        load_int8_words(block, tile, codes, first_input)
        return

    def body(group, column, inside, words):
        for half in range(2):
            word = _int8_word(T.shift_right(words[0], T.int32(4 * half)))
            T.buffer_store(tile, word, [column + half * HALF, group])

    columns, words = _shape(tile)
    _for_each_word(block, linear, codes, 4 * words, columns, first_input, body)


def _int8_word(codes):
    """Four int8 weights from the codes in the low halves of a word's bytes, all at once.

    2^(code - 1) is 1 shifted left by the code, bit by bit, and then right by one, which makes 0 of the code
    0. Shifts stay within their byte, since 2^7 fits it. Negation does not carry into the next byte, since a
    weight of 0 is never negative.
    """
    ones = 0x01010101
    powers = T.bind(T.int32(ones) + T.bitwise_and(codes, ones))
    for bit in (1, 2):
        chosen = T.bind(_bytes_of(codes, bit))
        shifted = T.shift_left(powers, T.int32(1 << bit))
        powers = T.bind(
            T.bitwise_or(T.bitwise_and(shifted, chosen), T.bitwise_and(powers, T.bitwise_not(chosen)))
        )
    magnitude = T.bitwise_and(T.shift_right(powers, T.int32(1)), 0x7F7F7F7F)
    negative = T.bind(_bytes_of(codes, 3))
    return T.bitwise_xor(magnitude, negative) + T.bitwise_and(negative, ones)


def _bytes_of(codes, bit):
    """255 in each byte whose bit is set, 0 in the others."""
    chosen = T.bind(T.bitwise_and(T.shift_right(codes, T.int32(bit)), 0x01010101))
    return T.shift_left(chosen, T.int32(8)) - chosen
