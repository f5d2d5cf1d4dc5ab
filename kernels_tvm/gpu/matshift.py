"""MatShift on GPUs: rows times a packed power-of-two weight, plus a bias."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T

from kernels_tvm.descriptions import LinearDescription
from kernels_tvm.emit import Arguments, kernel, when
from kernels_tvm.gpu.emit import barrier, launch, opaque, quad, registers, shared, words_of
from kernels_tvm.gpu.instructions import round_to_even, signed_byte
from kernels_tvm.gpu.products import (
    DOT_TILE,
    FLOATS,
    OUTER_TILE,
    TENSOR_TILE,
    THREADS,
    Arithmetic,
    Tile,
    dot_product,
    outer_product,
    tensor_product,
)
from kernels_tvm.gpu.targets import GpuTarget
from kernels_tvm.gpu.tiles import (
    Rows,
    ThreadBlock,
    load_blocks,
    load_float_weights,
    load_floats,
    load_int8_weights,
    load_numbers,
    load_rows,
    load_weights,
    power_of_two,
)

QUANTIZED_ROWS = 16  # that a block quantizes
QUANTIZING = THREADS // QUANTIZED_ROWS  # threads that share a row


def scratch(linear: LinearDescription, rows) -> list[tuple[str, tuple, str]]:
    """Name, shape and dtype of the arrays that pass from launch to launch; ``rows`` is a number or symbol."""
    if not any(_takes_int8(linear, kind) for kind in linear.experts):
        return []
    return [("whole", (rows, linear.width), "int8"), ("row_scale", (rows,), "float32")]


def _takes_int8(linear: LinearDescription, kind: str) -> bool:
    """Whether rows are quantized for the weights of a kind."""
    return (linear.precision if kind == "dense" else linear.activations) == "int8"


def linear_kernel(target: GpuTarget, linear: LinearDescription):
    """``y = linear(x)``: x [rows, inputs] float32, the parameters, scratch, y [rows, outputs] float32."""

    def body(x, buffers, y, limit):
        launch_expert(target, linear, linear.kind, x, buffers, Results(y, limit, lambda: Rows(limit)))

    return layer_kernel(linear, scratch(linear, "rows"), body)


def layer_kernel(linear: LinearDescription, between: list[tuple[str, tuple, str]], body: Callable):
    """The kernel whose launches ``body(x, buffers, y, rows)`` emits, for at least one row.

    The kernel takes x [rows, inputs] float32, the layer's parameters, the arrays ``between`` launches, and
    y [rows, outputs] float32. ``buffers`` has the parameters and the arrays between launches by name.
    """

    def declare(arguments: Arguments):
        x = arguments("x", ("rows", linear.inputs), "float32")
        buffers = {
            name: arguments(name, shape, dtype) for name, shape, dtype in [*linear.arguments(), *between]
        }
        y = arguments("y", ("rows", linear.outputs), "float32")
        rows = arguments.symbols["rows"]
        with when(rows > 0):
            body(x, buffers, y, rows)

    return kernel(declare)


@dataclass(frozen=True)
class Results:
    """Where an expert's results go.

    Attributes:
      y: [rows, outputs] float32.
      limit: rows at most. Launches have blocks for all of them; blocks beyond the expert's rows return at
        once.
      rows: returns the expert's rows; each launch calls it.
      gate: ``gate(row)`` is the factor of a row's results.
    """

    y: Any
    limit: Any
    rows: Callable[[], Rows]
    gate: Callable | None = None

    def launch(self, tile: Tile, compute: Callable) -> None:
        """Launch ``compute(block, rows)`` in blocks that cover the rows and outputs with tiles."""
        tiles = T.ceildiv(self.limit, tile.rows), -(-self.y.shape[1].value // tile.columns)
        with launch(THREADS, *tiles) as (down, across, thread):
            rows = self.rows()
            block = ThreadBlock(THREADS, thread, T.bind(down * tile.rows), T.bind(across * tile.columns))
            with when(block.first_row < rows.count):
                compute(block, rows)

    def store(self, block: ThreadBlock, rows: Rows, bias, scale: Callable | None = None) -> Callable:
        """The ``finish`` of a product: stores sums times ``scale(position, column)``, plus the bias."""
        outputs = self.y.shape[1].value

        def finish(row, column, sums):
            position, column = T.bind(block.first_row + row), T.bind(block.first_column + column)
            count = len(sums)
            with when(position < rows.count):
                target_row = T.bind(rows[position])
                gate = self.gate and T.bind(self.gate(target_row))

                def result(i):
                    value = T.Cast("float32", sums[i])
                    if scale:
                        value = value * scale(position, column + i)
                    value = value + bias[column + i]
                    return value * gate if self.gate else value

                if outputs % count == 0:
                    with when(column < outputs):
                        values = registers(count)
                        for i in range(count):
                            T.buffer_store(values, result(i), [i])
                        lanes = T.ramp(0, 1, count) if count > 1 else 0
                        T.buffer_store(self.y, values[lanes], [target_row, column + lanes])
                else:
                    for i in range(count):
                        with when(column + i < outputs):
                            T.buffer_store(self.y, result(i), [target_row, column + i])

        return finish


def launch_expert(
    target: GpuTarget, linear: LinearDescription, kind: str, x, buffers: dict, results: Results
) -> None:
    """Launch the layer of one kind, dense or shift, that computes the results."""
    if _takes_int8(linear, kind):
        _launch_quantization(target, linear, x, buffers, results)
        if kind == "shift" and linear.shifts:
            _launch_shifts(linear, buffers, results)
        else:
            _launch_int8(target, linear, kind, buffers, results)
    elif kind == "dense":
        _launch_dense(linear, x, buffers, results)
    else:
        by_addition = linear.shifts and linear.bits != 8
        (_launch_exponents if by_addition else _launch_floats)(linear, x, buffers, results)


def _launch_dense(linear, x, buffers, results):
    def compute(block, rows):
        def load(x_tile, w_tile, first):
            load_floats(block, x_tile, x, rows, first)
            load_blocks(block, w_tile, buffers["blocks"], first)

        finish = results.store(block, rows, buffers["bias"])
        outer_product(block, linear.inputs, FLOATS, load, finish)

    results.launch(OUTER_TILE, compute)


def _launch_floats(linear, x, buffers, results):
    def compute(block, rows):
        def load(x_tile, w_tile, first):
            load_floats(block, x_tile, x, rows, first)
            load_float_weights(block, w_tile, linear, buffers, first)

        finish = results.store(block, rows, buffers["shift_bias"])
        outer_product(block, linear.inputs, FLOATS, load, finish)

    results.launch(OUTER_TILE, compute)


# A float32 times +-2^n is one addition of integers: n is added to the exponent's bits, and the highest bit to
# flip the sign. A weight is stored as that addend, and a weight of 0 as 1, which is no addend. Rows must be 0
# or normal numbers: the sum is wrong for denormal ones.
_EXPONENTS = Arithmetic(
    "int32",
    "float32",
    row=lambda bits: (T.bind(bits), T.bind(T.Select(bits == 0, T.int32(0), T.int32(-1)))),
    weight=lambda addend: (T.bind(addend), T.bind(T.bitwise_and(addend, 1) - 1)),
    add=lambda total, row, weight: (
        total + T.reinterpret("float32", T.bitwise_and(row[0] + weight[0], T.bitwise_and(row[1], weight[1])))
    ),
)


def _normal_bits(x):
    bits = T.bind(T.reinterpret("int32", x))
    return T.Select(T.bitwise_and(bits, 0x7F800000) == 0, T.int32(0), bits)


def _addend(code, negative, exponent):
    """The addend of a weight +-2^(code - 1); the output's own exponent scales the sums in the end."""
    addend = T.bitwise_or(T.shift_left(code - 1, T.int32(23)), T.shift_left(negative, T.int32(31)))
    return T.Select(code == 0, T.int32(1), addend)


