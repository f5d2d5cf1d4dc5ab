"""Outlier channels that go from activations into weights (SmoothQuant, arXiv 2211.10438)."""

from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, PyTree

from shiftaddvit_jax.calibrate.branch import batches
from shiftaddvit_jax.models.inspect import Images, on_xla, watch
from shiftaddvit_jax.nn import Block

# What reads a block's LayerNorms. Where keys and values come from a reduced grid, its convolution does.
READERS = {"norm1": ("attn/qkv", "attn/q", "attn/kv", "attn/qk", "attn/v"), "norm2": ("mlp/fc1",)}
REDUCTION = "attn/sr"
TINY = 1e-12  # the magnitude of a channel that is 0


def smooth(model: nn.Module, variables: PyTree, images: Images, strength: float) -> PyTree:
    """Variables of the same model with smaller outliers in what LayerNorms of blocks put out.

    A channel is divided by s = max |x|^strength / max |w|^(1 - strength), over its geometric mean and rounded
    to a power of two, and the weights that read it are multiplied by s: numbers in int8 share one scale a
    token, which outliers take from the other channels. Products with powers of two are exact, so the model's
    outputs stay as they are.

    Args:
      model: with dense linear layers.
      variables: its variables, not packed.
      images: the calibration images.
      strength: between 0 and 1; SmoothQuant's is 0.5.

    Raises:
      ValueError: a ``strength`` that is not between 0 and 1.
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"smoothing must be between 0 and 1, got {strength}")
    params: dict[str, Any] = flatten_dict(variables["params"], sep="/")
    for norm, largest in _largest_outputs(model, variables, images).items():
        block, _, name = norm.rpartition("/")
        readers = _readers(params, block, name)
        weights = [np.max(np.abs(params[reader]), axis=tuple(_others(params[reader]))) for reader in readers]
        x, weight = (np.log2(np.maximum(each, TINY)) for each in (largest, np.max(weights, axis=0)))
        exponent = strength * x - (1 - strength) * weight
        scale = np.exp2(np.round(exponent - np.mean(exponent))).astype(np.float32)
        for leaf in ("scale", "bias"):
            params[f"{norm}/{leaf}"] = params[f"{norm}/{leaf}"] / scale
        for reader in readers:
            params[reader] = params[reader] * scale[:, None]
    return {**variables, "params": unflatten_dict(params, sep="/")}


def _readers(params: Mapping[str, Any], block: str, norm: str) -> list[str]:
    """The kernels that read a LayerNorm of a block, [..., inputs, outputs]."""
    names = READERS[norm]
    if norm == "norm1" and f"{block}/{REDUCTION}/kernel" in params:
        names = (*(name for name in names if name != "attn/kv"), REDUCTION)
    kernels = (f"{block}/{name}/kernel" for name in names)
    return [kernel for kernel in kernels if kernel in params]


def _others(kernel):
    """The axes of a kernel but that of its inputs."""
    return [axis for axis in range(kernel.ndim) if axis != kernel.ndim - 2]


def _largest_outputs(model, variables, images) -> dict[str, Float[np.ndarray, "channels"]]:
    """The largest magnitude that each LayerNorm of a block puts out in each channel, by its path."""

    def look(module, method, arguments, y):
        if isinstance(module, nn.LayerNorm) and module.name in READERS and isinstance(module.parent, Block):
            return jnp.max(jnp.abs(y), axis=tuple(range(y.ndim - 1)))
        return None

    largest = watch(on_xla(model), look)
    found = [largest(variables, images[batch]) for batch in batches(images)]
    return {norm: np.max([np.asarray(each[norm][0]) for each in found], axis=0) for norm in found[0]}
