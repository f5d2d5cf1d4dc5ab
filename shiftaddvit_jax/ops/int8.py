"""Dense products in int8: weights with a scale for each output, activations with one for each token."""

from types import ModuleType

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from kernels_tvm.descriptions import LinearDescription
from kernels_tvm.packing import TILE_OUTPUTS, read_numbers, write_numbers
from shiftaddvit_jax.ops.activations import dynamic_int8
from shiftaddvit_jax.ops.implementation import Implementation, float32_only, run_op
from shiftaddvit_jax.ops.implementation.fused import fused_linear

Tiles = Int8[Array | np.ndarray, "output_tiles input_tiles 64"]


def int8_weight(
    weight: Float[Array | np.ndarray, "inputs outputs"], xp: ModuleType = jnp
) -> tuple[Int8[Array | np.ndarray, "inputs outputs"], Float[Array | np.ndarray, "outputs"]]:
    """Whole numbers from -127 to 127 and each output's float32 scale, max |weight| / 127.

    ``weight`` is about their product. An output of zeros has the scale 1. Scales are rounded down to 16
    binary digits: products with the numbers are exact, and give the same numbers and scales again.
    """
    weight = weight.astype(xp.float32)
    mantissa, exponent = xp.frexp(xp.max(xp.abs(weight), axis=0) / 127)
    scale = xp.ldexp(xp.floor(mantissa * 2**16), exponent - 16).astype(xp.float32)
    scale = xp.where(scale > 0, scale, xp.float32(1))
    return xp.clip(xp.round(weight / scale), -127, 127).astype(xp.int8), scale


@jax.custom_jvp
def int8_product(
    x: Float[Array, "*batch inputs"], weight: Float[Array, "inputs outputs"]
) -> Float[Array, "*batch outputs"]:
    """``x @ weight`` in int8 numbers with int32 sums: `dynamic_int8` of each row, `int8_weight`.

    The gradient is that of a product of the rounded factors, straight-through.
    """
    (whole, row_scale), (numbers, scale) = dynamic_int8(x.astype(jnp.float32)), int8_weight(weight)
    contracted = ((x.ndim - 1,), (0,)), ((), ())
    sums = jax.lax.dot_general(whole.astype(jnp.int8), numbers, contracted, preferred_element_type=jnp.int32)
    return (sums.astype(jnp.float32) * (scale * row_scale)).astype(x.dtype)


@int8_product.defjvp
def _int8_product_jvp(factors, tangents):
    x, weight = factors
    (whole, row_scale), (numbers, scale) = dynamic_int8(x.astype(jnp.float32)), int8_weight(weight)
    rounded = (whole * row_scale).astype(x.dtype), (numbers * scale).astype(weight.dtype)
    tangent = jnp.matmul(tangents[0], rounded[1]) + jnp.matmul(rounded[0], tangents[1])
    return int8_product(x, weight), tangent.astype(x.dtype)


def block_int8(
    weight: Float[Array | np.ndarray, "inputs outputs"], xp: ModuleType = jnp
) -> tuple[Tiles, Float[Array | np.ndarray, "padded_outputs"]]:
    """A dense weight as int8 numbers in tiles and a float32 scale of each output, see `int8_weight`."""
    numbers, scale = int8_weight(weight, xp)
    return write_numbers(numbers, xp), xp.pad(scale, (0, -weight.shape[1] % TILE_OUTPUTS))


def unblock_int8(
    tiles: Tiles,
    scale: Float[Array | np.ndarray, "padded_outputs"],
    inputs: int,
    outputs: int,
) -> Float[Array | np.ndarray, "inputs outputs"]:
    """The weight that `block_int8` rounded, float32."""
    return read_numbers(tiles, inputs, outputs) * scale[:outputs]


def packed_int8_product(
    x: Float[Array, "*batch inputs"],
    tiles: Tiles,
    scale: Float[Array, "padded_outputs"],
    outputs: int,
    implementation: Implementation = None,
) -> Float[Array, "*batch outputs"]:
    """`int8_product` for a weight that `block_int8` packed; the kernel is in float32."""
    linear = LinearDescription("dense", x.shape[-1], outputs, precision="int8")

    def kernel(x, tiles, scale):
        bias = jnp.zeros(outputs, jnp.float32)
        return fused_linear(linear, {"blocks": tiles, "scale": scale, "bias": bias}, x)

    def reference(x, tiles, scale):
        return int8_product(x, unblock_int8(tiles, scale, x.shape[-1], outputs))

    unsupported = float32_only(x) or linear.why_not()
    name, arrays = "a dense layer in int8", (x, tiles, scale)
    return run_op(name, implementation, kernel, reference, *arrays, unsupported=unsupported, prefer=True)
