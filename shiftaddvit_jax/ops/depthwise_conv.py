"""Depthwise convolutions as shifted multiply-adds.

XLA's grouped convolution on CPU takes most of a small model's time (PVTv2-B0 at 224x224: 166 of 198 ms);
a sum of shifted products, which XLA fuses into one loop, does not.

Sums are in float32 at least, also those over tokens that a kernel's gradient is; results have ``x``'s dtype.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from kernels_tvm.descriptions import DepthwiseConvDescription
from kernels_tvm.store import Kernel
from shiftaddvit_jax.ops.implementation import Implementation, float32_only, run_op
from shiftaddvit_jax.ops.implementation.custom_call import call_kernel


def depthwise_conv_2d(
    x: Float[Array, "*batch height width channels"],
    kernel: Float[Array, "kernel_height kernel_width channels"],
    implementation: Implementation = None,
) -> Float[Array, "*batch height width channels"]:
    """Each channel correlated with its own kernel of odd size, zero-padded to the same height and width.

    Raises:
      ValueError: a kernel of even size, or channels that differ.
    """
    _check_kernel("depthwise_conv_2d", x, kernel, 2)
    return _convolve("depthwise_conv_2d", x, kernel, implementation=implementation)


def depthwise_conv_gelu(
    x: Float[Array, "*batch height width channels"],
    kernel: Float[Array, "kernel_height kernel_width channels"],
    bias: Float[Array, "channels"],
    implementation: Implementation = None,
) -> Float[Array, "*batch height width channels"]:
    """GELU of `depthwise_conv_2d` plus a bias, in one kernel.

    Raises:
      ValueError: as `depthwise_conv_2d`.
    """
    _check_kernel("depthwise_conv_gelu", x, kernel, 2)
    return _convolve("depthwise_conv_gelu", x, kernel, bias, implementation=implementation)


def depthwise_conv_1d(
    x: Float[Array, "*batch tokens channels"],
    kernel: Float[Array, "kernel_size channels"],
    implementation: Implementation = None,
) -> Float[Array, "*batch tokens channels"]:
    """Each channel correlated over the tokens with its own kernel of odd size, zero-padded.

    Raises:
      ValueError: a kernel of even size, or channels that differ.
    """
    _check_kernel("depthwise_conv_1d", x, kernel, 1)
    # Tokens are the width of a grid of one row.
    y = _convolve("depthwise_conv_1d", x[..., None, :, :], kernel[None], implementation=implementation)
    return y[..., 0, :, :]


def _convolve(op, x, *arrays, implementation):
    """The convolution of ``x``; if ``arrays`` has a bias after the kernel, the GELU of their sum."""
    unsupported = float32_only(x, *arrays)
    return run_op(op, implementation, _kernel, _reference, x, *arrays, unsupported=unsupported)


def _kernel(x, kernel, *bias):
    *_, height, width, channels = x.shape
    images = x.reshape(-1, height, width, channels)
    conv = DepthwiseConvDescription(height, width, channels, kernel.shape[:2], gelu=bool(bias))
    output = jax.ShapeDtypeStruct(images.shape, x.dtype)
    taps = kernel.reshape(-1, channels)
    (y,) = call_kernel(Kernel("depthwise_conv", conv), [output], images, taps, *bias)
    return y.reshape(x.shape)


def _reference(x, kernel, *bias):
    y = _depthwise_conv(x, kernel)
    return jax.nn.gelu(y + bias[0], approximate=False).astype(x.dtype) if bias else y


def _check_kernel(op, x, kernel, spatial_axes):
    if kernel.ndim != spatial_axes + 1 or x.ndim < spatial_axes + 1 or x.shape[-1] != kernel.shape[-1]:
        raise ValueError(
            f"{op} expects x [..., {'height, width' if spatial_axes == 2 else 'tokens'}, channels] and one "
            f"kernel a channel, got shapes {x.shape} and {kernel.shape}"
        )
    if any(size % 2 == 0 for size in kernel.shape[:-1]):
        raise ValueError(f"{op} needs a kernel of odd size to keep the shape, got {kernel.shape[:-1]}")


def _margins(x, kernel):
    sides = [(size // 2, size // 2) for size in kernel.shape[:2]]
    return [(0, 0)] * (x.ndim - 3) + sides + [(0, 0)]


@jax.custom_jvp
@jax.jit
def _depthwise_conv(x, kernel):
    height, width = x.shape[-3:-1]
    kernel = kernel.astype(_sum_dtype(x))
    padded = jnp.pad(x, _margins(x, kernel))
    y: Any = sum(
        padded[..., i : i + height, j : j + width, :] * kernel[i, j] for i, j in np.ndindex(*kernel.shape[:2])
    )
    return y.astype(x.dtype)


def _sum_dtype(x):
    return jnp.promote_types(x.dtype, jnp.float32)


@_depthwise_conv.defjvp
def _depthwise_conv_jvp(arguments, tangents):
    return _depthwise_conv(*arguments), _tangent(*arguments, *tangents)


# XLA would fuse the transposed sum with the gradient's producer, so every tap would compute that gradient
# again (measured: 33 ms instead of 11 for 64 images of 8 x 8 x 128). A loop over the taps transposes to a
# loop, which reads its operands from memory.
@jax.jit
def _tangent(x, kernel, x_tangent, kernel_tangent):
    columns, channels = kernel.shape[1:]
    margins = _margins(x, kernel)
    kernel, kernel_tangent, x_tangent = (
        array.astype(_sum_dtype(x)) for array in (kernel, kernel_tangent, x_tangent)
    )
    padded, padded_tangent = jnp.pad(x, margins), jnp.pad(x_tangent, margins)

    @partial(jax.checkpoint, prevent_cse=False)  # else every tap's window would be kept
    def add_tap(total, tap):
        index, weight, weight_tangent = tap
        corner = (0,) * (x.ndim - 3) + (index // columns, index % columns, 0)
        window, window_tangent = (
            jax.lax.dynamic_slice(array, corner, x.shape) for array in (padded, padded_tangent)
        )
        return total + window_tangent * weight + window * weight_tangent, None

    taps, tap_tangents = (array.reshape(-1, channels) for array in (kernel, kernel_tangent))
    steps = jnp.arange(len(taps)), taps, tap_tangents
    return jax.lax.scan(add_tap, jnp.zeros_like(x_tangent), steps)[0].astype(x.dtype)
