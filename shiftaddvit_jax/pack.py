"""From trained variables to inference variables: weights in the number formats of the products."""

import math
import warnings
from collections.abc import Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from shiftaddvit_jax.models.variables import COMPILE_QUICKLY, variable_shapes
from shiftaddvit_jax.nn import Conv, Dense, ShiftDense
from shiftaddvit_jax.nn.kernels import is_packed
from shiftaddvit_jax.nn.linear import precision_of
from shiftaddvit_jax.ops import PackedWeight, pack_weight, unpack_weight
from shiftaddvit_jax.ops.int8 import block_int8, unblock_int8
from shiftaddvit_jax.ops.packing import (
    block_weight,
    has_packed_form,
    packed_bits,
    packed_weight_shape,
    unblock_weight,
)


def pack(model: nn.Module, variables: PyTree) -> PyTree:
    """``variables`` for inference: shift layers' weights as codes, dense weights in blocks.

    ``model.apply`` takes packed variables as it takes ``variables``.

    With float activations a shift weight has 5 bits, and packing is exact. With int8 activations it has 4
    bits, for the 7 powers of two that an int8 number holds, scaled by each output's largest weight. A smaller
    weight becomes the nearer of the smallest of these powers and 0; a warning says how many weights moved,
    and how far at most. A weight with two terms has 8 bits, and packing is exact.

    Blocks hold the dense weights' numbers in the order in which CPU kernels read them, see
    `kernels_tvm.packing`. With precision bfloat16 or int8 the numbers are rounded here instead of in every
    call.

    Raises:
      ValueError: single powers of two of more than 5 bits, or variables that are packed already.
    """
    if is_packed(variables["params"]):
        raise ValueError("the variables are packed already; use them as they are, or pack their originals")
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


def unpack(model: nn.Module, variables: PyTree) -> PyTree:
    """``variables`` as they were before `pack`, but for what packing rounded.

    Raises:
      ValueError: variables that are not packed.
    """
    if not is_packed(variables["params"]):
        raise ValueError("the variables are not packed")
    flat: dict[tuple[str, ...], Any] = flatten_dict(variables["params"])
    layers, multiplying, whole = _layers_and_shapes(model)
    shapes: dict[tuple[str, ...], Any] = flatten_dict(whole["params"])
    for path in layers:
        codes, exponent = (np.asarray(flat.pop((*path, name))) for name in PackedWeight._fields)
        inputs, outputs = shapes[(*path, "kernel")].shape
        flat[(*path, "kernel")] = unpack_weight(PackedWeight(codes, exponent), inputs, outputs, np)
    for path in multiplying:
        shape = shapes[(*path, "kernel")].shape
        if (*path, "blocks") in flat:
            blocks, scale = np.asarray(flat.pop((*path, "blocks"))), flat.pop((*path, "scale"), None)
            if scale is None:
                kernel = unblock_weight(blocks, shape[-1])
            else:
                kernel = unblock_int8(blocks, np.asarray(scale), math.prod(shape[:-1]), shape[-1])
            flat[(*path, "kernel")] = kernel.reshape(shape)
        flat[(*path, "kernel")] = np.asarray(flat[(*path, "kernel")], np.float32)
    return {**variables, "params": jax.device_put(unflatten_dict(flat))}


def inference_variables(model: nn.Module, variables: PyTree, for_kernels: bool) -> PyTree:
    """``variables`` in the form in which inference is fastest: packed for kernels, as they were for XLA.

    Single powers of two of more than 5 bits have no packed form and stay the same.
    """
    packed = is_packed(variables["params"])
    if packed == for_kernels or (for_kernels and not all(map(_is_packable, shift_layers(model).values()))):
        return variables
    if packed:
        return unpack(model, variables)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what packing loses is `shiftaddvit pack`'s to say
        return pack(model, variables)


def packed_shapes(model: nn.Module) -> PyTree:
    """The shapes and dtypes of `pack`'s result for a model."""
    layers, multiplying, variables = _layers_and_shapes(model)
    flat: dict[tuple[str, ...], Any] = flatten_dict(variables["params"])
    for path, layer in layers.items():
        _check_packable(path, layer)
        inputs, outputs = flat[(*path, "kernel")].shape
        bits = packed_bits(layer.activations, layer.weight_terms)
        _replace_weight(flat, path, packed_weight_shape(inputs, outputs, bits)._asdict())
    for path, layer in multiplying.items():
        packed = jax.eval_shape(partial(_pack_factor, layer), flat[(*path, "kernel")])
        _replace_weight(flat, path, packed)
    return {**variables, "params": unflatten_dict(flat)}


