"""Energy of products: of their arithmetic alone, and on an accelerator that moves their numbers.

The accelerator is Eyeriss-like: 16 x 12 processing elements at 250 MHz with registers of their own, a network
between them, a buffer, and DRAM. A product is cut into tiles, which say how often each number crosses each
level. The best of all tilings is taken. There are two models of the accelerator:

- ``"authors"`` is the model behind the paper's figures. It gives the figures of the authors' public code.
- ``"own"`` has the same traffic between the same levels, without what is implausible in the authors' model:

  - Additions cost no memory traffic there, but for registers. Here every operand comes from DRAM.
  - All numbers of a product have the same bits there, weights, tokens and sums alike, those of a shift always
    10. Here each operand has its own: 1 a code, 5 a power-of-two weight, 32 a sum.
  - A multiply-accumulate does not accumulate there. Here its sum costs an addition.
  - On-chip accesses cost 3.7 times the ratios of Eyeriss there, as if those were to a float32 multiplication.
  - The tiling there is best in energy over the largest energy plus latency over the largest latency. Where
    some tiling is very slow, this rank finds no fault with slow ones: additions of 8 bits take as long as
    those of 32, on four times as many elements. Here the tiling is best in energy times latency.
  - A shift takes 10/32 of a multiplication's cycle there. Here an element computes one product a cycle, or as
    many as numbers fit in 32 bits.
  - Heads of an attention share their keys and values there. Here each reads its own.
  - Tiles divide sizes exactly there, so that 197 tokens are hardly cut. Here elements may stay idle.
"""

import dataclasses
import itertools
import math
import tomllib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from shiftaddvit_jax.costs.counting import Product
from shiftaddvit_jax.validation import check_choice

UNIT_ENERGIES = tomllib.loads(Path(__file__).with_name("unit_energies.toml").read_text())
FORMATS = {"float32": 32, "float16": 16, "int32": 32, "int8": 8}  # their bits
OPERANDS = ("input", "weight", "output")
LEVELS = ("dram", "buffer", "network", "registers")
# Picojoules of an access to 16 bits, [levels, operands].
ACCESS = np.array([[UNIT_ENERGIES["access"][level][name] for name in OPERANDS] for level in LEVELS])

ELEMENTS = 16 * 12  # processing elements
CYCLE = 1 / 250e6  # seconds
WORD = 32  # bits
# Words of an element's registers, and of the buffer.
REGISTERS = {"input": 12, "weight": 192 * 5, "output": 16}
BUFFER = 65536

MODES = ("own", "authors")
Mode = Literal["own", "authors"]
NumberFormat = Literal["float32", "float16", "int32", "int8"]

AUTHORS_BITS = {"float32": 32, "int8": 8}
# In the authors' model all numbers of a shift have half of 16 and 5 bits, and are computed as much faster.
AUTHORS_SHIFT_BITS = 10
AUTHORS_ON_CHIP = 3.7  # the factor of all accesses but DRAM's in the authors' model
AUTHORS_PRIMITIVES = {"macs": "multiply", "shifts": "shift", "adds": "add", "popcounts": "add"}


@dataclass(frozen=True)
class Cost:
    """What a product costs on the accelerator.

    Attributes:
      energy_mj: millijoules.
      latency_s: seconds.
      compute_mj: the arithmetic's part of the energy.
      access_mj: the part of each level's accesses to each operand, [levels, operands], in the order of
        `LEVELS` and `OPERANDS`.
      min_energy_mj: the energy of the most frugal tiling.
      min_latency_s: the latency of the fastest tiling.
    """

    energy_mj: float
    latency_s: float
    compute_mj: float
    access_mj: tuple[tuple[float, ...], ...]
    min_energy_mj: float
    min_latency_s: float


def in_format(product: Product, number_format: NumberFormat | None) -> Product:
    """``product`` with its numbers in another format; codes and power-of-two weights keep their bits.

    Sums of int8 numbers have 32 bits.

    Raises:
      ValueError: an unknown format.
    """
    if number_format is None:
        return product
    check_choice("number format", number_format, FORMATS)
    bits, is_float = FORMATS[number_format], number_format.startswith("float")
    numbers = {"macs": ("input_bits", "weight_bits"), "adds": ("weight_bits",), "shifts": ("input_bits",)}
    changed: dict[str, Any] = dict.fromkeys(numbers.get(product.primitive, ()), bits)
    return dataclasses.replace(product, **changed, output_bits=bits if is_float else 32, is_float=is_float)


