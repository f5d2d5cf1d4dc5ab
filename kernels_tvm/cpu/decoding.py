"""Decoding of packed weights for the products, and quantization of float32 rows to int8."""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.emit import accumulate_rows, constant, element, lanes, local, opaque, splat
from kernels_tvm.cpu.targets import Target
from kernels_tvm.descriptions import LANES
from kernels_tvm.packing import SIGNS_OFFSET, TILE_BYTES, TILE_INPUTS, TILE_OUTPUTS

HALF = TILE_OUTPUTS // 2  # outputs whose codes are in the low halves of a tile's bytes


def power_of_two(exponent):
    """2^exponent as float32, for a vector of int32 exponents from -126 to 127."""
    bits = T.shift_left(exponent + splat(T.int32(127)), splat(T.int32(23)))
    return T.reinterpret(f"float32x{LANES}", bits)


def _for_each_code(linear, codes, first, columns, body):
    """``body(input, output, code, negative)`` for the weights of a panel, ``HALF`` outputs at a time.

    ``output`` counts from the panel's first one; ``code`` and ``negative`` (0 or 1) are int32 vectors.
    """
    word = f"int32x{HALF}"

    def bits(value, shift, mask):
        return T.bitwise_and(T.shift_right(value, shift), splat(T.int32(mask), HALF))

    with T.serial(0, -(-linear.inputs // TILE_INPUTS)) as group, T.serial(0, columns // TILE_OUTPUTS) as tile:
        block = T.bind(T.floordiv(first, TILE_OUTPUTS) + tile)
        # The four bytes of lane c have the codes of four inputs: low halves for output c, high ones for c +
        # 8.
        words = T.bind(T.reinterpret(word, codes[block, group, lanes(0, 4 * HALF)]))
        for half in range(2):
            signs = None  # codes of 4 bits hold them
            if linear.bits == 5:
                signs = T.reinterpret("int32", codes[block, group, lanes(SIGNS_OFFSET + 4 * half, 4)])
                signs = T.bind(T.shift_right(splat(signs, HALF), T.ramp(T.int32(0), T.int32(4), HALF)))
            for i in range(TILE_INPUTS):
                shift = splat(T.int32(8 * i + 4 * half), HALF)
                if linear.bits == 5:
                    code = T.bind(bits(words, shift, 15))
                    negative = T.bind(bits(signs, splat(T.int32(i), HALF), 1))
                else:
                    code = T.bind(bits(words, shift, 7))
                    negative = T.bind(bits(words, splat(T.int32(8 * i + 4 * half + 3), HALF), 1))
                body(T.bind(group * TILE_INPUTS + i), tile * TILE_OUTPUTS + half * HALF, code, negative)


def _for_each_word(tiles, first, columns, body):
    """``body(group, output, words)`` for the whole numbers of a panel, four inputs x 16 outputs at a time.

    ``output`` counts from the panel's first one. The bytes of a lane of ``words`` are an output's numbers.
    """
    groups = tiles.shape[1].value
    with T.serial(0, groups) as group, T.serial(0, columns // TILE_OUTPUTS) as tile:
        numbers = tiles[T.floordiv(first, TILE_OUTPUTS) + tile, group, lanes(0, TILE_BYTES[8])]
        body(group, tile * TILE_OUTPUTS, T.bind(T.reinterpret(f"int32x{LANES}", numbers)))


def _byte(words, byte: int):
    """The int8 number in a byte of each word, as int32."""
    return T.shift_right(T.shift_left(words, splat(T.int32(24 - 8 * byte))), splat(T.int32(24)))


def _for_each_number(tiles, first, columns, body):
    """``body(input, output, numbers)`` for the whole numbers of a panel, an int32 vector of outputs each."""

    def split(group, output, words):
        for i in range(TILE_INPUTS):
            body(T.bind(group * TILE_INPUTS + i), output, T.bind(_byte(words, i)))

    _for_each_word(tiles, first, columns, split)


def decode_float(linear, buffers: dict, first, columns: int, panel) -> None:
    """Write the weights of ``columns`` outputs from ``first`` on as float32, [inputs, columns], flat.

    A power of two is the float whose bits are its sign and its exponent: nothing is multiplied. Whole numbers
    are multiplied by a power of two, which is exact.
    """

    def store_number(k, output, number):
        exponent = T.Cast(f"int32x{LANES}", buffers["exponent"][lanes(first + output)])
        value = T.Cast(f"float32x{LANES}", number) * power_of_two(exponent)
        T.buffer_store(panel, value, [lanes(k * columns + output)])

    def store(k, output, code, negative):
        exponent = T.Cast(f"int32x{HALF}", buffers["exponent"][lanes(first + output, HALF)])
        magnitude = T.shift_left(code + exponent + splat(T.int32(126), HALF), splat(T.int32(23), HALF))
        sign = T.shift_left(negative, splat(T.int32(31), HALF))
        is_zero = code == splat(T.int32(0), HALF)
        value = T.Select(is_zero, splat(T.int32(0), HALF), T.bitwise_or(magnitude, sign))
        T.buffer_store(panel, T.reinterpret(f"float32x{HALF}", value), [lanes(k * columns + output, HALF)])

    if linear.bits == 8:
        _for_each_number(buffers["codes"], first, columns, store_number)
    else:
        _for_each_code(linear, buffers["codes"], first, columns, store)


def decode_shifts(linear, codes, first, columns: int, panels, panel) -> None:
    """Write the weights of ``columns`` outputs from ``first`` on into a panel of `ShiftPanels`."""
    start = T.bind(panels.start(panel))

    def store_number(k, output, number):
        at, rest = [lanes(start + k * columns + output)], number
        for term in panels.terms:
            left, sign, present, power = _nearest_power(rest)
            rest = opaque(rest - power, "int32", LANES)
            for part, value in zip(term, (left, sign, present), strict=True):
                T.buffer_store(part, value, at)

    def store(k, output, code, negative):
        zero, (term,) = splat(T.int32(0), HALF), panels.terms
        at = [lanes(start + k * columns + output, HALF)]
        T.buffer_store(term.left, T.max(code - splat(T.int32(1), HALF), zero), at)
        T.buffer_store(term.sign, zero - negative, at)
        T.buffer_store(term.present, T.Select(code == zero, zero, splat(T.int32(-1), HALF)), at)

    if linear.bits == 8:
        _for_each_number(codes, first, columns, store_number)
    else:
        _for_each_code(linear, codes, first, columns, store)


def _nearest_power(number):
    """The signed power of two nearest to each number: its shift, sign and presence, and its value.

    Of two equally near it is the smaller one: 96 = 64 + 32. What is left of a sum or difference of two powers
    is 0 or a power.
    """
    sign = T.bind(T.shift_right(number, splat(T.int32(31))))
    magnitude = T.bind(T.bitwise_xor(number, sign) - sign)
    present = T.bind(T.Select(magnitude == splat(T.int32(0)), splat(T.int32(0)), splat(T.int32(-1))))
    # A float's exponent is that of the power below; the addition carries into it beyond 1.5 times the power.
    bits = T.reinterpret(f"int32x{LANES}", T.Cast(f"float32x{LANES}", magnitude))
    exponent = T.shift_right(bits + splat(T.int32(0x3FFFFF)), splat(T.int32(23)))
    left = T.bind(T.max(exponent - splat(T.int32(127)), splat(T.int32(0))))
    power = T.bitwise_xor(T.shift_left(splat(T.int32(1)), left), sign) - sign
    return left, sign, present, T.bitwise_and(power, present)


def copy_int8(target: Target, tiles, first, columns: int, panels, panel) -> None:
    """Write the whole numbers of ``columns`` outputs from ``first`` on into a panel of `Int8Panels`."""
    start = T.bind(panels.start(panel))

    def copy(group, output, words):
        at = T.bind(start + (group * columns + output) * TILE_INPUTS)
        T.buffer_store(
            panels.weights, T.reinterpret(f"int8x{TILE_BYTES[8]}", words), [lanes(at, TILE_BYTES[8])]
        )

    def widen(group, output, words):
        for pair in range(2):
            low, high = (_byte(words, 2 * pair + i) for i in range(2))
            low = T.bitwise_and(low, splat(T.int32(0xFFFF)))
            numbers = T.bitwise_or(low, T.shift_left(high, splat(T.int32(16))))
            at = T.bind(start + ((group * 2 + pair) * columns + output) * 2)
            T.buffer_store(
                panels.weights, T.reinterpret(f"int16x{2 * LANES}", numbers), [lanes(at, 2 * LANES)]
            )

    _for_each_word(tiles, first, columns, copy if target.dot_inputs == TILE_INPUTS else widen)
    _clear_padding(panels, start, columns, tiles.shape[1].value)


def decode_int8(target: Target, codes, first, columns: int, panels, panel) -> None:
    """Write the weights of ``columns`` outputs from ``first`` on into a panel of `Int8Panels`.

    They are the powers of two over 2^exponent, whole numbers up to 64, from codes of 4 bits.
    """
    count, table = 4 * HALF, _code_table()
    start = T.bind(panels.start(panel))
    groups = codes.shape[1].value
    with T.serial(0, groups) as group, T.serial(0, columns // TILE_OUTPUTS) as tile:
        pairs = T.bind(codes[T.floordiv(first, TILE_OUTPUTS) + tile, group, lanes(0, count)])
        halves = (
            T.bitwise_and(pairs, splat(T.uint8(15), count)),
            T.shift_right(pairs, splat(T.uint8(4), count)),
        )
        for half in range(2):
            weights = _look_up(target, table, T.bind(halves[half]))
            offset = (group * columns + tile * TILE_OUTPUTS + half * HALF) * TILE_INPUTS
            T.buffer_store(panels.weights, weights, [lanes(start + offset, count)])
    _clear_padding(panels, start, columns, groups)


def _clear_padding(panels, start, columns, groups):
    """Set the weights after the last group of four inputs to 0."""
    padding = panels.inputs - groups * TILE_INPUTS
    if padding:
        after = start + groups * TILE_INPUTS * columns
        with T.serial(0, padding * columns // 64) as vector:
            T.buffer_store(panels.weights, T.broadcast(T.int8(0), 64), [lanes(after + vector * 64, 64)])


def _code_table():
    """The int8 weight of each 4-bit code, for each half of a byte shuffle of 32 bytes."""
    table = local(32, "int8")
    for code in range(32):
        magnitude = (1 << (code & 7)) >> 1
        T.buffer_store(table, T.int8(-magnitude if code & 8 else magnitude), [code])
    return table


def _look_up(target, table, index):
    if target.machine == "x86_64":
        index = T.reinterpret("int8x32", index)
        return T.call_llvm_pure_intrin("int8x32", "llvm.x86.avx2.pshuf.b", table[lanes(0, 32)], index)
    # LLVM names no byte shuffle for this machine, so each code takes a comparison.
    result = T.broadcast(T.int8(0), 32)
    for code in range(1, 16):
        magnitude = (1 << (code & 7)) >> 1
        value = T.broadcast(T.int8(-magnitude if code & 8 else magnitude), 32)
        result = T.Select(index == T.broadcast(T.uint8(code), 32), value, result)
    return result


def quantize_row(target: Target, x, base, width: int, whole, offset, scale, slot) -> None:
    """Write a row of ``x`` as whole numbers from -127 to 127, plus the target's offset, and their scale.

    scale = max |x| / 127, or 1 for a row of zeros; the numbers are x * (127 / max |x|), rounded to even. The
    scale of a row that is not finite is not finite either.
    """

    def magnitude(_, vector):
        # The bits of magnitudes, read as whole numbers, have the same order; their maximum is one
        # instruction.
        bits = T.reinterpret(f"int32x{LANES}", x[lanes(base + vector * LANES)])
        return T.bitwise_and(bits, splat(T.int32(0x7FFFFFFF)))

    largest = element(accumulate_rows(1, width // LANES, magnitude, T.max, "int32"), 0)
    peak = T.bind(T.reinterpret("float32", largest))
    some = T.bind(peak > T.float32(0))
    inverse = T.bind(T.Select(some, T.float32(127) / T.max(peak, T.float32(1e-30)), T.float32(0)))
    T.buffer_store(scale, T.Select(peak == T.float32(0), T.float32(1), peak * T.float32(1 / 127)), [slot])

    def rounded(vector, surplus=0):
        # Adding 1.5 * 2^23 rounds a small number to a whole one, which is in the lowest bits of the sum.
        rounder = constant(1.5 * 2**23 + target.activation_offset + surplus)
        return T.reinterpret(f"uint32x{LANES}", x[lanes(base + vector * LANES)] * splat(inverse) + rounder)

    vectors = width // LANES
    fours = vectors // 4 if target.row_dtype == "uint8" else 0
    with T.serial(0, fours) as four:
        numbers = [rounded(four * 4 + part, _BYTES_SURPLUS if part == 2 else 0) for part in range(4)]
        T.buffer_store(whole, _as_bytes(numbers), [lanes(offset + four * (4 * LANES), 4 * LANES)])
    with T.serial(4 * fours, vectors) as vector:
        number = T.Cast(f"{target.row_dtype}x{LANES}", rounded(vector))
        T.buffer_store(whole, number, [lanes(offset + vector * LANES)])


# What the third of `_as_bytes`' four vectors has in excess, so that the upper bits of 1.5 * 2^23 in the first
# two, 0x4B400000 and that shifted by 8, vanish from the sum.
_BYTES_SURPLUS = (-(0x4B400000 + (0x4B400000 << 8)) >> 16) % 2**16


def _as_bytes(vectors):
    """The bytes in the lowest bits of four vectors, one vector after the other.

    Each is shifted to a place of its own in the lanes of their sum, and a permutation puts all in order. The
    bits above the lowest eight must be those of 1.5 * 2^23, in the third with `_BYTES_SURPLUS`.
    Where casting a vector takes two instructions of the unit that looks up tables, this is quicker.
    """
    first, second, third, fourth = vectors
    left = T.bind(first + T.shift_left(second, splat(T.uint32(8))))
    right = T.bind(third + T.shift_left(fourth, splat(T.uint32(8))))
    lanes_ = T.bind(left + T.shift_left(right, splat(T.uint32(16))))
    order = [4 * lane + byte for byte in range(4) for lane in range(LANES)]
    return T.Shuffle([T.reinterpret(f"uint8x{4 * LANES}", lanes_)], order)
