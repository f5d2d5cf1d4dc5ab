"""Weights for inference: powers of two in 4 or 5 bits, two powers in 8 bits, and dense weights in blocks.

`kernels_tvm.packing` says what the arrays mean.
"""

from types import ModuleType
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8, UInt8

from kernels_tvm.packing import (
    LARGEST_CODE,
    TILE_BYTES,
    TILE_OUTPUTS,
    bits_of,
    packed_shape,
    read_blocks,
    read_numbers,
    read_tiles,
    write_blocks,
    write_numbers,
    write_tiles,
)
from shiftaddvit_jax.ops.activations import Activations, straight_through
from shiftaddvit_jax.ops.power_of_two import exact_power, two_power_exponent


class PackedWeight(NamedTuple):
    """A weight [inputs, outputs] of powers of two as codes, with one exponent for each output."""

    codes: (
        UInt8[Array | np.ndarray, "output_tiles input_tiles bytes"]
        | Int8[Array | np.ndarray, "output_tiles input_tiles bytes"]
    )
    exponent: Int8[Array | np.ndarray, "padded_outputs"]

    @property
    def bits(self) -> int:
        """Bits of a weight: 4 or 5, and 8 for two powers of two."""
        return bits_of(self.codes)


def packed_bits(activations: Activations, weight_terms: int = 1) -> int:
    """Bits of a packed weight: 8 for two powers of two; for one 4 with int8 activations, else 5.

    Only 4 bits lose anything.
    """
    if weight_terms == 2:
        return 8
    return 4 if activations == "int8" else 5


def has_packed_form(weight_bits: int, weight_terms: int = 1) -> bool:
    """Whether weights can be packed: two powers of two always, one of at most 5 bits."""
    return weight_terms == 2 or weight_bits <= 5


def packed_weight_shape(inputs: int, outputs: int, bits: int) -> PackedWeight:
    """The shapes and dtypes of what `pack_weight` returns."""
    codes = packed_shape(inputs, outputs, bits)
    exponent = jax.ShapeDtypeStruct((codes[0] * TILE_OUTPUTS,), jnp.int8)
    # pyrefly: ignore[bad-argument-type]  # a tree of shapes, as `jax.eval_shape` returns
    return PackedWeight(jax.ShapeDtypeStruct(codes, jnp.int8 if bits == 8 else jnp.uint8), exponent)


def check_packed(packed: PackedWeight, activations: Activations) -> None:
    """Raise a ``ValueError`` for weights of 5 bits and int8 activations."""
    if activations == "int8" and packed.bits == 5:
        raise ValueError("int8 activations need weights of 4 bits, these have 5; pack the model again")


def pack_weight(
    weight: Float[Array | np.ndarray, "inputs outputs"], bits: int, xp: ModuleType = jnp
) -> PackedWeight:
    """Pack a weight whose entries are 0 or signed powers of two, or of `two_powers_of_two` for 8 bits.

    Each output's exponent is the exponent of its largest weight minus 6 (4 bits) or 14 (5 bits), so 7 or 15
    exponents fit. A weight below the smallest that fits becomes the nearer of that smallest weight and 0;
    exactly half of it rounds up. Packing loses nothing else. With 8 bits it loses nothing.

    Args:
      weight: what is packed.
      bits: of a packed weight, 4, 5 or 8.
      xp: whose arrays the result has: ``jax.numpy``, or ``numpy``, which compiles nothing.

    Raises:
      ValueError: ``bits`` other than 4, 5 and 8.
    """
    if bits not in TILE_BYTES:
        raise ValueError(f"bits must be 4, 5 or 8, got {bits}")
    return _pack(weight, bits, np) if xp is np else _pack_compiled(weight, bits, xp)


def _pack(weight, bits, xp):
    padding = (0, -weight.shape[1] % TILE_OUTPUTS)
    if bits == 8:
        channel = two_power_exponent(weight, xp=xp)
        numbers = xp.round(xp.ldexp(weight.astype(xp.float32), -channel)).astype(xp.int8)
        return PackedWeight(write_numbers(numbers, xp), xp.pad(channel, padding).astype(xp.int8))
    magnitude = xp.abs(weight.astype(xp.float32))
    _, exponent = xp.frexp(magnitude)
    exponent = exponent.astype(xp.int32) - 1
    is_zero = magnitude == 0
    largest = xp.max(xp.where(is_zero, -64, exponent), axis=0)
    channel = xp.clip(largest - (LARGEST_CODE[bits] - 1), -64, 63)
    code = exponent - channel + 1
    # Code 0 would be half the smallest weight, which rounds up to code 1; smaller weights become 0.
    code = xp.where(is_zero | (code < 0), 0, xp.maximum(code, 1))
    code = xp.minimum(code, LARGEST_CODE[bits])
    negative = (weight < 0) & (code > 0)

    tiles = write_tiles(code.astype(xp.uint8), negative.astype(xp.uint8), bits, xp)
    return PackedWeight(tiles, xp.pad(channel, padding).astype(xp.int8))


_pack_compiled = jax.jit(_pack, static_argnames=("bits", "xp"))


def block_weight(
    weight: Float[Array | np.ndarray, "inputs outputs"], xp: ModuleType = jnp
) -> Float[Array | np.ndarray, "blocks inputs 16"]:
    """Cut a dense weight into blocks of 16 outputs, an array of ``xp``."""
    return write_blocks(weight, xp)


def unblock_weight(
    blocks: Float[Array | np.ndarray, "blocks inputs 16"], outputs: int
) -> Float[Array | np.ndarray, "inputs outputs"]:
    """The weight that `block_weight` cut."""
    return read_blocks(blocks, outputs)


def round_to_octaves(weight: Float[Array, "inputs outputs"]) -> Float[Array, "inputs outputs"]:
    """A power-of-two weight rounded to what 4 bits hold, for int8 products; straight-through gradient."""
    return straight_through(weight, _round_to_octaves(weight))


@jax.jit
def _round_to_octaves(weight):
    # What `_pack` does to codes, done to numbers.
    magnitude = jnp.abs(weight.astype(jnp.float32))
    smallest = jnp.maximum(jnp.max(magnitude, axis=0) * 2.0 ** (1 - LARGEST_CODE[4]), 2.0**-64)
    raised = jnp.sign(weight) * jnp.maximum(magnitude, smallest)
    return jnp.where(magnitude < smallest / 2, 0, raised).astype(weight.dtype)


def unpack_weight(
    packed: PackedWeight, inputs: int, outputs: int, xp: ModuleType = jnp
) -> Float[Array | np.ndarray, "inputs outputs"]:
    """The weight that `pack_weight` packed, float32, an array of ``xp``."""
    return (_unpack if xp is np else _unpack_compiled)(packed, inputs, outputs, xp)


def _unpack(packed, inputs, outputs, xp):
    if packed.bits == 8:
        numbers = read_numbers(packed.codes, inputs, outputs).astype(xp.float32)
        return numbers * exact_power(packed.exponent[:outputs], xp)
    code, negative = (part.astype(xp.int32) for part in read_tiles(packed.codes, inputs, outputs, xp))
    sign = xp.where(code == 0, 0, 1 - 2 * negative).astype(xp.float32)
    return sign * exact_power(code - 1 + packed.exponent[:outputs].astype(xp.int32), xp)


_unpack_compiled = jax.jit(_unpack, static_argnames=("inputs", "outputs", "xp"))
