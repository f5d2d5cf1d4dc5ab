"""From trained variables to inference variables: weights in the number formats of the products."""

import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from shiftaddvit_jax.models.variables import variable_shapes
from shiftaddvit_jax.nn import Conv, Dense, ShiftDense
from shiftaddvit_jax.nn.kernels import is_packed
from shiftaddvit_jax.nn.linear import multiplies_in_bfloat16
from shiftaddvit_jax.ops import pack_weight, unpack_weight
from shiftaddvit_jax.ops.packing import block_weight, packed_bits, packed_weight_shape


def pack(model: nn.Module, variables: PyTree) -> PyTree:
    """``variables`` for inference: weights of shift layers as 4- or 5-bit codes, of dense ones in blocks.

    ``model.apply`` takes them as it takes ``variables``. Blocks are the same numbers in the order in which
    CPU kernels read them, see `kernels_tvm.packing`; a model of the precision bfloat16 has them rounded to it
    here instead of in every call. With float activations a power of two has 5 bits and packing is exact. With
    int8 activations it has 4: the 7 powers of two that an int8 number holds, scaled for each output by its
    largest weight. What is smaller becomes the nearer of the smallest one and 0, and a warning says how many
    weights did and how far they moved at most.

    Raises:
      ValueError: weights that are not single powers of two or have more than 5 bits, or variables that are
        packed already.
    """
    if is_packed(variables["params"]):
        raise ValueError("the variables are packed already")
    packed, moved = _pack(model, variables)
    changed, total = (sum(int(layer[i]) for layer in moved) for i in range(2))
    worst = max((float(error) for *_, error in moved), default=0.0)
    if changed:
        warnings.warn(
            f"{changed} of {total} weights ({changed / total:.2%}) moved to fit "
            f"{packed_bits(model.primitives.activations)} bits, by at most {worst:.1e} of their layer's "
            "largest weight",
            stacklevel=2,
        )
    return packed


def packed_shapes(model: nn.Module) -> PyTree:
    """The shapes and dtypes of `pack`'s result for a model."""
    layers, multiplying, variables = _layers_and_shapes(model)
    flat: dict[tuple[str, ...], Any] = flatten_dict(variables["params"])
    bits = packed_bits(model.primitives.activations)
    for path, layer in layers.items():
        _check_packable(path, layer)
        inputs, outputs = flat[(*path, "kernel")].shape
        _replace_weight(flat, path, packed_weight_shape(inputs, outputs, bits)._asdict())
    for path, layer in multiplying.items():
        packed = jax.eval_shape(partial(_pack_factor, layer), flat[(*path, "kernel")])
        _replace_weight(flat, path, packed)
    return {**variables, "params": unflatten_dict(flat)}


def _pack(model, variables):
    """The packed variables, and for each layer how many weights moved, of how many, and how far at most."""
    flat, moved = flatten_dict(variables["params"]), []
    layers, multiplying, _ = _layers_and_shapes(model)
    for path, layer in layers.items():
        _check_packable(path, layer)
        weight = layer.apply({"params": _subtree(flat, path)}, method="weight")
        packed = pack_weight(weight, packed_bits(model.primitives.activations))
        error = jnp.abs(unpack_weight(packed, *weight.shape) - weight)
        largest = jnp.maximum(jnp.max(jnp.abs(weight)), jnp.finfo(jnp.float32).tiny)
        moved.append((jnp.sum(error > 0), weight.size, jnp.max(error) / largest))
        _replace_weight(flat, path, packed._asdict())
    for path, layer in multiplying.items():
        _replace_weight(flat, path, _pack_factor(layer, flat[(*path, "kernel")]))
    return {**variables, "params": unflatten_dict(flat)}, moved


def _pack_factor(layer, kernel):
    """The weight of a layer that multiplies, by the name of its parameter."""
    if multiplies_in_bfloat16(layer):
        kernel = kernel.astype(jnp.bfloat16)
    if isinstance(layer, (Conv, Dense)):
        return {"blocks": block_weight(kernel.reshape(-1, kernel.shape[-1]))}
    return {"kernel": kernel}


def _replace_weight(flat, path, packed):
    for name in ("kernel", "sign", "exponent"):
        flat.pop((*path, name), None)
    flat |= {(*path, name): value for name, value in packed.items()}


def _check_packable(path, layer):
    if layer.quantizer != "power_of_two" or layer.weight_bits > 5:
        raise ValueError(
            f"{'/'.join(path)} can't be packed: expected single powers of two of at most 5 bits, got "
            f"{layer.quantizer} of {layer.weight_bits} bits"
        )


def shift_layers(model: nn.Module) -> dict[tuple[str, ...], ShiftDense]:
    """The shift layers by the paths of their parameters."""
    return _layers_and_shapes(model)[0]


def _layers_and_shapes(model):
    """The shift layers and those that multiply, by their paths, and the shapes of all variables."""
    layers, multiplying = {}, {}

    def watch(call, arguments, keywords, context):
        if isinstance(context.module, ShiftDense):
            layers[context.module.path] = context.module.clone(parent=None)
        if isinstance(context.module, (nn.Conv, nn.Dense)):
            multiplying[context.module.path] = context.module.clone(parent=None)
        return call(*arguments, **keywords)

    # Initializing calls every layer on its own, whatever computes it later.
    with nn.intercept_methods(watch):
        shapes = variable_shapes(model)
    return layers, multiplying, shapes


def _subtree(flat: Mapping, path):
    return {name[len(path)]: value for name, value in flat.items() if name[: len(path)] == path}
