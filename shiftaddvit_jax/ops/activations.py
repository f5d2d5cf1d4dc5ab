"""Number formats of MatShift's activations: float, fixed point, or int8."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from shiftaddvit_jax.validation import check_choice

Activations = Literal["float", "fixed_point", "int8"]


def fixed_point(
    x: Float[Array, "*shape"], integer_bits: int = 16, fraction_bits: int = 16
) -> Float[Array, "*shape"]:
    """``x`` on a fixed-point grid: rounded down to a multiple of 2^-fraction_bits and clipped.

    The range is [-2^(integer_bits - 1), 2^(integer_bits - 1) - 1], as in DeepShift. The gradient is
    straight-through.
    """
    bound = 2.0 ** (integer_bits - 1)
    scale = 2.0**fraction_bits
    return straight_through(x, jnp.clip(jnp.floor(x * scale) / scale, -bound, bound - 1))


def dynamic_int8(
    x: Float[Array, "*batch channels"], axes: int | tuple[int, ...] = -1
) -> tuple[Float[Array, "*batch channels"], Float[Array, "..."]]:
    """Whole numbers in [-127, 127] and a scale, max |x| / 127 along ``axes``: ``x`` is about their product.

    The numbers are x * (127 / max |x|), rounded to even as on every CPU. Zeros have the scale 1; where ``x``
    is not finite, neither is the scale.
    With the channels as ``axes``, each token has a scale, of shape [..., 1].
    """
    largest = _largest_magnitude(x, axes)
    some = largest > 0
    inverse = jnp.where(some, 127 / jnp.where(some, largest, 1), 0).astype(x.dtype)
    scale = jnp.where(largest == 0, 1, largest * (1 / 127)).astype(x.dtype)
    return jnp.clip(jnp.round(x * inverse), -127, 127), scale


def _largest_magnitude(x, axes):
    """The largest |x|, infinity where any is NaN, which XLA's maximum of floats loses on CPUs."""
    magnitudes = jnp.where(jnp.isnan(x), jnp.inf, jnp.abs(x))
    return jnp.max(magnitudes, axis=axes, keepdims=True)


def quantize_activations(
    x: Float[Array, "*batch channels"], activations: Activations
) -> Float[Array, "*batch channels"]:
    """``x`` as the named number format represents it, with a straight-through gradient.

    ``"float"`` leaves ``x`` alone; ``"fixed_point"`` is `fixed_point` at 16.16; ``"int8"`` is `dynamic_int8`.
    """
    check_choice("activations", activations, ("float", "fixed_point", "int8"))
    if activations == "float":
        return x
    if activations == "fixed_point":
        return fixed_point(x)
    whole, scale = dynamic_int8(x)
    return straight_through(x, whole * scale)


@jax.custom_jvp
def straight_through(x: Float[Array, "*shape"], rounded: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """``rounded``, in the dtype of ``x`` and with its gradient."""
    return rounded.astype(x.dtype)


@straight_through.defjvp
def _straight_through_jvp(primals, tangents):
    return straight_through(*primals), tangents[0]
