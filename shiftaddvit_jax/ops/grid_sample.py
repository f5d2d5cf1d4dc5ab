"""Images read between their pixels."""

from typing import Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

Borders = Literal["zeros", "edge"]


def grid_sample(
    images: Float[Array, "batch height width channels"],
    points: Float[Array, "batch count 2"],
    borders: Borders = "zeros",
) -> Float[Array, "batch count channels"]:
    """Each image at its own points, bilinear, differentiable in both.

    Args:
      images: what is read.
      points: x (right) and y (down) in pixels; the centre of the first pixel is (0, 0). This is torch's
        ``grid_sample`` with ``align_corners=True``, whose coordinates are ``2 x / (width - 1) - 1``.
      borders: what lies outside: ``"zeros"``, or the nearest pixel of the ``"edge"``.

    Returns:
      Values of ``images``' dtype; sums are in float32 at least.

    Raises:
      ValueError: ``borders`` has another name.
    """
    if borders not in ("zeros", "edge"):
        raise ValueError(f"borders is {borders!r}; expected 'zeros' or 'edge'")
    height, width = images.shape[1:3]
    size = jnp.array([width, height])
    # So that corners fit an int32; points more than one pixel outside read the border alone.
    points = jnp.clip(points.astype(jnp.promote_types(points.dtype, jnp.float32)), -2.0, size + 1.0)
    if borders == "edge":
        points = jnp.clip(points, 0, size - 1)
    first = jnp.floor(points)
    fraction = points - first
    read = jax.vmap(lambda image, x, y: image[y, x])

    total = jnp.zeros((), points.dtype)
    for right in (0, 1):
        for down in (0, 1):
            corner = first.astype(jnp.int32) + jnp.array([right, down])
            x, y = jnp.moveaxis(jnp.clip(corner, 0, size - 1), -1, 0)
            weight = jnp.prod(jnp.where(jnp.array([right, down]) == 1, fraction, 1 - fraction), axis=-1)
            if borders == "zeros":
                weight = weight * jnp.all((corner >= 0) & (corner < size), axis=-1)
            total += weight[..., None] * read(images, x, y).astype(weight.dtype)
    return total.astype(images.dtype)
