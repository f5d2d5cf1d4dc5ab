"""Weights for inference: power-of-two weights as 4- or 5-bit codes, dense weights in blocks.

`kernels_tvm.packing` says what the arrays mean.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int8, UInt8

from kernels_tvm.packing import (
    LARGEST_CODE,
    SIGNS_OFFSET,
    TILE_BYTES,
    TILE_INPUTS,
    TILE_OUTPUTS,
    blocked_shape,
    packed_shape,
)
from shiftaddvit_jax.ops.activations import Activations, straight_through


class PackedWeight(NamedTuple):
    """A power-of-two weight [inputs, outputs] as codes, with one exponent for each output."""

    codes: UInt8[Array, "output_tiles input_tiles bytes"]
    exponent: Int8[Array, "padded_outputs"]

    @property
    def bits(self) -> int:
        """Bits of a weight: 4 or 5."""
        return next(bits for bits, size in TILE_BYTES.items() if size == self.codes.shape[-1])


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


def pack_weight(weight: Float[Array, "inputs outputs"], bits: int) -> PackedWeight:
    """Pack a weight whose entries are 0 or signed powers of two.

    Each output's exponent is the exponent of its largest weight minus 6 (4 bits) or 14 (5 bits), so 7 or 15
    exponents fit. A weight below the smallest that fits becomes the nearer of that smallest weight and 0;
    exactly half of it rounds up. Packing loses nothing else.

    Raises:
      ValueError: ``bits`` other than 4 and 5.
    """
    if bits not in TILE_BYTES:
        raise ValueError(f"bits must be 4 or 5, got {bits}")
    inputs, outputs = weight.shape
    magnitude = jnp.abs(weight.astype(jnp.float32))
    _, exponent = jnp.frexp(magnitude)
    exponent = exponent.astype(jnp.int32) - 1
    is_zero = magnitude == 0
    largest = jnp.max(jnp.where(is_zero, -64, exponent), axis=0)
    channel = jnp.clip(largest - (LARGEST_CODE[bits] - 1), -64, 63)
    code = exponent - channel + 1
    # Code 0 would be half the smallest weight, which rounds up to code 1; smaller weights become 0.
    code = jnp.where(is_zero | (code < 0), 0, jnp.maximum(code, 1))
    code = jnp.minimum(code, LARGEST_CODE[bits])
    negative = (weight < 0) & (code > 0)

    shape = packed_shape(inputs, outputs, bits)
    code, negative = (_tiles(part.astype(jnp.uint8), shape) for part in (code, negative))
    if bits == 4:
        code |= negative << 3
    packed = code[..., :SIGNS_OFFSET] | (code[..., SIGNS_OFFSET:] << 4)
    if bits == 5:
        packed = jnp.concatenate([packed, jnp.packbits(negative, axis=-1, bitorder="little")], axis=-1)
    padding = (0, shape[0] * TILE_OUTPUTS - outputs)
    return PackedWeight(packed, jnp.pad(channel, padding).astype(jnp.int8))


def block_weight(weight: Float[Array, "inputs outputs"]) -> Float[Array, "blocks inputs 16"]:
    """Cut a dense weight into blocks of 16 outputs."""
    blocks, inputs, size = blocked_shape(*weight.shape)
    padded = jnp.pad(weight, ((0, 0), (0, blocks * size - weight.shape[1])))
    return padded.reshape(inputs, blocks, size).transpose(1, 0, 2)


def unblock_weight(blocks: Float[Array, "blocks inputs 16"], outputs: int) -> Float[Array, "inputs outputs"]:
    """The weight that `block_weight` cut."""
    return blocks.transpose(1, 0, 2).reshape(blocks.shape[1], -1)[:, :outputs]


def round_to_octaves(weight: Float[Array, "inputs outputs"]) -> Float[Array, "inputs outputs"]:
    """A power-of-two weight rounded to what 4 bits hold, for int8 products; straight-through gradient."""
    return straight_through(weight, unpack_weight(pack_weight(weight, 4), *weight.shape))


def unpack_weight(packed: PackedWeight, inputs: int, outputs: int) -> Float[Array, "inputs outputs"]:
    """The weight that `pack_weight` packed, float32."""
    codes = packed.codes
    code = jnp.concatenate([codes[..., :SIGNS_OFFSET] & 15, codes[..., :SIGNS_OFFSET] >> 4], axis=-1)
    if packed.bits == 4:
        code, negative = code & 7, code >> 3
    else:
        negative = jnp.unpackbits(codes[..., SIGNS_OFFSET:], axis=-1, bitorder="little")
    code, negative = (_untile(part)[:inputs, :outputs].astype(jnp.int32) for part in (code, negative))
    sign = jnp.where(code == 0, 0, 1 - 2 * negative).astype(jnp.float32)
    return jnp.ldexp(sign, code - 1 + packed.exponent[:outputs].astype(jnp.int32))


def _tiles(part, shape):
    """[inputs, outputs] -> [output tiles, input tiles, 64], zero-padded."""
    rows, columns = shape[1] * TILE_INPUTS, shape[0] * TILE_OUTPUTS
    part = jnp.pad(part, ((0, rows - part.shape[0]), (0, columns - part.shape[1])))
    part = part.reshape(shape[1], TILE_INPUTS, shape[0], TILE_OUTPUTS).transpose(2, 0, 3, 1)
    return part.reshape(*shape[:2], TILE_INPUTS * TILE_OUTPUTS)


def _untile(part):
    columns, rows = part.shape[:2]
    part = part.reshape(columns, rows, TILE_OUTPUTS, TILE_INPUTS).transpose(1, 3, 0, 2)
    return part.reshape(rows * TILE_INPUTS, columns * TILE_OUTPUTS)


pack_weight = jax.jit(pack_weight, static_argnames="bits")
unpack_weight = jax.jit(unpack_weight, static_argnames=("inputs", "outputs"))
