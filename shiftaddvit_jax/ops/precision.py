"""The number format of what a dense layer multiplies."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Precision = Literal["float32", "bfloat16"]


def bfloat16_factors(product: Callable) -> Callable:
    """``product`` of two arrays after both are rounded to bfloat16, its sums in the dtype that they had.

    For Flax's layers, as their ``dot_general`` or ``conv_general_dilated``.
    """

    def rounded(x: Float[Array, "..."], weight: Float[Array, "..."], *args, **kwargs) -> Float[Array, "..."]:
        factors = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
        return product(*factors, *args, **kwargs, preferred_element_type=x.dtype)

    return rounded


# One function each: equal modules have equal functions.
DOT_GENERAL = {
    "float32": jax.lax.dot_general,
    "bfloat16": bfloat16_factors(jax.lax.dot_general),
}
CONV_GENERAL_DILATED = {
    "float32": jax.lax.conv_general_dilated,
    "bfloat16": bfloat16_factors(jax.lax.conv_general_dilated),
}
