"""MatShift: a product with power-of-two weights, which needs shifts and additions alone."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_tvm.descriptions import LinearDescription
from shiftaddvit_jax.ops.activations import Activations, quantize_activations
from shiftaddvit_jax.ops.implementation import Implementation, float32_only, run_op
from shiftaddvit_jax.ops.implementation.fused import fused_linear
from shiftaddvit_jax.ops.packing import (
    PackedWeight,
    check_packed,
    pack_weight,
    packed_bits,
    round_to_octaves,
    unpack_weight,
)
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
    token, scaled to its largest magnitude). With int8, weights are int8 numbers too: a weight below 1/64 of
    its output's largest becomes the nearer of that 1/64 and 0 (see `pack_weight`).

    Floating signs and exponents are rounded and have gradients (see `power_of_two_weight`); integer ones are
    constants.

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
    weight_terms: int = 1,
) -> Float[Array, "*batch outputs"]:
    """`matshift` for a weight whose entries already are 0 or signed powers of two, see `shift_weight`.

    With ``weight_terms=2`` they are sums and differences of two powers.
    """
    _check_shapes(x, weight)

    def reference(x, weight):
        return prepared_product(x, prepare_weight(weight, activations, weight_terms), activations)

    inputs, outputs = weight.shape
    bits = packed_bits(activations, weight_terms)
    linear = _describe(inputs, outputs, bits, activations, implementation)

    def kernel(x, weight):
        return _kernel(linear, x, pack_weight(weight, linear.bits))

    # Kernels take packed weights alone. None runs XLA instead of packing in every call.
    unsupported = float32_only(x) or linear.why_not()
    return run_op(
        "matshift", implementation, kernel, reference, x, weight, unsupported=unsupported, prefer=False
    )


def packed_product(
    x: Float[Array, "*batch inputs"],
    packed: PackedWeight,
    outputs: int,
    activations: Activations = "float",
    implementation: Implementation = None,
) -> Float[Array, "*batch outputs"]:
    """`shift_product` for a packed weight with ``outputs`` outputs.

    Raises:
      ValueError: as `matshift`, and for int8 activations with weights of 5 bits.
    """
    check_packed(packed, activations)

    def reference(x, packed):
        weight = jnp.asarray(unpack_weight(packed, x.shape[-1], outputs), x.dtype)
        return prepared_product(x, weight, activations)

    linear = _describe(x.shape[-1], outputs, packed.bits, activations, implementation)
    kernel, unsupported = partial(_kernel, linear), float32_only(x) or linear.why_not()
    return run_op(
        "matshift", implementation, kernel, reference, x, packed, unsupported=unsupported, prefer=True
    )


def prepare_weight(
    weight: Float[Array, "inputs outputs"], activations: Activations, weight_terms: int = 1
) -> Float[Array, "inputs outputs"]:
    """The numbers by which XLA multiplies activations: what `pack_weight` keeps of ``weight``."""
    return round_to_octaves(weight) if activations == "int8" and weight_terms == 1 else weight


def prepared_product(
    x: Float[Array, "*batch inputs"], weight: Float[Array, "inputs outputs"], activations: Activations
) -> Float[Array, "*batch outputs"]:
    """`shift_product` on XLA by a weight of `prepare_weight`, or an unpacked one."""
    return _matshift(quantize_activations(x, activations), weight)


def _check_shapes(x, weight):
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"matshift expects [..., inputs] and [inputs, outputs], got {x.shape} and {weight.shape}"
        )


def _describe(inputs, outputs, bits, activations, implementation):
    return LinearDescription(
        "shift", inputs, outputs, bits, activations, shifts=implementation == "tvm_shift"
    )


def _kernel(linear, x, packed):
    bias = jnp.zeros(linear.outputs, jnp.float32)
    return fused_linear(linear, {"codes": packed.codes, "exponent": packed.exponent, "shift_bias": bias}, x)


# The jit names this product in the traced model: operations are counted by that name.
@jax.jit
def _matshift(x, weight):
    return jnp.matmul(x, weight)
