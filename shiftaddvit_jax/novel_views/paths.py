"""Cameras along a path."""

import json
import math
from pathlib import Path

import numpy as np
from jaxtyping import Float

from shiftaddvit_jax.data.analytic_scenes import look_at
from shiftaddvit_jax.data.scenes import Scene

Poses = Float[np.ndarray, "frames 4 4"]
MOST = 10_000  # frames


def spiral_path(scene: Scene, frames: int = 60, turns: float = 2.0) -> Poses:
    """Cameras on a spiral before the scene, as in NeRF's videos of LLFF scenes.

    It is as wide as nine tenths of the cameras' distances from their mean, per axis, and all cameras look at
    the point in front of the mean one at the harmonic mean of the scene's depths.
    """
    centre, target, down = _mean_camera(scene)
    forward = target - centre
    reach = np.percentile(np.abs(scene.poses[:, :3, 3] - centre), 90, axis=0)
    path = []
    for angle in np.linspace(0, 2 * math.pi * turns, _checked(frames), endpoint=False):
        shift = reach * [math.cos(angle), math.sin(angle), math.sin(angle / 2)]
        path.append(look_at(centre + shift, centre + forward, down))
    return np.stack(path)


def circle_path(scene: Scene, frames: int = 60) -> Poses:
    """Cameras on a circle around the point that the scene's cameras look at, at their mean distance from it.

    The circle is in the plane to which the cameras' mean direction downward is normal, at their mean height.
    """
    centre, target, down = _mean_camera(scene)
    height = (centre - target) @ down * down
    outward = centre - target - height
    radius = np.linalg.norm(outward)
    if radius < 1e-6:
        raise ValueError("the scene's cameras look straight down at their middle; take the spiral")
    outward = outward / radius
    beside = np.cross(down, outward)
    path = []
    for angle in np.linspace(0, 2 * math.pi, _checked(frames), endpoint=False):
        place = target + height + radius * (math.cos(angle) * outward + math.sin(angle) * beside)
        path.append(look_at(place, target, down))
    return np.stack(path)


def read_path(file: str | Path) -> Poses:
    """The poses in a JSON file, a list of matrices of 4 x 4 in the conventions of `Scene`.

    Raises:
      ValueError: a file of something else, or a pose that is not finite.
    """
    try:
        poses = np.asarray(json.loads(Path(file).read_text(encoding="utf-8")), np.float64)
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{file} holds no list of poses: {error}") from None
    if poses.ndim != 3 or poses.shape[1:] != (4, 4) or not 1 <= len(poses) <= MOST:
        raise ValueError(f"{file} has shape {poses.shape}; expected 1 to {MOST} matrices of 4 x 4")
    if not np.isfinite(poses).all():
        raise ValueError(f"{file} has a pose that is not finite")
    return poses


def _mean_camera(scene):
    """The cameras' mean place, the point they look at, and their mean direction downward."""
    centre = scene.poses[:, :3, 3].mean(axis=0)
    forward = scene.poses[:, :3, 2].sum(axis=0)
    norm = np.linalg.norm(forward)
    if norm < 1e-6:
        raise ValueError("the scene's cameras look in opposite directions; give the path as a JSON file")
    down = scene.poses[:, :3, 1].sum(axis=0)
    focus = 2 / (1 / scene.near + 1 / scene.far)
    return centre, centre + focus * forward / norm, down / np.linalg.norm(down)


def _checked(frames):
    if not 1 <= frames <= MOST:
        raise ValueError(f"frames must be from 1 to {MOST}, got {frames}")
    return frames
