"""The number format of a dense layer's factors."""

import math
from collections.abc import Callable
from types import ModuleType
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from shiftaddvit_jax.ops.activations import dynamic_int8

Precision = Literal["float32", "bfloat16", "int8"]


def bfloat16_factors(product: Callable) -> Callable:
    """``product`` with both factors rounded to bfloat16, and sums in the first factor's dtype.

    Flax's layers take the result as their ``dot_general`` or ``conv_general_dilated``.
    """

    def rounded(x: Float[Array, "..."], weight: Float[Array, "..."], *args, **kwargs) -> Float[Array, "..."]:
        factors = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
        return product(*factors, *args, **kwargs, preferred_element_type=x.dtype)

    return rounded


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


def _int8_dot_general(x, weight, dimension_numbers, precision: Any = None):
    if dimension_numbers != (((x.ndim - 1,), (0,)), ((), ())):
        raise ValueError(f"int8 products are those of a dense layer, not with {dimension_numbers}")
    return int8_product(x, weight)


def _int8_convolution(x, kernel, window_strides, padding, **_):
    """A convolution as the product of patches, one row each, with the kernel."""
    *sides, channels, outputs = kernel.shape
    if isinstance(padding, str):
        padding = jax.lax.padtype_to_pads(x.shape[1:3], sides, window_strides, padding)
    x = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    # [places, side]: the pixels of each place's patch along an axis.
    rows, columns = (
        np.arange(0, size - side + 1, stride)[:, None] + np.arange(side)
        for size, side, stride in zip(x.shape[1:3], sides, window_strides, strict=True)
    )
    patches = x[:, rows[:, None, :, None], columns[None, :, None, :]]
    patches = patches.reshape(*patches.shape[:3], math.prod(sides) * channels)
    return int8_product(patches, kernel.reshape(-1, outputs))


# One function object for each format, so that modules with equal settings are equal.
DOT_GENERAL = {
    "float32": jax.lax.dot_general,
    "bfloat16": bfloat16_factors(jax.lax.dot_general),
    "int8": _int8_dot_general,
}
CONV_GENERAL_DILATED = {
    "float32": jax.lax.conv_general_dilated,
    "bfloat16": bfloat16_factors(jax.lax.conv_general_dilated),
    "int8": _int8_convolution,
}