def pack_dense(model: nn.Module, params: PyTree) -> PyTree:
    """The parameters of some of ``model``'s dense layers and convolutions, packed as `pack` does it."""
    flat = flatten_dict(params)
    _, multiplying, _ = _layers_and_shapes(model)
    for path, layer in multiplying.items():
        if (*path, "kernel") in flat:
            _replace_weight(flat, path, _pack_factor(layer, flat[(*path, "kernel")]))
    return unflatten_dict(flat)


def _pack(model, variables):
    """The packed variables, and for each shift layer: weights that moved, all weights, largest move."""
    flat, moved = flatten_dict(variables["params"]), []
    layers, multiplying, _ = _layers_and_shapes(model)
    for path, layer in layers.items():
        _check_packable(path, layer)

    # One small program; the rest is NumPy's, which has nothing to compile for each layer.
    @partial(jax.jit, compiler_options=COMPILE_QUICKLY)
    def rounded(weights):
        return {
            path: layers[path].apply({"params": params}, method="weight") for path, params in weights.items()
        }

    weights = rounded({path: _subtree(flat, path) for path in layers})
    for path, weight in weights.items():
        weight = np.asarray(weight)
        packed = pack_weight(weight, packed_bits(layers[path].activations, layers[path].weight_terms), np)
        inputs, outputs = weight.shape
        error = np.abs(unpack_weight(packed, inputs, outputs, np) - weight)
        largest = max(np.max(np.abs(weight)), np.finfo(np.float32).tiny)
        moved.append((np.sum(error > 0), weight.size, np.max(error) / largest))
        _replace_weight(flat, path, packed._asdict())
    for path, layer in multiplying.items():
        _replace_weight(flat, path, _pack_factor(layer, np.asarray(flat[(*path, "kernel")]), np))
    return {**variables, "params": jax.device_put(unflatten_dict(flat))}, moved


def _pack_factor(layer, kernel, xp=jnp):
    """The packed weight of a multiplying layer, by its parameter's name."""
    precision = precision_of(layer)
    if precision == "bfloat16":
        kernel = kernel.astype(jnp.bfloat16)
    if isinstance(layer, (Conv, Dense)):
        matrix = kernel.reshape(-1, kernel.shape[-1])
        if precision == "int8":
            return dict(zip(("blocks", "scale"), block_int8(matrix, xp), strict=True))
        return {"blocks": block_weight(matrix, xp)}
    return {"kernel": kernel}


def _replace_weight(flat, path, packed):
    for name in ("kernel", "sign", "exponent"):
        flat.pop((*path, name), None)
    flat |= {(*path, name): value for name, value in packed.items()}


def _check_packable(path, layer):
    if not _is_packable(layer):
        raise ValueError(
            f"{'/'.join(path)} can't be packed: expected powers of two of at most 5 bits, or two terms a "
            f"weight, got {layer.weight_bits} bits"
        )


def _is_packable(layer):
    return has_packed_form(layer.weight_bits, layer.weight_terms)


def shift_layers(model: nn.Module) -> dict[tuple[str, ...], ShiftDense]:
    """The shift layers by the paths of their parameters."""
    return _layers_and_shapes(model)[0]


def _layers_and_shapes(model):
    """The shift layers and the multiplying layers, by their paths, and the shapes of all variables."""
    layers, multiplying = {}, {}

    def watch(call, arguments, keywords, context):
        if isinstance(context.module, ShiftDense):
            layers[context.module.path] = context.module.clone(parent=None)
        if isinstance(context.module, (nn.Conv, nn.Dense)):
            multiplying[context.module.path] = context.module.clone(parent=None)
        return call(*arguments, **keywords)

    # Initialization calls every layer by itself, even where one kernel computes several later.
    with nn.intercept_methods(watch):
        shapes = variable_shapes(model)
    return layers, multiplying, shapes


def _subtree(flat: Mapping, path):
    return {name[len(path)]: value for name, value in flat.items() if name[: len(path)] == path}