def _launch_exponents(linear, x, buffers, results):
    """`_launch_floats` without multiplications, except of the sums by a scale; for magnitudes below 2^113."""

    def compute(block, rows):
        def load(x_tile, w_tile, first):
            load_floats(block, x_tile, x, rows, first, _normal_bits)
            load_weights(block, w_tile, linear, buffers, first, _addend)

        finish = results.store(block, rows, buffers["shift_bias"], lambda _, column: _power(buffers, column))
        outer_product(block, linear.inputs, _EXPONENTS, load, finish)

    results.launch(OUTER_TILE, compute)


def _power(buffers, column):
    return power_of_two(T.Cast("int32", buffers["exponent"][column]))


def _store_int8(block, rows, kind, buffers, results):
    """The ``finish`` of a product of whole numbers."""

    def scale(position, column):
        weight_scale = buffers["scale"][column] if kind == "dense" else _power(buffers, column)
        return weight_scale * buffers["row_scale"][position]

    bias = buffers["bias" if kind == "dense" else "shift_bias"]
    return results.store(block, rows, bias, scale)


def _launch_int8(target, linear, kind, buffers, results):
    weights = buffers["blocks" if kind == "dense" else "codes"]
    words = linear.width // 4
    x_words = words_of(buffers["whole"], (results.limit, words))
    product, tile = (tensor_product, TENSOR_TILE) if target.int8_mma else (dot_product, DOT_TILE)

    def compute(block, rows):
        def load(x_tile, w_tile, first):
            def read(position, word):
                T.buffer_store(
                    four := registers(4, "int32"), x_words[position, quad(first + word)], [quad(0)]
                )
                return [four[i] for i in range(4)]

            load_rows(block, x_tile, rows.count, 4, lambda word: first + word < words, read)
            load_int8_weights(block, w_tile, linear, weights, T.bind(first * 4))

        finish = _store_int8(block, rows, kind, buffers, results)
        product(target, block, words, load, finish)

    results.launch(tile, compute)


