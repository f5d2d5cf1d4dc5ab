"""What a TVM kernel takes of a linear layer: a description, and parameters by the kernel's names."""

from collections.abc import Mapping
from typing import Literal

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, PyTree, Shaped

from kernels_tvm.descriptions import LinearDescription
from shiftaddvit_jax.nn.primitives import Primitives
from shiftaddvit_jax.ops import PackedWeight, pack_weight, shift_weight
from shiftaddvit_jax.ops.int8 import block_int8
from shiftaddvit_jax.ops.packing import block_weight, check_packed, has_packed_form, packed_bits

Params = Mapping[str, PyTree]
LinearKind = Literal["dense", "shift", "moe"]
WITHOUT_CODES = 32  # bits of a power of two that has no packed form: no kernel takes them


def is_packed(params: Params) -> bool:
    """Whether there are packed weights among the parameters, see `shiftaddvit_jax.pack`."""
    return any(path[-1] in ("codes", "blocks") for path in flatten_dict(params))


def describe_linear(
    kind: LinearKind, params: Params, inputs: int, outputs: int, primitives: Primitives
) -> LinearDescription:
    """The kernel's description of a linear layer, by `Primitives.of_layer`; `make_linear` has the kinds.

    Raises:
      ValueError: weights packed with 5 bits, for int8 activations.
    """
    if kind == "dense":
        return LinearDescription(kind, inputs, outputs, precision=primitives.precision)
    bits = WITHOUT_CODES
    if has_packed_form(primitives.weight_bits, primitives.weight_terms):
        bits = packed_bits(primitives.activations, primitives.weight_terms)
    shift = params["shift"] if kind == "moe" else params
    if "codes" in shift:
        packed = PackedWeight(shift["codes"], shift["exponent"])
        check_packed(packed, primitives.activations)
        bits = packed.bits
    return LinearDescription(
        kind,
        inputs,
        outputs,
        bits,
        primitives.activations,
        shifts=primitives.implementation == "tvm_shift",
        # Shift layers do not use the precision, so one kernel serves all precisions.
        precision=primitives.precision if kind == "moe" else "float32",
    )


def linear_arrays(
    linear: LinearDescription, params: Params, weight_bits: int, prefix: str = ""
) -> dict[str, Shaped[Array, "..."]]:
    """A layer's parameters by the kernel's names; weights that are not packed are packed here."""
    arrays = {}
    if linear.kind == "moe":
        arrays |= {f"router_{name}": value for name, value in params["router"].items()}
    if linear.kind != "shift":
        dense = params["dense"] if linear.kind == "moe" else params
        arrays |= _dense_blocks(linear, dense) | {"bias": _bias(dense, linear)}
    if linear.kind != "dense":
        shift = params["shift"] if linear.kind == "moe" else params
        packed = (
            PackedWeight(shift["codes"], shift["exponent"])
            if "codes" in shift
            else pack_weight(
                shift_weight(shift["kernel"], weight_bits, 2 if linear.bits == 8 else 1), linear.bits
            )
        )
        arrays |= {"codes": packed.codes, "exponent": packed.exponent, "shift_bias": _bias(shift, linear)}
    return {prefix + name: array for name, array in arrays.items()}


def norm_arrays(params: Params, prefix: str = "norm_") -> dict[str, Float[Array, "channels"]]:
    """A LayerNorm's parameters by the kernel's names."""
    return {prefix + name: params[name] for name in ("scale", "bias")}


def _dense_blocks(linear, params):
    """The weight of a dense layer or convolution by the kernel's names; bfloat16 numbers are uint16 bits."""
    if linear.precision == "int8":
        if "blocks" in params:
            return {name: params[name] for name in ("blocks", "scale")}
        blocks, scale = block_int8(params["kernel"].reshape(linear.inputs, linear.outputs))
        return {"blocks": blocks, "scale": scale}
    if "blocks" in params:
        blocks = params["blocks"]
    else:
        blocks = block_weight(params["kernel"].reshape(linear.inputs, linear.outputs))
    if linear.precision == "bfloat16":
        blocks = jax.lax.bitcast_convert_type(blocks.astype(jnp.bfloat16), jnp.uint16)
    return {"blocks": blocks}


def _bias(params, linear):
    return params["bias"] if "bias" in params else jnp.zeros(linear.outputs, jnp.float32)
