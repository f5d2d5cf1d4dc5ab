"""Products of a tile of rows with a panel of columns: the inner loops of all linear layers.

Rows and panels lie in memory as the target's instructions read them. A panel has as many columns as the tile
of sums that registers hold; the last panel may have fewer.
"""

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, NamedTuple

from tvm.script.ir_builder import tirx as T

from kernels_tvm.cpu import amx
from kernels_tvm.cpu.bfloat16 import bfloat16_pairs, exact_pairs, rounded_pairs, rounded_to_bfloat16
from kernels_tvm.cpu.decoding import quantize_row
from kernels_tvm.cpu.emit import constant, lanes, local, scratch, splat, split
from kernels_tvm.cpu.targets import Target
from kernels_tvm.descriptions import LANES, round_up
from kernels_tvm.emit import when

SHIFTED_ROWS = 4  # computed together by shifts; a weight's shift, sign and mask take registers, too


class _Panels:
    """How outputs are cut into panels: ``whole`` panels of ``columns``, and one of ``rest`` columns if any.

    Memory holds all panels if they are ``kept``, and otherwise one.
    """

    def __init__(self, outputs: int, columns: int, kept: bool):
        self.columns, self.kept = columns, kept
        self.whole, rest = divmod(outputs, columns)
        self.rest = round_up(rest, LANES)
        self.count = self.whole + (self.rest > 0)
        self.held = self.count if kept else 1
        self.needed = True

    def slot(self, panel):
        """The place of a panel among those in memory."""
        return panel if self.kept else 0


