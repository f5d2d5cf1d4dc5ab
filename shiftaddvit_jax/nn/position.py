"""Embeddings of positions, and biases of relative ones, for a grid of another size than the trained one."""

import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

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
    image = _interpolate(embeddings[others:], grid, new_grid, interpolation)
    return jnp.concatenate([embeddings[:others], image])


def relative_positions(grid: tuple[int, int], others: int) -> Int[np.ndarray, "tokens tokens"]:
    """The row of a table of biases for each token, the query, beside each other one, the key.

    Rows are in the order of BEiT and Swin: row by row over the differences of the tokens' places, query minus
    key, from the lowest on. The last three are for ``others`` tokens before the grid, such as a class token:
    for their pairs with the grid's tokens, for the grid's with them, and for their pairs among themselves.
    """
    height, width = grid
    rows, columns = (place.ravel() for place in np.indices(grid))
    differences = [place[:, None] - place[None, :] for place in (rows, columns)]
    index = (differences[0] + height - 1) * (2 * width - 1) + differences[1] + width - 1
    count = bias_rows(grid)
    whole = np.full((others + len(index),) * 2, count - 1)
    whole[:others, others:] = count - 3
    whole[others:, :others] = count - 2
    whole[others:, others:] = index
    return whole


def bias_rows(grid: tuple[int, int]) -> int:
    """The rows of a table of biases for a grid: one for each difference of two places, and three more."""
    return (2 * grid[0] - 1) * (2 * grid[1] - 1) + 3


def resize_position_biases(
    table: Float[Array, "rows heads"], grid: tuple[int, int], new_grid: tuple[int, int]
) -> Float[Array, "new_rows heads"]:
    """A table of biases as in `relative_positions`, interpolated to ``new_grid`` as BEiT's users do: bicubic.

    The last three rows stay unchanged.
    """
    if grid == new_grid:
        return table
    sides, new_sides = ((2 * height - 1, 2 * width - 1) for height, width in (grid, new_grid))
    return jnp.concatenate([_interpolate(table[:-3], sides, new_sides, "bicubic"), table[-3:]])


def _interpolate(values, grid, new_grid, interpolation):
    """``values`` [rows * columns, channels] on another grid."""
    rows, columns = (
        jnp.asarray(_interpolation_matrix(*sides, interpolation), values.dtype)
        for sides in zip(grid, new_grid, strict=True)
    )
    image = jnp.einsum("rh,hwc,sw->rsc", rows, values.reshape(*grid, -1), columns)
    return image.reshape(math.prod(new_grid), -1)


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
