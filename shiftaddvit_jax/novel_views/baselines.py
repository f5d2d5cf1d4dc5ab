"""Views without a model: two floors, and the ceiling that warping by the true depth is."""

import numpy as np
from jaxtyping import Float

from shiftaddvit_jax.data.analytic_scenes import bilinear
from shiftaddvit_jax.data.scenes import Scene
from shiftaddvit_jax.novel_views.render import choose_sources

View = Float[np.ndarray, "height width 3"]
AGREE = 0.05  # by which share of its depth a point may lie behind what a view sees there, and still be seen


def mean_of_views(scene: Scene, index: int, views: int) -> View:
    """The mean of the photographs nearest to the view ``index``, as they are."""
    sources = choose_sources(scene, scene.poses[index], views, index)
    return scene.images[sources].mean(axis=0) / 255


def fit_plane(scene: Scene) -> float:
    """The depth at which the nearest photograph, warped as if all lay there, is nearest to training views.

    It is one of 16 between the scene's bounds, uniform in inverse depth, by the mean squared error.
    """
    depths = 1 / np.linspace(1 / scene.near, 1 / scene.far, 16)

    def error(depth):
        views = ((index, warp_by_plane(scene, index, depth)) for index in scene.training)
        return np.mean([np.mean(np.square(view - scene.images[index] / 255)) for index, view in views])

    return float(min(depths, key=error))


def warp_by_plane(scene: Scene, index: int, depth: float) -> View:
    """The nearest photograph, warped as if all that the view ``index`` sees lay at one depth."""
    (source,) = choose_sources(scene, scene.poses[index], 1, index)
    height, width = scene.images.shape[1:3]
    colours, _, _ = _warp(scene, index, np.full(height * width, depth), source)
    return colours.reshape(height, width, 3)


def warp_by_depth(scene: Scene, index: int, views: int) -> View:
    """The photographs nearest to the view, warped by its true depth: their mean where they see the point.

    Raises:
      ValueError: a scene whose depths are not known.
    """
    if scene.depths is None:
        raise ValueError("the scene's depths are not known; those of analytic scenes are")
    height, width = scene.images.shape[1:3]
    total, weights = np.zeros((height * width, 3)), np.zeros((height * width, 1))
    for rank, source in enumerate(choose_sources(scene, scene.poses[index], views, index)):
        colours, pixels, depths = _warp(scene, index, scene.depths[index].ravel(), source)
        there = bilinear(scene.depths[source][..., None], pixels)[:, 0]
        inside = np.all((pixels >= 0) & (pixels <= [width - 1, height - 1]), axis=1)
        seen = inside & (depths <= (1 + AGREE) * there)
        # Where none sees the point, the nearest photograph has the last word.
        weight = np.where(seen, 1.0, 1e-6 / (1 + rank))[:, None]
        total += weight * colours
        weights += weight
    return (total / weights).reshape(height, width, 3)


def _warp(scene, index, depths, source):
    """What a view shows of another's points: colours, and the points' pixels and depths there."""
    height, width = scene.images.shape[1:3]
    pixels = np.stack(np.meshgrid(np.arange(width), np.arange(height)), axis=-1).reshape(-1, 2)
    homogeneous = np.concatenate([pixels, np.ones_like(pixels[:, :1])], axis=1)
    pose, other = scene.poses[index], scene.poses[source]
    directions = homogeneous @ np.linalg.inv(scene.intrinsics[index]).T @ pose[:3, :3].T
    points = pose[:3, 3] + depths[:, None] * directions
    seen = (points - other[:3, 3]) @ other[:3, :3] @ scene.intrinsics[source].T
    places = seen[:, :2] / np.maximum(seen[:, 2:], 1e-8)
    return bilinear(scene.images[source] / 255, places), places, seen[:, 2]
