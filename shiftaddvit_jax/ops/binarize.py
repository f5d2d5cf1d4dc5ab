"""Binarization: queries and keys become codes in Hamming space."""

import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, UInt32

from kernels_tvm.descriptions import BinarizeDescription
from kernels_tvm.store import Kernel
from shiftaddvit_jax.ops.implementation import Implementation, float32_only, run_op
from shiftaddvit_jax.ops.implementation.custom_call import call_kernel
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
    _check_axes("binarize", x)

    def reference(x):
        return _binarize(x, threshold, tuple(levels))

    def kernel(x):
        rows = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
        low, high = (float(level) for level in levels)
        codes = Kernel("binarize", BinarizeDescription(x.shape[-1], threshold == "sample", low, high))
        return call_kernel(codes, [jax.ShapeDtypeStruct(rows.shape, x.dtype)], rows)[0].reshape(x.shape)

    unsupported = _why_no_kernel(x, threshold)
    return run_op("binarize", implementation, kernel, reference, x, unsupported=unsupported)


def pack_codes(
    x: Float[Array, "*batch tokens head_dim"],
    threshold: Threshold = "sample",
    implementation: Implementation = None,
) -> UInt32[Array, "*batch tokens words"]:
    """`binarize` as bits: value c is bit c % 32 of word c // 32, 1 above the threshold. No gradient.

    Raises:
      ValueError: unknown threshold, or fewer than two axes.
    """
    check_choice("threshold", threshold, THRESHOLDS)
    _check_axes("pack_codes", x)
    words = -(-x.shape[-1] // WORD)

    def reference(x):
        padding = [(0, 0)] * (x.ndim - 1) + [(0, words * WORD - x.shape[-1])]
        codes = jnp.pad(binarize(x, threshold, implementation="xla"), padding)
        bits = codes.reshape(*x.shape[:-1], words, WORD).astype(jnp.uint32)
        return jnp.sum(bits << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)

    def kernel(x):
        rows = x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:])
        bits = Kernel("binarize", BinarizeDescription(x.shape[-1], threshold == "sample", packed=True))
        output = jax.ShapeDtypeStruct((*rows.shape[:2], words), jnp.uint32)
        return call_kernel(bits, [output], rows)[0].reshape(*x.shape[:-1], words)

    unsupported = _why_no_kernel(x, threshold)
    return run_op("pack_codes", implementation, kernel, reference, x, unsupported=unsupported)


def _check_axes(op, x):
    if x.ndim < 2:
        raise ValueError(f"{op} expects [..., tokens, head_dim], got shape {x.shape}")


def _why_no_kernel(x, threshold):
    return "a threshold of the whole batch has no kernel" if threshold == "tensor" else float32_only(x)


@partial(jax.custom_jvp, nondiff_argnums=(1, 2))
@partial(jax.jit, static_argnums=(1, 2))
def _binarize(x, threshold, levels):
    low, high = levels
    if threshold == "zero":
        limit = jnp.zeros((), x.dtype)
    else:
        axes = (-2, -1) if threshold == "sample" else None
        limit = jnp.mean(x, axis=axes, keepdims=True)
    return jnp.where(x > limit, high, low).astype(x.dtype)


@_binarize.defjvp
def _straight_through(threshold, levels, arguments, tangents):
    (x,), (tangent,) = arguments, tangents
    low, high = levels
    passes = (x >= low) & (x <= high)
    return _binarize(x, threshold, levels), jnp.where(passes, tangent, 0).astype(tangent.dtype)
