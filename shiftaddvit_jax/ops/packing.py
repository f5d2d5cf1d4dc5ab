"""Weights for inference: power-of-two weights as 4- or 5-bit codes, dense weights in blocks.

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
    read_tiles,
    write_blocks,
    write_tiles,
)
from shiftaddvit_jax.ops.activations import Activations, straight_through


class PackedWeight(NamedTuple):
    """A power-of-two weight [inputs, outputs] as codes, with one exponent for each output."""

    codes: UInt8[Array | np.ndarray, "output_tiles input_tiles bytes"]
    exponent: Int8[Array | np.ndarray, "padded_outputs"]

    @property
    def bits(self) -> int:
        """Bits of a weight: 4 or 5."""
        return bits_of(self.codes)


def packed_bits(activations: Activations) -> int:
    """Bits of a packed weight: 4 for int8 activations, else 5, which lose nothing."""
    return 4 if activations == "int8" else 5


def packed_weight_shape(inputs: int, outputs: int, bits: int) -> PackedWeight:
    """The shapes and dtypes of what `pack_weight` returns."""
    codes = packed_shape(inputs, outputs, bits)
    exponent = jax.ShapeDtypeStruct((codes[0] * TILE_OUTPUTS,), jnp.int8)
    # pyrefly: ignore[bad-argument-type]  # a tree of shapes, as `jax.eval_shape` returns
    return PackedWeight(jax.ShapeDtypeStruct(codes, jnp.uint8), exponent)


def check_packed(packed: PackedWeight, activations: Activations) -> None:
    """Raise a ``ValueError`` for weights of 5 bits and int8 activations."""
    if activations == "int8" and packed.bits != 4:
        raise ValueError("int8 activations need weights of 4 bits, these have 5; pack the model again")


def pack_weight(
    weight: Float[Array | np.ndarray, "inputs outputs"], bits: int, xp: ModuleType = jnp
) -> PackedWeight:
    """Pack a weight whose entries are 0 or signed powers of two.

    Each output's exponent is the exponent of its largest weight minus 6 (4 bits) or 14 (5 bits), so 7 or 15
    exponents fit. A weight below the smallest that fits becomes the nearer of that smallest weight and 0;
    exactly half of it rounds up. Packing loses nothing else.

    Args:
      weight: what is packed.
      bits: of a packed weight, 4 or 5.
      xp: whose arrays the result has: ``jax.numpy``, or ``numpy``, which compiles nothing.

    Raises:
      ValueError: ``bits`` other than 4 and 5.
    """
    if bits not in TILE_BYTES:
        raise ValueError(f"bits must be 4 or 5, got {bits}")
    return _pack(weight, bits, np) if xp is np else _pack_compiled(weight, bits, xp)


def _pack(weight, bits, xp):
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
    padding = (0, -weight.shape[1] % TILE_OUTPUTS)
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
    inputs, outputs = weight.shape
    return straight_through(weight, unpack_weight(pack_weight(weight, 4), inputs, outputs))


def unpack_weight(
    packed: PackedWeight, inputs: int, outputs: int, xp: ModuleType = jnp
) -> Float[Array | np.ndarray, "inputs outputs"]:
    """The weight that `pack_weight` packed, float32, an array of ``xp``."""
    unpack = _unpack if xp is np else _unpack_compiled
    return unpack(packed, inputs, outputs, xp)


def _unpack(packed, inputs, outputs, xp):
    code, negative = (part.astype(xp.int32) for part in read_tiles(packed.codes, inputs, outputs, xp))
    sign = xp.where(code == 0, 0, 1 - 2 * negative).astype(xp.float32)
    return xp.ldexp(sign, code - 1 + packed.exponent[:outputs].astype(xp.int32))


_unpack_compiled = jax.jit(_unpack, static_argnames=("inputs", "outputs", "xp"))