def compute_energy(product: Product, number_format: NumberFormat | None = None) -> float:
    """Millijoules of a product's arithmetic, its sums included.

    A shift of a floating-point number is an int8 addition to its exponent. An XOR and popcount of 32 bits
    costs as much as an int32 addition. By default, numbers have the formats in which the model computes.

    Raises:
      ValueError: a format without unit energies.
    """
    product = in_format(product, number_format)
    add = _unit_energy("add", product.output_bits, product.is_float)
    if product.primitive == "macs":
        bits = max(product.input_bits, product.weight_bits)
        unit = _unit_energy("multiply", bits, product.is_float) + add
    elif product.primitive == "shifts" and product.is_float:
        unit = UNIT_ENERGIES["int8"]["add"] + add
    elif product.primitive == "shifts":
        unit = _unit_energy("shift", product.input_bits, False) + add
    elif product.primitive == "adds":
        unit = add
    else:
        unit = UNIT_ENERGIES["int32"]["add"] / 32
    return product.count * unit * 1e-9


def _unit_energy(operation, bits, is_float):
    name = f"{'float' if is_float else 'int'}{bits}"
    if operation not in UNIT_ENERGIES.get(name, ()):
        raise ValueError(
            f"no energy is known of {name} {operation}; give a number format among {', '.join(FORMATS)}"
        )
    return UNIT_ENERGIES[name][operation]


def accelerator_cost(product: Product, number_format: NumberFormat | None = None, mode: Mode = "own") -> Cost:
    """Energy and latency of a product on the accelerator, by its best tiling.

    Raises:
      ValueError: an unknown mode; a format without unit energies; or, in the mode ``"authors"``, a format
        other than float32 and int8.
    """
    check_choice("mode", mode, MODES)
    rows = round(product.rows * product.share)
    if rows == 0:
        return Cost(0.0, 0.0, 0.0, ((0.0,) * len(OPERANDS),) * len(LEVELS), 0.0, 0.0)
    # The same shape has the same cost wherever it is.
    product = dataclasses.replace(product, module="", share=1.0, rows=rows)
    if product.image[0] == 1:
        # A convolution over one row lies along the array's height.
        turned = ("image", "kernel", "grid", "stride")
        product = dataclasses.replace(product, **{name: getattr(product, name)[::-1] for name in turned})
    if product.kernel[1] >= REGISTERS["input"]:
        product = _of_patches(product)
    if mode == "authors":
        return _authors_cost(product, number_format or "float32")
    if product.kernel == product.stride:
        product = _of_patches(product)
    return _own_cost(in_format(product, number_format))


def _of_patches(conv):
    """A convolution as the matrix product of its patches: the same where they do not overlap."""
    return dataclasses.replace(
        conv,
        rows=conv.rows * math.prod(conv.grid),
        inputs=conv.inputs * math.prod(conv.kernel),
        **dict.fromkeys(("image", "kernel", "grid", "stride"), (1, 1)),
    )


class _Tiling(NamedTuple):
    """How a product's rows, outputs, inputs and height are cut: arrays that broadcast to all tilings.

    The number after a name says where a part is: an element does part 0 one after the other (for rows, the
    buffer holds it), elements do part 1 side by side, part 2 stays in the buffer, part 3 comes from DRAM
    again.
    """

    rows0: np.ndarray
    rows3: np.ndarray
    outputs0: np.ndarray
    outputs1: np.ndarray
    outputs2: np.ndarray
    outputs3: np.ndarray
    inputs0: np.ndarray
    inputs1: np.ndarray
    inputs2: np.ndarray
    height1: np.ndarray
    height3: np.ndarray


def _tilings(*axes) -> _Tiling:
    """All combinations of the ways to cut rows, outputs, inputs and height, each [ways, parts]."""
    parts = []
    for axis, ways in enumerate(axes):
        shape = [1] * len(axes)
        shape[axis] = -1
        parts += [part.reshape(shape) for part in ways.T]
    return _Tiling(*parts)


