"""MatShift: a product with power-of-two weights, which needs shifts and additions alone."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from shiftaddvit_jax.ops.activations import Activations, quantize_activations
from shiftaddvit_jax.ops.implementation import Implementation, check_implementation
from shiftaddvit_jax.ops.power_of_two import power_of_two_weight


def matshift(
    x: Float[Array, "*batch inputs"],
    sign: Float[Array, "inputs outputs"] | Int[Array, "inputs outputs"],
    exponent: Float[Array, "inputs outputs"] | Int[Array, "inputs outputs"],
    weight_bits: int = 5,
    activations: Activations = "float",
    implementation: Implementation = None,
) -> Float[Array, "*batch outputs"]:
    """``x @ (sign * 2^exponent)`` for any leading axes.

    ``activations`` is the number format of ``x``: ``"float"``, ``"fixed_point"`` (16.16) or ``"int8"`` (per
    token, scaled to its largest magnitude). Floating signs and exponents are rounded and have gradients
    (see `power_of_two_weight`); integer ones are constants.

    Raises:
      ValueError: shapes that do not fit, or an unknown number format.
    """
    if sign.shape != exponent.shape:
        raise ValueError(f"sign and exponent must have one shape, got {sign.shape} and {exponent.shape}")
    weight = power_of_two_weight(sign, exponent, weight_bits)
    return shift_product(x, weight.astype(x.dtype), activations, implementation)


def shift_product(
    x: Float[Array, "*batch inputs"],
    weight: Float[Array, "inputs outputs"],
    activations: Activations = "float",
    implementation: Implementation = None,
) -> Float[Array, "*batch outputs"]:
    """`matshift` for a weight whose entries already are signed (sums of) powers of two."""
    check_implementation("matshift", implementation)
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"matshift expects [..., inputs] and [inputs, outputs], got {x.shape} and {weight.shape}"
        )
    return _matshift(quantize_activations(x, activations), weight)


# A jit of its own names the product in the traced model, where operations are counted by primitive.
@jax.jit
def _matshift(x, weight):
    return jnp.matmul(x, weight)
