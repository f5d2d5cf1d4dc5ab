"""Binarization: queries and keys become codes in Hamming space."""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from kernels_tvm.descriptions import Binarize
from kernels_tvm.library import Kernel
from shiftaddvit_jax.ops.custom_call import call_kernel, with_xla_gradient
from shiftaddvit_jax.ops.implementation import Implementation, float32_only, uses_tvm
from shiftaddvit_jax.validation import check_choice

Threshold = Literal["zero", "sample", "tensor"]
THRESHOLDS: tuple[Threshold, ...] = ("zero", "sample", "tensor")
LEVELS = ((0, 1), (-1, 1))
WORD = 32  # codes in a word of bits


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
    check_choice("threshold", threshold, THRESHOLDS)
    if tuple(levels) not in LEVELS:
        raise ValueError(f"levels must be (0, 1) or (-1, 1), got {levels!r}")
    if x.ndim < 2:
        raise ValueError(f"binarize expects [..., tokens, head_dim], got shape {x.shape}")
    if not uses_tvm("binarize", implementation, _why_no_kernel(x, threshold)):
        return _binarize(x, threshold, tuple(levels))

    def forward(x):
        rows = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
        low, high = (float(level) for level in levels)
        kernel = Kernel("binarize", Binarize(x.shape[-1], threshold == "sample", low, high))
        return call_kernel(kernel, [jax.ShapeDtypeStruct(rows.shape, x.dtype)], rows)[0].reshape(x.shape)

    return with_xla_gradient(forward, lambda x: _binarize(x, threshold, tuple(levels)))(x)


def pack_codes(
    x: Float[Array, "*batch tokens head_dim"],
    threshold: Threshold = "sample",
    implementation: Implementation = None,
) -> UInt32[Array, "*batch tokens words"]:
    """`binarize` as bits: value c is bit c % 32 of word c // 32, 1 above the threshold. No gradient.

    Raises:
      ValueError: unknown threshold, or fewer than two axes.
    """
    codes = binarize(x, threshold, implementation="xla")
    words = -(-x.shape[-1] // WORD)
    if uses_tvm("pack_codes", implementation, _why_no_kernel(x, threshold)):
        rows = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
        kernel = Kernel("binarize", Binarize(x.shape[-1], threshold == "sample", packed=True))
        output = jax.ShapeDtypeStruct((*rows.shape[:2], words), jnp.uint32)
        return call_kernel(kernel, [output], rows)[0].reshape(*x.shape[:-1], words)
    padding = [(0, 0)] * (x.ndim - 1) + [(0, words * WORD - x.shape[-1])]
    bits = jnp.pad(codes, padding).reshape(*x.shape[:-1], words, WORD).astype(jnp.uint32)
    return jnp.sum(bits << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def _why_no_kernel(x, threshold):
    return "a threshold of the whole batch has no kernel" if threshold == "tensor" else float32_only(x)


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
