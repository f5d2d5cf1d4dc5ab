"""Images turned, shifted, blurred, recolored and made noisy, differentiable in how much.

Pixels are in [0, 1]. A perturbation by nothing leaves each of them as it is, to the last bit.
"""

import math

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from shiftaddvit_jax.ops.grid_sample import grid_sample

Images = Float[Array, "batch height width channels"]
Number = Float[Array, ""] | float


def warp(
    images: Images, rotation: Number = 0.0, scale: Number = 1.0, shift_x: Number = 0.0, shift_y: Number = 0.0
) -> Images:
    """Images turned and scaled about their centre, then shifted; bilinear, and edges go on outside.

    Args:
      images: all warped alike.
      rotation: degrees counter-clockwise; a whole turn is none.
      scale: factor of lengths, above 0; 2 shows everything twice as large.
      shift_x: to the right, as a share of the width.
      shift_y: downward, as a share of the height.
    """
    batch, height, width, channels = images.shape
    angle = jnp.radians(jnp.remainder(rotation, 360.0))
    cosine, sine = jnp.cos(angle) / scale, jnp.sin(angle) / scale
    x = jnp.arange(width) - (width - 1) / 2 - shift_x * width
    y = jnp.arange(height)[:, None] - (height - 1) / 2 - shift_y * height
    from_x = cosine * x - sine * y + (width - 1) / 2
    from_y = sine * x + cosine * y + (height - 1) / 2
    points = jnp.stack([from_x, from_y], axis=-1).reshape(1, -1, 2)
    # One image whose channels are all images': each point is found once, and read in a row.
    together = images.transpose(1, 2, 0, 3).reshape(1, height, width, batch * channels)
    warped = grid_sample(together, points.astype(images.dtype), "edge")
    return warped.reshape(height, width, batch, channels).transpose(2, 0, 1, 3)


def gaussian_blur(images: Images, deviation: Number) -> Images:
    """Images under a Gaussian filter, whose weights inside the image sum to 1.

    Args:
      images: all blurred alike.
      deviation: the Gaussian's standard deviation in pixels, from 0.
    """

    def weights(size):
        distance = jnp.arange(size) - jnp.arange(size)[:, None]
        squares = jnp.square(distance) / (2 * jnp.maximum(jnp.square(deviation), 1e-6))
        return jax.nn.softmax(-squares.astype(images.dtype), axis=-1)

    rows, columns = weights(images.shape[1]), weights(images.shape[2])
    return jnp.einsum("ih,bhwc,jw->bijc", rows, images, columns, precision="highest")


def adjust_brightness(images: Images, factor: Number) -> Images:
    """Images times ``factor``, cut to [0, 1]."""
    return jnp.clip(images * factor, 0, 1)


def adjust_contrast(images: Images, factor: Number) -> Images:
    """Images whose distance from their own mean is ``factor`` times what it was, cut to [0, 1]."""
    mean = jnp.mean(images, axis=(1, 2, 3), keepdims=True)
    return jnp.clip(images * factor + mean * (1 - factor), 0, 1)


def rotate_hue(images: Float[Array, "batch height width 3"], rotation: Number) -> Images:
    """Colors turned about the axis of grays, from red to green to blue, cut to [0, 1].

    Args:
      images: RGB.
      rotation: degrees; a whole turn is none.
    """
    angle = jnp.radians(jnp.remainder(rotation, 360.0))
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    gray = jnp.mean(images, axis=-1, keepdims=True)
    # The product of the axis (1, 1, 1) / sqrt(3) and a color, by Rodrigues' formula.
    across = (jnp.roll(images, 1, axis=-1) - jnp.roll(images, -1, axis=-1)) / math.sqrt(3)
    return jnp.clip(images * cosine + across * sine + gray * (1 - cosine), 0, 1)


def add_noise(images: Images, noise: Images, deviation: Number) -> Images:
    """Images plus ``deviation`` times standard normal ``noise``, cut to [0, 1]."""
    return jnp.clip(images + deviation * noise, 0, 1)
