"""Binarization: queries and keys become codes in Hamming space."""

from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from shiftaddvit_jax.ops.implementation import Implementation, uses_tvm
from shiftaddvit_jax.validation import check_choice

Threshold = Literal["zero", "sample", "tensor"]
THRESHOLDS: tuple[Threshold, ...] = ("zero", "sample", "tensor")
LEVELS = ((0, 1), (-1, 1))


def binarize(
    x: Float[Array, "*batch tokens head_dim"],
    threshold: Threshold = "sample",
    levels: tuple[int, int] = (0, 1),
    implementation: Implementation = None,
) -> Float[Array, "*batch tokens head_dim"]:
    """Binary codes of ``x``: the upper level where ``x`` is above the threshold, else the lower one.

    Args:
      x: values, any floating dtype; the codes have the same.
      threshold: ``"zero"``; ``"sample"``, the mean over the last two axes (one image's tokens and
        head_dim), so that no image influences another; ``"tensor"``, the mean of the whole array, as in
        the authors' code, which lets the images of a batch influence each other: for parity only.
      levels: ``(0, 1)`` or ``(-1, 1)``.
      implementation: see `shiftaddvit_jax.ops`.

    The gradient is a straight-through estimator, clipped: it passes where ``x`` itself lies between the
    levels, ends included, and is 0 elsewhere; the threshold counts as a constant.

    Raises:
      ValueError: unknown threshold or levels, or fewer than two axes.
    """
    uses_tvm("binarize", implementation, unsupported="it has no kernel yet")
    check_choice("threshold", threshold, THRESHOLDS)
    if tuple(levels) not in LEVELS:
        raise ValueError(f"levels must be (0, 1) or (-1, 1), got {levels!r}")
    if x.ndim < 2:
        raise ValueError(f"binarize expects [..., tokens, head_dim], got shape {x.shape}")
    return _binarize(x, threshold, tuple(levels))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
@partial(jax.jit, static_argnums=(1, 2))
def _binarize(x, threshold, levels):
    low, high = levels
    if threshold == "zero":
        limit = jnp.zeros((), x.dtype)
    else:
        axes = (-2, -1) if threshold == "sample" else None
        limit = jnp.mean(x, axis=axes, keepdims=True)
    return jnp.where(x > limit, high, low).astype(x.dtype)


def _binarize_forward(x, threshold, levels):
    low, high = levels
    return _binarize(x, threshold, levels), (x >= low) & (x <= high)


def _binarize_backward(threshold, levels, passes, gradient):
    return (jnp.where(passes, gradient, 0).astype(gradient.dtype),)


_binarize.defvjp(_binarize_forward, _binarize_backward)
