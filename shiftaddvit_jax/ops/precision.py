"""The number format of a dense layer's factors."""

import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from shiftaddvit_jax.ops.int8 import int8_product

Precision = Literal["float32", "bfloat16", "int8"]


def bfloat16_factors(product: Callable) -> Callable:
    """``product`` with both factors rounded to bfloat16, and sums in the first factor's dtype.

    Flax's layers take the result as their ``dot_general`` or ``conv_general_dilated``.
    """

    def rounded(x: Float[Array, "..."], weight: Float[Array, "..."], *args, **kwargs) -> Float[Array, "..."]:
        factors = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
        return product(*factors, *args, **kwargs, preferred_element_type=x.dtype)

    return rounded


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