@lru_cache(maxsize=4096)
def _splits(size, parts) -> np.ndarray:
    """All ordered factorizations, [ways, parts]."""
    if parts == 1:
        return np.array([[size]])
    factors = [factor for factor in range(1, size + 1) if size % factor == 0]
    rest = [(factor, _splits(size // factor, parts - 1)) for factor in factors]
    return np.concatenate([np.insert(ways, 0, factor, axis=1) for factor, ways in rest])


def _buffered(product, tiling):
    """How many numbers of a row of the input, and of the output, the buffer holds at a time."""
    height = (tiling.height1 - 1) * product.stride[0] + product.kernel[0]
    width = (product.grid[1] - 1) * product.stride[1] + product.kernel[1]
    inputs = tiling.inputs0 * tiling.inputs1 * height * width
    outputs = tiling.outputs0 * tiling.outputs1 * tiling.outputs2 * tiling.height1 * product.grid[1]
    return inputs, outputs


def _in_registers(product, tiling):
    """How many numbers of the input, of kernels and of the output an element's registers hold."""
    inputs = tiling.inputs0 * product.kernel[1]
    return inputs, tiling.outputs0 * inputs, tiling.outputs0


def _elements(product, tiling):
    return tiling.outputs1 * tiling.inputs1 * tiling.height1 * product.kernel[0]


def _cycles(product, tiling):
    serial_rows = tiling.rows0 * tiling.rows3 * tiling.height3 * product.grid[1] * product.kernel[1]
    serial_outputs = tiling.outputs0 * tiling.outputs2 * tiling.outputs3
    return serial_rows * serial_outputs * tiling.inputs0 * tiling.inputs2


def _accesses(product, tiling):
    """How many numbers of each operand cross each level: [levels][operands] of arrays, for one group."""
    kernel_rows, kernel_columns = product.kernel
    # A row of the image serves ``down`` rows of the output, and a column ``along`` columns.
    down, along = (
        kernel * made / given
        for kernel, made, given in zip(product.kernel, product.grid, product.image, strict=True)
    )
    image = product.rows * math.prod(product.image) * product.inputs
    weight = math.prod(product.kernel) * product.inputs * product.outputs
    output = product.rows * math.prod(product.grid) * product.outputs
    from_dram, again = tiling.outputs3, tiling.rows3 * tiling.height3
    from_buffer = from_dram * tiling.outputs2
    over_network = from_buffer * tiling.outputs1 * down
    side_by_side = tiling.inputs1 * kernel_rows
    sums = tiling.inputs2 * side_by_side * (tiling.inputs0 * kernel_columns - 1) * 2
    return (
        (from_dram * image, again * weight, output),
        (from_buffer * image, 0, np.maximum(2 * (tiling.inputs2 - 1), 1) * output),
        (
            over_network * image,
            again * tiling.height1 * weight,
            np.maximum(tiling.inputs2 * (side_by_side - 1), 1) * output,
        ),
        (
            over_network * tiling.outputs0 * along * image,
            again * tiling.height1 * product.grid[1] * tiling.rows0 * weight,
            np.maximum(sums, 1) * output,
        ),
    )


def _cost(product, tiling, fits, compute_mj, unit_mj, cycle, rank) -> Cost:
    """The cost of the fitting tiling with the lowest rank, a function of energies and latencies."""
    if not fits.any():
        raise ValueError(f"no tiling of {product} fits the accelerator")
    access = [
        [np.broadcast_to(count, fits.shape)[fits] * unit for count, unit in zip(counts, units, strict=True)]
        for counts, units in zip(_accesses(product, tiling), unit_mj, strict=True)
    ]
    energy = compute_mj + sum(part for level in access for part in level)
    latency = np.broadcast_to(_cycles(product, tiling), fits.shape)[fits] * cycle
    best = np.argmin(rank(energy, latency))
    return Cost(
        float(energy[best]),
        float(latency[best]),
        compute_mj,
        tuple(tuple(float(part[best]) for part in level) for level in access),
        float(energy.min()),
        float(latency.min()),
    )


@lru_cache(maxsize=4096)
def _authors_outputs(size) -> np.ndarray:
    """The ways to cut outputs that the authors try, [ways, 4].

    Their code removes ways with more than 16 outputs in an element from the list that it iterates over, and
    so skips every other one in a row. Of the ways that it skips, those up to 32 fit with 8-bit numbers.
    """
    kept, removed = [], False
    for way in _authors_order(size, 4):
        removed = way[0] > 16 and not removed
        if not removed:
            kept.append(way)
    return np.array(kept)


def _authors_order(size, parts):
    if parts == 1:
        return [(size,)]
    primes, rest = [], size
    while rest > 1:
        primes.append(next(factor for factor in range(2, rest + 1) if rest % factor == 0))
        rest //= primes[-1]
    factors = dict.fromkeys(math.prod(chosen) for chosen in itertools.product(*((p, 1) for p in primes)))
    return [(factor, *way) for factor in factors for way in _authors_order(size // factor, parts - 1)]


@lru_cache(maxsize=4096)
def _authors_cost(product, number_format) -> Cost:
    if number_format not in AUTHORS_BITS:
        raise ValueError(f"the authors' model knows {' and '.join(AUTHORS_BITS)}, not {number_format}")
    bits = AUTHORS_BITS[number_format]
    product = dataclasses.replace(product, rows=product.rows * product.groups, groups=1)
    tiling = _tilings(
        _splits(product.rows, 2),
        _authors_outputs(product.outputs),
        _splits(product.inputs, 3),
        _splits(product.grid[0], 2),
    )
    elements, words = (1, 1) if bits == 32 else (4, 2)
    inputs, weights, outputs = _in_registers(product, tiling)
    fits = _elements(product, tiling) < ELEMENTS * elements
    fits = fits & (inputs < REGISTERS["input"] * words) & (weights < REGISTERS["weight"] * words)
    fits = fits & (outputs <= REGISTERS["output"] * words)
    fits = fits & (tiling.rows0 * sum(_buffered(product, tiling)) < BUFFER * words)
    # Rows of a convolution are computed side by side, where they can be.
    several = fits & (tiling.height1 > 1)
    fits = several if several.any() else fits
    table, cycle = UNIT_ENERGIES[number_format], CYCLE
    if product.primitive == "shifts":
        table = UNIT_ENERGIES["int32" if bits == 32 else "int8"]
        bits, cycle = AUTHORS_SHIFT_BITS, CYCLE * AUTHORS_SHIFT_BITS / 32
    units = ACCESS.copy()
    units[1:] *= AUTHORS_ON_CHIP
    if product.primitive == "adds":
        # Only registers, and partial sums that move from one element to the next, take energy.
        units[:2] = units[2, :2] = 0
    return _cost(
        product,
        tiling,
        fits,
        product.count * table[AUTHORS_PRIMITIVES[product.primitive]] * 1e-9,
        units * bits / 16 * 1e-9,
        cycle,
        lambda energy, latency: (
            (energy - energy.min()) / energy.max() + (latency - latency.min()) / latency.max()
        ),
    )


@lru_cache(maxsize=4096)
def _own_cost(product) -> Cost:
    compute = compute_energy(product)
    if product.primitive == "popcounts":
        # An element takes a word of codes at a time.
        inputs = -(-product.inputs // WORD)
        product = dataclasses.replace(product, inputs=inputs, input_bits=WORD, weight_bits=WORD)
    bits = np.array([getattr(product, f"{name}_bits") for name in OPERANDS])
    lanes = max(1, WORD // max(bits[:2]))
    sizes = (product.outputs, product.inputs, product.grid[0])
    splits = (_splits(_smooth(size), parts) for size, parts in zip(sizes, (4, 3, 2), strict=True))
    tiling = _tilings(np.array([[1, product.rows]]), *splits)  # rows are cut below
    fits = _elements(product, tiling) <= ELEMENTS * lanes
    for name, numbers, operand_bits in zip(OPERANDS, _in_registers(product, tiling), bits, strict=True):
        fits = fits & (numbers * operand_bits * lanes <= REGISTERS[name] * WORD)
    inputs, outputs = _buffered(product, tiling)
    room = BUFFER * WORD // (inputs * bits[0] + outputs * bits[2])
    fits = fits & (room >= 1)
    # The more rows in the buffer, the more seldom weights come from DRAM: as many as there is room for.
    rows3 = -(-product.rows // np.clip(room, 1, product.rows))
    tiling = tiling._replace(rows0=product.rows / rows3, rows3=rows3)
    return _cost(
        product,
        tiling,
        fits,
        compute,
        ACCESS * product.groups * bits / 16 * 1e-9,
        CYCLE * product.groups,
        lambda energy, latency: energy * latency,
    )


def _smooth(size) -> int:
    """The smallest number of at least ``size`` without prime factors above 7; the excess stays idle."""
    while True:
        rest = size
        for prime in (2, 3, 5, 7):
            while rest % prime == 0:
                rest //= prime
        if rest == 1:
            return size
        size += 1