class FloatPanels(_Panels):
    """Weights for `float_product`: float32 [panel, inputs, columns], or pairs of bfloat16 numbers for AMX.

    Pair p of 32 inputs holds inputs p and p + 16, so that rows are paired by whole vectors, see `FloatRows`.
    For AMX a float32 number is its nearest bfloat16 number plus a rest that is rounded to bfloat16, too; for
    ``exact`` weights, which are bfloat16 numbers, there is no rest. Without AMX, weights that are ``given``
    as numbers are read where they lie: ``given(first column)`` is then the function that `weights` returns.
    """

    def __init__(
        self, target: Target, inputs: int, outputs: int, kept: bool, exact: bool, given: Callable | None
    ):
        super().__init__(outputs, target.float_tile[1], kept)
        self.amx, self.inputs, self.given = target.dot == "amx", inputs, given
        self.needed = self.amx or given is None
        if self.amx:
            self.pairs = round_up(inputs, amx.BF16_INPUTS) // 2
            size = self.held * self.pairs * self.columns
            self.parts = [scratch(size, "uint32") for _ in range(1 if exact else 2)]
            self.split = exact_pairs if exact else bfloat16_pairs
        elif self.needed:
            self.parts = [scratch(self.held * inputs * self.columns)]

    def start(self, panel):
        """Where a panel starts in each of ``parts``."""
        return self.slot(panel) * ((self.pairs if self.amx else self.inputs) * self.columns)

    def write(self, panel, columns: int, weights: Callable) -> None:
        """Fill a panel; ``weights(k, vector)`` is a vector of the weights of input ``k``."""
        start, vectors = T.bind(self.start(panel)), columns // LANES
        if not self.amx:
            with T.serial(0, self.inputs) as k:
                for j in range(vectors):
                    at = lanes(start + k * columns + j * LANES)
                    T.buffer_store(self.parts[0], weights(k, j), [at])
            return

        # Lane n of a vector of pairs holds the weights of two inputs for output n.
        def write_pairs(chunk, first, stop, present):
            with T.serial(first, stop) as pair:
                k = T.bind(chunk * amx.BF16_INPUTS + pair)
                inputs = [k, k + amx.BF16_INPUTS // 2][:present]
                for j in range(vectors):
                    values = [T.bind(weights(k, j)) for k in inputs] + [constant(0)] * (2 - present)
                    at = lanes(start + (chunk * (amx.BF16_INPUTS // 2) + pair) * columns + j * LANES)
                    for part, value in zip(self.parts, self.split(*values), strict=True):
                        T.buffer_store(part, value, [at])

        half = amx.BF16_INPUTS // 2
        chunks, rest = divmod(self.inputs, amx.BF16_INPUTS)
        if chunks:
            with T.serial(0, chunks) as chunk:
                write_pairs(chunk, 0, half, 2)
        if rest:
            both, some = max(rest - half, 0), min(rest, half)
            for first, stop, present in ((0, both, 2), (both, some, 1), (some, half, 0)):
                if first < stop:
                    write_pairs(chunks, first, stop, present)

    def weights(self, panel, columns: int) -> Callable:
        """A function (k, vector) that reads a panel's weights; not for AMX."""
        if self.given and not self.needed:
            return self.given(panel * self.columns)
        start = self.start(panel)
        return lambda k, vector: self.parts[0][lanes(start + k * columns + vector * LANES)]


class Int8Panels(_Panels):
    """Weights for `int8_product`: [panel, inputs / n, columns, n], with inputs padded with zeros.

    n is the target's ``dot_inputs``: 4 numbers of int8, or 2 of int16. ``offsets`` has the number from which
    each column's sum starts.
    """

    def __init__(self, target: Target, inputs: int, outputs: int, kept: bool):
        super().__init__(outputs, target.int8_tile[1], kept)
        self.target = target
        self.inputs = round_up(inputs, amx.INT8_INPUTS if target.dot == "amx" else 4)
        dtype = "int16" if target.dot_inputs == 2 else "int8"
        self.weights = scratch(self.held * self.inputs * self.columns, dtype)
        self.offsets = scratch(self.held * self.columns, "int32")

    def start(self, panel):
        """Where a panel starts in ``weights``."""
        return self.slot(panel) * (self.inputs * self.columns)

    def sum_columns(self, panel, columns: int) -> None:
        """Write -offset * the sum of each column's weights, which takes the activations' offset out again."""
        vectors, start = columns // LANES, self.start(panel)
        sums = local(columns, "int32")
        for j in range(vectors):
            T.buffer_store(sums, splat(T.int32(0)), [lanes(j * LANES)])
        if self.target.activation_offset:
            four = T.reinterpret("int32", T.broadcast(T.uint8(self.target.activation_offset), 4))
            with T.serial(0, self.inputs // 4) as group:
                for j in range(vectors):
                    at = start + (group * vectors + j) * 4 * LANES
                    dot(self.target, sums, j * LANES, four, self.weights, at)
        for j in range(vectors):
            value = splat(T.int32(0)) - sums[lanes(j * LANES)]
            T.buffer_store(self.offsets, value, [lanes(self.slot(panel) * self.columns + j * LANES)])


class Term(NamedTuple):
    """One power of two of each weight, see `ShiftPanels`."""

    left: Any
    sign: Any
    present: Any


class ShiftPanels(_Panels):
    """Weights for `shift_product`: for each power of two three arrays, int32 [panel, inputs, columns].

    A weight is the sum of ``terms`` powers. ``left`` is the number of bits to shift by; ``sign`` is -1 for
    negative powers, else 0; ``present`` is 0 where there is no power, else -1.
    """

    def __init__(self, target: Target, inputs: int, outputs: int, kept: bool, terms: int):
        super().__init__(outputs, target.int8_tile[1], kept)
        self.inputs = inputs
        size = self.held * round_up(inputs, 4) * self.columns
        self.terms = [Term(*(scratch(size, "int32") for _ in range(3))) for _ in range(terms)]

    def start(self, panel):
        """Where a panel starts in each array."""
        return self.slot(panel) * (round_up(self.inputs, 4) * self.columns)


class FloatRows:
    """A tile's rows for `float_product`: float32, or pairs of bfloat16 numbers for AMX (see `FloatPanels`).

    With ``rounded`` each number is rounded to bfloat16.
    """

    def __init__(self, target: Target, capacity: int, width: int, rounded: bool):
        self.amx, self.rounded = target.dot == "amx", rounded
        self.width = width
        self.stride = round_up(width, amx.BF16_INPUTS) // 2 if self.amx else width
        dtype, parts = ("uint32", 1 if rounded else 2) if self.amx else ("float32", 1)
        self.parts = [scratch(capacity * self.stride, dtype) for _ in range(parts)]

    @property
    def plain(self) -> bool:
        """Whether the first of ``parts`` holds the rows unchanged."""
        return not self.amx and not self.rounded

    def put(self, x, base, slot) -> None:
        """Write row ``slot`` from the float32 numbers of ``x`` from ``base`` on."""

        def load(vector):
            return T.bind(x[lanes(base + vector * LANES)])

        def store(vector, values):
            at = lanes(slot * self.stride + vector * LANES)
            for part, value in zip(self.parts, values, strict=True):
                T.buffer_store(part, value, [at])

        vectors = self.width // LANES
        if not self.amx:
            with T.serial(0, vectors) as vector:
                value = load(vector)
                store(vector, [rounded_to_bfloat16(value) if self.rounded else value])
            return
        split = rounded_pairs if self.rounded else bfloat16_pairs
        with T.serial(0, vectors // 2) as pair:
            store(pair, split(load(2 * pair), load(2 * pair + 1)))
        if vectors % 2:
            store(vectors // 2, split(load(vectors - 1), constant(0)))

    def clear(self, start, stop) -> None:
        """Set these rows to 0; not for AMX.

        Memory that was not written may hold denormal numbers, and some CPUs take 150 cycles to multiply one.
        """
        (part,) = self.parts
        with T.serial(0, (stop - start) * (self.width // LANES)) as vector:
            T.buffer_store(part, constant(0), [lanes(start * self.width + vector * LANES)])


class Int8Rows:
    """A tile's rows for `int8_product`: whole numbers plus the target's offset, and each row's scale."""

    plain = False

    def __init__(self, target: Target, capacity: int, width: int):
        self.target, self.width = target, width
        # A matrix register reads 64 numbers at a time, beyond the last row's end.
        self.whole = scratch(capacity * width + amx.INT8_INPUTS, target.row_dtype)
        self.scale = scratch(capacity)

    def put(self, x, base, slot) -> None:
        """Write row ``slot`` from the float32 numbers of ``x`` from ``base`` on."""
        quantize_row(self.target, x, base, self.width, self.whole, slot * self.width, self.scale, slot)


def float_product(
    target: Target,
    x: FloatRows,
    count,
    panels: FloatPanels,
    panel,
    columns: int,
    finish: Callable,
) -> None:
    """Emit the products of ``count`` rows with a panel.

    ``finish(row, vector, sums)`` takes a row's sums for a vector of the panel's columns. As many rows are
    computed at a time as registers hold; surplus rows of the last block are dropped.
    """
    if panels.amx:
        amx.float_product(x, count, panels, panel, columns, finish)
        return
    (rows_of_x,), stride, weights = x.parts, x.stride, panels.weights(panel, columns)
    vectors = columns // LANES

    def compute(first, rows, all_present):
        if not all_present:
            x.clear(T.min(first + rows, count), first + rows)
        sums = local(rows * columns)
        for i in range(rows * vectors):
            T.buffer_store(sums, constant(0), [lanes(i * LANES)])
        with T.serial(0, panels.inputs) as k:
            weight = [T.bind(weights(k, j)) for j in range(vectors)]
            for i in range(rows):
                value = T.bind(splat(rows_of_x[(first + i) * stride + k]))
                for j in range(vectors):
                    at = lanes((i * vectors + j) * LANES)
                    T.buffer_store(sums, sums[at] + value * weight[j], [at])
        _finish_rows(rows, vectors, first, count, all_present, sums, finish)

    _for_each_block(count, target.float_sums // columns, compute)


def int8_product(
    target: Target, x: Int8Rows, count, panels: Int8Panels, panel, columns: int, finish: Callable
) -> None:
    """`float_product` for rows of int8 numbers and an int8 panel, with int32 sums."""
    offset, start = T.bind(panels.slot(panel) * panels.columns), T.bind(panels.start(panel))
    if target.dot == "amx":
        amx.int8_product(x, count, panels, start, offset, columns, finish)
        return
    vectors, inputs = columns // LANES, target.dot_inputs

    def compute(first, rows, all_present):
        sums = local(rows * columns, "int32")
        for j in range(vectors):
            value = T.bind(panels.offsets[lanes(offset + j * LANES)])
            for i in range(rows):
                T.buffer_store(sums, value, [lanes((i * vectors + j) * LANES)])
        with T.serial(0, panels.inputs // inputs) as group:
            for i in range(rows):
                numbers = x.whole[lanes((first + i) * x.width + group * inputs, inputs)]
                word = T.bind(T.reinterpret("int32", numbers))
                for j in range(vectors):
                    at, place = (i * vectors + j) * LANES, start + (group * vectors + j) * inputs * LANES
                    dot(target, sums, at, word, panels.weights, place)
        _finish_rows(rows, vectors, first, count, all_present, sums, finish)

    _for_each_block(count, target.int8_sums // columns, compute)


def shift_product(
    target: Target, x: Int8Rows, count, panels: ShiftPanels, panel, columns: int, finish: Callable
) -> None:
    """`int8_product` with shifts and additions only: the pure MatShift."""
    start = T.bind(panels.start(panel))
    for vector in range(columns // LANES):
        with T.serial(0, T.ceildiv(count, SHIFTED_ROWS)) as block:
            _shift_block(target, x, count, panels, start, block * SHIFTED_ROWS, vector, columns, finish)


def _shift_block(target, x, count, panels, start, first, vector, columns, finish):
    sums = local(SHIFTED_ROWS * LANES, "int32")
    for i in range(SHIFTED_ROWS):
        T.buffer_store(sums, splat(T.int32(0)), [lanes(i * LANES)])
    with T.serial(0, panels.inputs) as k:
        at = lanes(start + k * columns + vector * LANES)
        for term in panels.terms:
            shift, negative, mask = (T.bind(part[at]) for part in term)
            for i in range(SHIFTED_ROWS):
                number = T.Cast("int32", x.whole[(first + i) * x.width + k]) - target.activation_offset
                shifted = T.bind(T.shift_left(splat(number), shift))
                signed = T.bind(T.bitwise_xor(shifted, negative) - negative)
                total = lanes(i * LANES)
                T.buffer_store(sums, sums[total] + T.bitwise_and(signed, mask), [total])
    for i in range(SHIFTED_ROWS):
        with when(first + i < count):
            finish(first + i, vector, sums[lanes(i * LANES)])


def _for_each_block(count, rows: int, compute: Callable) -> None:
    """Emit ``compute(first, rows, all_present)`` for blocks of ``rows`` rows, then for halves of a block.

    Only a half block asks whether its rows are there (``all_present`` is False). Such a branch in whole
    blocks would slow them down: LLVM moves computations into the branch that needs them.
    """
    half = max(1, rows // 2)
    whole, rest = split(count, rows)
    with T.serial(0, whole) as block:
        compute(T.bind(block * rows), rows, True)
    with T.serial(0, T.ceildiv(rest, half)) as block:
        compute(T.bind(whole * rows + block * half), half, False)


def _finish_rows(rows, vectors, first, count, all_present, sums, finish):
    for i in range(rows):
        with nullcontext() if all_present else when(first + i < count):
            for j in range(vectors):
                finish(first + i, j, sums[lanes((i * vectors + j) * LANES)])


def dot(target: Target, sums, at, word, panel, offset):
    """Add to sums[at + c] the dot product of a word's n numbers and the n weights from panel[offset + nc] on.

    n is the target's ``dot_inputs``; ``word`` is an int32 that holds as many numbers. With vpmaddubsw weights
    are at most 64, see `for_whole_int8`.
    """
    inputs = target.dot_inputs

    def lanes_of(count, part):
        return lanes(at + part * count, count), panel[lanes(offset + part * inputs * count, inputs * count)]

    def add_up(count, part, product):
        at, weights = lanes_of(count, part)
        T.buffer_store(sums, product(sums[at], weights), [at])

    match target.dot:
        case "vpdpbusd_512" | "amx":
            add_up(16, 0, lambda s, w: _vpdpbusd("512", 16, s, word, w))
        case "vpdpbusd_256":
            for part in range(2):
                add_up(8, part, lambda s, w: _vpdpbusd("256", 8, s, word, w))
        case "vpmaddubsw_512":
            add_up(
                16, 0, lambda s, w: s + _vpmadd("avx512.pmaddubs.w.512", "avx512.pmaddw.d.512", 16, word, w)
            )
        case "vpmaddubsw_256":
            for part in range(2):
                names = "avx2.pmadd.ub.sw", "avx2.pmadd.wd"
                add_up(8, part, lambda s, w, names=names: s + _vpmadd(*names, 8, word, w))
        case "vpmaddwd_512":
            add_up(16, 0, lambda s, w: s + _vpmaddwd("avx512.pmaddw.d.512", 16, word, w))
        case "vpmaddwd_256":
            for part in range(2):
                add_up(8, part, lambda s, w: s + _vpmaddwd("avx2.pmadd.wd", 8, word, w))
        case "sdot_128":
            for part in range(4):
                add_up(
                    4,
                    part,
                    lambda s, w: T.call_llvm_pure_intrin(
                        "int32x4",
                        "llvm.aarch64.neon.sdot.v4i32.v16i8",
                        s,
                        T.reinterpret("int8x16", splat(word, 4)),
                        w,
                    ),
                )


def _vpdpbusd(width, count, sums, word, weights):
    return T.call_llvm_pure_intrin(
        f"int32x{count}",
        f"llvm.x86.avx512.vpdpbusd.{width}",
        sums,
        T.reinterpret(f"int8x{4 * count}", splat(word, count)),
        weights,
    )


def _vpmadd(multiply, widen, count, word, weights):
    pairs = T.call_llvm_pure_intrin(
        f"int16x{2 * count}",
        f"llvm.x86.{multiply}",
        T.reinterpret(f"int8x{4 * count}", splat(word, count)),
        weights,
    )
    return T.call_llvm_pure_intrin(
        f"int32x{count}", f"llvm.x86.{widen}", pairs, T.broadcast(T.int16(1), 2 * count)
    )


def _vpmaddwd(name, count, word, weights):
    numbers = T.reinterpret(f"int16x{2 * count}", splat(word, count))
    return T.call_llvm_pure_intrin(f"int32x{count}", f"llvm.x86.{name}", numbers, weights)
