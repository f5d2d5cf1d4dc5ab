"""Position embeddings for a grid of another size than the trained one."""

from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

Interpolation = Literal["bilinear", "bicubic"]


def resize_position_embeddings(
    embeddings: Float[Array, "tokens channels"],
    grid: tuple[int, int],
    new_grid: tuple[int, int],
    interpolation: Interpolation,
) -> Float[Array, "new_tokens channels"]:
    """Embeddings of a grid's tokens interpolated to ``new_grid``; embeddings before the grid stay unchanged.

    The numbers equal PyTorch's ``interpolate`` with ``align_corners=False``, as the original models use it:
    cubic convolution with a = -0.75, and no smoothing before shrinking.
    """
    if grid == new_grid:
        return embeddings
    others = embeddings.shape[0] - grid[0] * grid[1]
    image = embeddings[others:].reshape(*grid, -1)
    rows, columns = (
        jnp.asarray(_interpolation_matrix(*sides, interpolation), embeddings.dtype)
        for sides in zip(grid, new_grid, strict=True)
    )
    image = jnp.einsum("rh,hwc,sw->rsc", rows, image, columns)
    return jnp.concatenate([embeddings[:others], image.reshape(-1, embeddings.shape[-1])])


def _interpolation_matrix(old: int, new: int, interpolation: Interpolation) -> np.ndarray:
    """[new, old]: the weight of each old sample in each new one; edges repeat outwards."""
    weight, reach = (_triangle, 1) if interpolation == "bilinear" else (_cubic, 2)
    at = (np.arange(new) + 0.5) * old / new - 0.5
    matrix = np.zeros((new, old))
    for tap in range(1 - reach, reach + 1):
        sample = np.floor(at).astype(int) + tap
        np.add.at(matrix, (np.arange(new), sample.clip(0, old - 1)), weight(np.abs(at - sample)))
    return matrix


def _triangle(distance):
    return 1 - distance


def _cubic(distance, a=-0.75):
    near = ((a + 2) * distance - (a + 3)) * distance**2 + 1
    far = a * (((distance - 5) * distance + 8) * distance - 4)
    return np.where(distance <= 1, near, far)