# A power of two +-2^n is stored in a byte: n in the lowest three bits, 8 for a power that is there, and the
# sign in the highest bit; 0 for none.
def _shifts(terms: int) -> Arithmetic:
    """Products with weights that are sums of so many powers, a byte of the weight for each."""

    def split(weight):
        """Shift, sign and presence of each power; the last two are 0 or -1."""
        return [
            tuple(
                T.bind(part)
                for part in (
                    T.bitwise_and(T.shift_right(weight, T.int32(8 * term)), 7),
                    _spread(weight, 8 * term + 7),
                    _spread(weight, 8 * term + 3),
                )
            )
            for term in range(terms)
        ]

    def add(total, row, powers):
        for left, sign, present in powers:
            signed = T.bitwise_xor(T.shift_left(row, left), sign)
            total = total + T.bitwise_and(signed, present) - sign
        return total

    return Arithmetic("int32", "int32", weight=split, add=add)


def _spread(word, bit: int):
    """-1 if the bit is set, else 0."""
    return T.shift_right(T.shift_left(word, T.int32(31 - bit)), T.int32(31))


def _shift(code, negative, exponent):
    weight = T.bitwise_or(T.bitwise_or(code - 1, 8), T.shift_left(negative, T.int32(7)))
    return T.Select(code == 0, T.int32(0), weight)


def _two_shifts(number, exponent):
    first, rest = _nearest_power(number)
    second, _ = _nearest_power(rest)
    return T.bitwise_or(first, T.shift_left(second, T.int32(8)))


def _nearest_power(number):
    """The byte of the signed power of two nearest to a number, and the rest.

    Of two equally near powers it is the smaller one: 96 = 64 + 32. What is left of a sum or difference of two
    powers is 0 or a power.
    """
    number = opaque(number)
    sign = T.bind(T.shift_right(number, T.int32(31)))
    # A float's exponent is that of the power below; the addition carries into it beyond 1.5 times the power.
    magnitude = opaque(T.Cast("float32", T.bitwise_xor(number, sign) - sign), "float32")
    bits = T.reinterpret("int32", magnitude)
    left = opaque(T.max(T.shift_right(bits + 0x3FFFFF, T.int32(23)) - 127, 0))
    byte = T.bitwise_or(T.bitwise_or(left, 8), T.bitwise_and(sign, 128))
    rest = number - (T.bitwise_xor(T.shift_left(T.int32(1), left), sign) - sign)
    return (T.Select(number == 0, T.int32(0), part) for part in (byte, rest))


