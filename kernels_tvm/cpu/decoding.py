"""Decoding of packed weights for the products, and quantization of float32 rows to int8."""

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu.emit import accumulate_rows, constant, element, lanes, local, splat
from kernels_tvm.cpu.targets import Target
from kernels_tvm.descriptions import LANES
from kernels_tvm.packing import SIGNS_OFFSET, TILE_INPUTS, TILE_OUTPUTS

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


def decode_float(linear, buffers: dict, first, columns: int, panel) -> None:
    """Write the weights of ``columns`` outputs from ``first`` on as float32, [inputs, columns], flat.

    A power of two is the float whose bits are its sign and its exponent: nothing is multiplied.
    """

    def store(k, output, code, negative):
        exponent = T.Cast(f"int32x{HALF}", buffers["exponent"][lanes(first + output, HALF)])
        magnitude = T.shift_left(code + exponent + splat(T.int32(126), HALF), splat(T.int32(23), HALF))
        sign = T.shift_left(negative, splat(T.int32(31), HALF))
        is_zero = code == splat(T.int32(0), HALF)
        value = T.Select(is_zero, splat(T.int32(0), HALF), T.bitwise_or(magnitude, sign))
        T.buffer_store(panel, T.reinterpret(f"float32x{HALF}", value), [lanes(k * columns + output, HALF)])

    _for_each_code(linear, buffers["codes"], first, columns, store)


def decode_shifts(linear, codes, first, columns: int, panels, panel) -> None:
    """Write the weights of ``columns`` outputs from ``first`` on into a panel of `ShiftPanels`."""
    start = T.bind(panels.start(panel))

    def store(k, output, code, negative):
        zero = splat(T.int32(0), HALF)
        at = [lanes(start + k * columns + output, HALF)]
        T.buffer_store(panels.left, T.max(code - splat(T.int32(1), HALF), zero), at)
        T.buffer_store(panels.sign, zero - negative, at)
        T.buffer_store(panels.present, T.Select(code == zero, zero, splat(T.int32(-1), HALF)), at)

    _for_each_code(linear, codes, first, columns, store)


def decode_int8(target: Target, linear, codes, first, columns: int, panels, panel) -> None:
    """Write the weights of ``columns`` outputs from ``first`` on into a panel of `Int8Panels`.

    They are the powers of two over 2^exponent, whole numbers up to 64.
    """
    count, table = 4 * HALF, _code_table()
    start = T.bind(panels.start(panel))
    groups = -(-linear.inputs // TILE_INPUTS)
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

    scale = max |x| / 127, or 1 for a row of zeros; the numbers are x * (127 / max |x|), rounded to even.
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
    T.buffer_store(scale, T.Select(some, peak * T.float32(1 / 127), T.float32(1)), [slot])
    with T.serial(0, width // LANES) as vector:
        # Adding 1.5 * 2^23 rounds a small number to a whole one, which is in the lowest bits of the sum.
        rounder = constant(1.5 * 2**23 + target.activation_offset)
        rounded = x[lanes(base + vector * LANES)] * splat(inverse) + rounder
        number = T.Cast(f"uint8x{LANES}", T.reinterpret(f"uint32x{LANES}", rounded))
        T.buffer_store(whole, number, [lanes(offset + vector * LANES)])
