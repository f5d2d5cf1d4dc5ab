"""The number format of a dense layer's factors."""

from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Precision = Literal["float32", "bfloat16"]


def bfloat16_factors(product: Callable) -> Callable:
    """``product`` with both factors rounded to bfloat16, and sums in the first factor's dtype.

    Flax's layers take the result as their ``dot_general`` or ``conv_general_dilated``.
    """

    def rounded(x: Float[Array, "..."], weight: Float[Array, "..."], *args, **kwargs) -> Float[Array, "..."]:
        factors = x.astype(jnp.bfloat16), weight.astype(jnp.bfloat16)
        return product(*factors, *args, **kwargs, preferred_element_type=x.dtype)

    return rounded


# One function object for each format, so that modules with equal settings are equal.
DOT_GENERAL = {
    "float32": jax.lax.dot_general,
    "bfloat16": bfloat16_factors(jax.lax.dot_general),
}
CONV_GENERAL_DILATED = {
    "float32": jax.lax.conv_general_dilated,
    "bfloat16": bfloat16_factors(jax.lax.conv_general_dilated),
}