def _launch_shifts(linear, buffers, results):
    """`_launch_int8` with shifts and additions only."""
    arithmetic = _shifts(terms=2 if linear.bits == 8 else 1)
    x_words = words_of(buffers["whole"], (results.limit, linear.width // 4))

    def compute(block, rows):
        def load(x_tile, w_tile, first):
            def read(position, column):
                word = T.bind(x_words[position, (first + column) // 4])
                return [signed_byte(word, i) for i in range(4)]

            load_rows(block, x_tile, rows.count, 4, lambda column: first + column < linear.width, read)
            if linear.bits == 8:
                load_numbers(block, w_tile, buffers, first, _two_shifts)
            else:
                load_weights(block, w_tile, linear, buffers, first, _shift)

        finish = _store_int8(block, rows, "shift", buffers, results)
        outer_product(block, linear.inputs, arithmetic, load, finish)

    results.launch(OUTER_TILE, compute)


def _launch_quantization(target, linear, x, buffers, results):
    """Write rows as whole numbers from -127 to 127, and their scales.

    scale = max |x| / 127, or 1 for a row of zeros; the numbers are x * (127 / max |x|), rounded to even. The
    scale of a row that is not finite is not finite either.
    """
    whole = words_of(buffers["whole"], (results.limit, linear.width // 4))
    with launch(THREADS, T.ceildiv(results.limit, QUANTIZED_ROWS)) as (down, _, thread):
        rows = results.rows()
        row, lane = T.bind(thread // QUANTIZING), T.bind(thread % QUANTIZING)
        position = T.bind(down * QUANTIZED_ROWS + row)
        # The bits of magnitudes, read as whole numbers, have the same order, NaN above all; the maximum of
        # floats loses NaN.
        peaks = shared((QUANTIZED_ROWS, QUANTIZING), "int32")
        largest, four = registers(1, "int32"), registers(4)
        T.buffer_store(largest, T.int32(0), [0])

        def for_each_word(body):
            source = T.bind(rows[position])
            with T.serial(0, T.ceildiv(linear.width // 4 - lane, QUANTIZING)) as turn:
                word = T.bind(turn * QUANTIZING + lane)
                load_four(x, source, word * 4, four)
                body(word)

        def look(word):
            for i in range(4):
                magnitude = T.bitwise_and(T.reinterpret("int32", four[i]), 0x7FFFFFFF)
                T.buffer_store(largest, T.max(largest[0], magnitude), [0])

        with when(position < rows.count):
            for_each_word(look)
        T.buffer_store(peaks, largest[0], [row, lane])
        barrier()
        with T.unroll(0, QUANTIZING) as other:
            T.buffer_store(largest, T.max(largest[0], peaks[row, other]), [0])
        peak = T.bind(T.reinterpret("float32", largest[0]))
        some = T.bind(peak > T.float32(0))
        inverse = T.bind(T.Select(some, T.float32(127) / T.max(peak, T.float32(1e-30)), T.float32(0)))

        def write(word):
            packed = T.int32(0)
            for i in range(4):
                number = T.Cast("int32", round_to_even(target, four[i] * inverse))
                packed = T.bitwise_or(packed, T.shift_left(T.bitwise_and(number, 255), T.int32(8 * i)))
            T.buffer_store(whole, packed, [position, word])

        with when(position < rows.count):
            for_each_word(write)
            with when(lane == 0):
                scale = T.Select(peak == T.float32(0), T.float32(1), peak * T.float32(1 / 127))
                T.buffer_store(buffers["row_scale"], scale, [position])


def load_four(x, row, column, four):
    """Read four numbers of a row, and zeros beyond its end."""
    inputs = x.shape[1].value
    for i in range(4):
        T.buffer_store(four, T.float32(0), [i])
    if inputs % 4 == 0:
        with when(column < inputs):
            T.buffer_store(four, x[row, quad(column)], [quad(0)])
    else:
        for i in range(4):
            with when(column + i < inputs):
                T.buffer_store(four, x[row, column + i], [i])
