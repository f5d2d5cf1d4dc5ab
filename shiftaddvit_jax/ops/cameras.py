"""Pinhole cameras: from pixels to rays, and from points back to pixels.

The axes are OpenCV's: x to the right, y down, z forward. A pose is the matrix from a camera's coordinates to
the world's. Pixels count from the centre of the first one, which is (0, 0), as in `grid_sample`. A depth is a
distance along z, not along the ray. Lengths are in the scene's own unit.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, PRNGKeyArray


class Views(NamedTuple):
    """Photographs and the cameras that took them.

    Attributes:
      images: colours from 0 to 1.
      intrinsics: focal lengths and principal point, in pixels.
      poses: from each camera's coordinates to the world's.
    """

    images: Float[Array, "views height width 3"]
    intrinsics: Float[Array, "views 3 3"]
    poses: Float[Array, "views 4 4"]


class Rays(NamedTuple):
    """Rays and the depths at which a renderer looks along them.

    Attributes:
      origins: the camera's position.
      directions: a step of 1 in depth.
      depths: depths of points, from near to far.
    """

    origins: Float[Array, "rays 3"]
    directions: Float[Array, "rays 3"]
    depths: Float[Array, "rays points"]

    @property
    def points(self) -> Float[Array, "rays points 3"]:
        """The points, in the world's coordinates."""
        return self.origins[:, None] + self.depths[..., None] * self.directions[:, None]


def pixel_directions(
    pixels: Float[Array, "rays 2"], intrinsics: Float[Array, "3 3"], pose: Float[Array, "4 4"]
) -> Float[Array, "rays 3"]:
    """The directions in which a camera sees ``pixels``, in the world's coordinates, with a depth of 1."""
    homogeneous = jnp.concatenate([pixels, jnp.ones_like(pixels[:, :1])], axis=-1)
    return homogeneous @ jnp.linalg.inv(intrinsics).T @ pose[:3, :3].T


def project(
    points: Float[Array, "points 3"], intrinsics: Float[Array, "3 3"], pose: Float[Array, "4 4"]
) -> tuple[Float[Array, "points 2"], Float[Array, "points"]]:
    """Where a camera sees ``points``, in pixels, and at which depths.

    A point behind the camera has a depth below 0, and its pixel means nothing.
    """
    seen = (points - pose[:3, 3]) @ pose[:3, :3] @ intrinsics.T
    depth = seen[:, 2]
    # As in GNT's code, so that no pixel is infinite.
    pixels = jnp.clip(seen[:, :2] / jnp.maximum(depth, 1e-8)[:, None], -1e6, 1e6)
    return pixels, depth


def inside(pixels: Float[Array, "*points 2"], height: int, width: int) -> Bool[Array, "*points"]:
    """Whether pixels lie between the centres of an image's first and last ones."""
    return jnp.all((pixels >= 0) & (pixels <= jnp.array([width - 1, height - 1])), axis=-1)


def ray_depths(
    near: Float[Array, ""] | float,
    far: Float[Array, ""] | float,
    rays: int,
    points: int,
    key: PRNGKeyArray | None = None,
) -> Float[Array, "rays points"]:
    """Depths from ``near`` to ``far``, uniform in inverse depth; with a ``key``, each drawn from an interval.

    The intervals are around these depths and end midway between two, as in GNT.
    """
    depths = jnp.broadcast_to(1 / jnp.linspace(1 / near, 1 / far, points), (rays, points))
    if key is None:
        return depths
    middles = (depths[:, 1:] + depths[:, :-1]) / 2
    upper = jnp.concatenate([middles, depths[:, -1:]], axis=1)
    lower = jnp.concatenate([depths[:, :1], middles], axis=1)
    return lower + (upper - lower) * jax.random.uniform(key, depths.shape)


def rays_through(
    pixels: Float[Array, "rays 2"],
    intrinsics: Float[Array, "3 3"],
    pose: Float[Array, "4 4"],
    bounds: tuple[Float[Array, ""] | float, Float[Array, ""] | float],
    points: int,
    key: PRNGKeyArray | None = None,
) -> Rays:
    """The rays on which a camera sees ``pixels``, with depths between ``bounds``, see `ray_depths`."""
    directions = pixel_directions(pixels, intrinsics, pose)
    depths = ray_depths(*bounds, len(pixels), points, key)
    return Rays(jnp.broadcast_to(pose[:3, 3], directions.shape), directions, depths)


def direction_differences(
    points: Float[Array, "rays points 3"], origins: Float[Array, "rays 3"], sources: Float[Array, "views 3"]
) -> Float[Array, "rays points views 4"]:
    """How differently a ray's camera and the source cameras look at each point.

    The first three numbers are the direction of the difference between the unit vectors from the point to
    both cameras, the last is the vectors' inner product.
    """
    own = _unit(origins[:, None] - points)[:, :, None]
    others = _unit(sources - points[:, :, None])
    difference = own - others
    # A norm's gradient is not finite where both cameras are the same.
    square = jnp.sum(jnp.square(difference), axis=-1, keepdims=True)
    length = jnp.sqrt(jnp.maximum(square, 1e-12))
    return jnp.concatenate([difference / length, jnp.sum(own * others, axis=-1, keepdims=True)], axis=-1)


def _unit(vectors):
    return vectors / (jnp.linalg.norm(vectors, axis=-1, keepdims=True) + 1e-6)
