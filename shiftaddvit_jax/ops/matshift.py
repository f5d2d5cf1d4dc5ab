"""MatShift: a product with power-of-two weights, which needs shifts and additions alone."""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from kernels_tvm.descriptions import Linear
from shiftaddvit_jax.ops.activations import Activations, quantize_activations
from shiftaddvit_jax.ops.fused import fused_linear
from shiftaddvit_jax.ops.implementation import Implementation, run_op
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
    token, scaled to its largest magnitude). With int8, weights are int8 numbers too: of each output's, those
    below 1/64 of the largest become the nearer of 1/64 of it and 0 (see `pack_weight`).

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
) -> Float[Array, "*batch outputs"]:
    """`matshift` for a weight whose entries already are 0 or signed powers of two.

    XLA takes sums of two powers as well, but not with int8 activations, for which weights are rounded.
    """
    _check_shapes(x, weight)

    def reference(x, weight):
        weight = round_to_octaves(weight) if activations == "int8" else weight
        return _matshift(quantize_activations(x, activations), weight)

    def kernel(x, weight):
        packed = pack_weight(weight, packed_bits(activations))
        return _kernel(x, packed, weight.shape[1], activations, implementation)

    # Kernels take packed weights alone: None does not pack them in every call.
    unsupported = _why_no_kernel(x, activations)
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
    """`shift_product` for a packed weight of that many outputs.

    Raises:
      ValueError: as `matshift`, and for int8 activations with weights of 5 bits.
    """
    check_packed(packed, activations)

    def reference(x, packed):
        weight = unpack_weight(packed, x.shape[-1], outputs).astype(x.dtype)
        return _matshift(quantize_activations(x, activations), weight)

    kernel = partial(_kernel, outputs=outputs, activations=activations, implementation=implementation)
    unsupported = _why_no_kernel(x, activations)
    return run_op(
        "matshift", implementation, kernel, reference, x, packed, unsupported=unsupported, prefer=True
    )


def _check_shapes(x, weight):
    if x.ndim < 1 or weight.ndim != 2 or x.shape[-1] != weight.shape[0]:
        raise ValueError(
            f"matshift expects [..., inputs] and [inputs, outputs], got {x.shape} and {weight.shape}"
        )


def _why_no_kernel(x, activations):
    if x.dtype != jnp.float32:
        return f"its kernels compute in float32, not {x.dtype}"
    return "there is no kernel for fixed-point activations" if activations == "fixed_point" else None


def _kernel(x, packed, outputs, activations, implementation):
    shifts = implementation == "tvm_shift"
    linear = Linear("shift", x.shape[-1], outputs, packed.bits, activations, shifts)
    arrays = {
        "codes": packed.codes,
        "exponent": packed.exponent,
        "shift_bias": jnp.zeros(outputs, jnp.float32),
    }
    return fused_linear(linear, arrays, x)


# A jit of its own names the product in the traced model, where operations are counted by primitive.
@jax.jit
def _matshift(x, weight):
    return jnp.matmul(x, weight)
