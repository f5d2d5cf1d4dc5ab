"""Scenes of planes, boxes and spheres in closed form: any view, exact depth, and nothing to download."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np
from jaxtyping import Float

Points = Float[np.ndarray, "rays 3"]
Depths = Float[np.ndarray, "rays"]
Place = Sequence[float] | Float[np.ndarray, "3"]
# Towards the light; y points down.
LIGHT = np.array([-0.4, -0.8, -0.45]) / np.linalg.norm([-0.4, -0.8, -0.45])


class Hit(NamedTuple):
    """Where rays meet a surface first: depth (inf for a miss), normal, and place on the texture."""

    depths: Depths
    normals: Points
    places: Float[np.ndarray, "rays 2"]


@dataclass(frozen=True)
class Plane:
    """A plane through ``point`` with unit axes ``right`` and ``down`` of its texture, without an end."""

    point: tuple[float, float, float]
    right: tuple[float, float, float]
    down: tuple[float, float, float]

    def meet(self, origins: Points, directions: Points) -> Hit:
        """The first point of each ray in front of its origin."""
        right, down = np.asarray(self.right), np.asarray(self.down)
        normal = np.cross(right, down)
        with np.errstate(divide="ignore", invalid="ignore"):
            depths = (np.asarray(self.point) - origins) @ normal / (directions @ normal)
        depths = np.where(depths > 1e-9, depths, np.inf)
        places = _at(origins, directions, depths) - self.point
        facing = np.where((directions @ normal)[:, None] > 0, -normal, normal)
        return Hit(depths, facing, places @ np.stack([right, down], axis=1))


@dataclass(frozen=True)
class Sphere:
    """A sphere, textured by longitude and latitude."""

    centre: tuple[float, float, float]
    radius: float

    def meet(self, origins: Points, directions: Points) -> Hit:
        """The first point of each ray in front of its origin."""
        away = origins - self.centre
        a = np.sum(directions**2, axis=1)
        b = np.sum(directions * away, axis=1)
        root = b**2 - a * (np.sum(away**2, axis=1) - self.radius**2)
        depths = (-b - np.sqrt(np.maximum(root, 0))) / a
        depths = np.where((root >= 0) & (depths > 1e-9), depths, np.inf)
        normals = (_at(origins, directions, depths) - self.centre) / self.radius
        longitude = np.arctan2(normals[:, 0], -normals[:, 2])
        latitude = np.arcsin(np.clip(normals[:, 1], -1, 1))
        return Hit(depths, normals, self.radius * np.stack([longitude, latitude], axis=1))


@dataclass(frozen=True)
class Box:
    """A box whose sides are parallel to the axes, each side textured from its corner."""

    low: tuple[float, float, float]
    high: tuple[float, float, float]

    def meet(self, origins: Points, directions: Points) -> Hit:
        """The first point of each ray in front of its origin."""
        with np.errstate(divide="ignore", invalid="ignore"):
            to = np.stack([(np.asarray(side) - origins) / directions for side in (self.low, self.high)])
        enters, leaves = to.min(axis=0), to.max(axis=0)
        depths = enters.max(axis=1)
        hits = (depths <= leaves.min(axis=1)) & (depths > 1e-9)
        depths = np.where(hits, depths, np.inf)
        axis = np.argmax(enters, axis=1)
        normals = -np.sign(directions) * np.eye(3)[axis]
        beside = np.array([[1, 2], [0, 2], [0, 1]])[axis]
        places = np.take_along_axis(_at(origins, directions, depths) - self.low, beside, axis=1)
        return Hit(depths, normals, places)


def _at(origins, directions, depths):
    return origins + np.where(np.isfinite(depths), depths, 0)[:, None] * directions


@dataclass(frozen=True)
class Surface:
    """A shape and what it looks like.

    Attributes:
      shape: a plane, a box or a sphere.
      photograph: which of scikit-learn's two photographs its texture is: 0 (a temple) or 1 (a flower).
      scale: pixels of the texture for a unit of length.
      start: the texture's pixel (x, y) at the place (0, 0).
      gloss: strength of a highlight that moves with the camera, 0 for none.
    """

    shape: Plane | Box | Sphere
    photograph: int
    scale: float
    start: tuple[float, float] = (0.0, 0.0)
    gloss: float = 0.0


def demo_surfaces(gloss: float = 0.0) -> tuple[Surface, ...]:
    """A wall and a floor, with two boxes and two spheres before them; ``gloss`` is the spheres'."""
    return (
        Surface(Plane((0, 0, 3), (1, 0, 0), (0, 1, 0)), 0, 55, (320, 210)),
        Surface(Plane((0, 1, 0), (1, 0, 0), (0, 0, 1)), 1, 60, (320, 210)),
        Surface(Box((-1.6, -0.2, 0.4), (-0.6, 1.0, 1.3)), 1, 120, (180, 60)),
        Surface(Box((0.9, 0.3, -0.5), (1.6, 1.0, 0.2)), 0, 150, (60, 150)),
        Surface(Sphere((0.2, 0.45, 0.3), 0.55), 0, 110, (320, 210), gloss),
        Surface(Sphere((0.9, -0.7, 1.5), 0.6), 1, 130, (330, 170), gloss),
    )


def render(
    surfaces: Sequence[Surface],
    intrinsics: Float[np.ndarray, "3 3"],
    pose: Float[np.ndarray, "4 4"],
    height: int,
    width: int,
    samples: int = 3,
) -> tuple[Float[np.ndarray, "height width 3"], Float[np.ndarray, "height width"]]:
    """A view, colours from 0 to 1, and the depth at each pixel's centre.

    A colour is the mean over a grid of ``samples`` x ``samples`` points of its pixel, an odd number. What no
    surface fills is black and at infinity. Conventions are those of `shiftaddvit_jax.ops.cameras`.
    """
    rows, columns = np.meshgrid(np.arange(height), np.arange(width), indexing="ij")
    centres = np.stack([columns, rows], axis=-1).reshape(-1, 2).astype(np.float64)
    offsets = (np.arange(samples) - (samples - 1) / 2) / samples
    colours, depth = np.zeros((len(centres), 3)), np.zeros(len(centres))
    for down in offsets:
        for right in offsets:
            found, at = _look(surfaces, centres + np.array([right, down]), intrinsics, pose)
            colours += found / samples**2
            if right == down == 0:
                depth = at
    return colours.reshape(height, width, 3), depth.reshape(height, width)


def _look(surfaces, pixels, intrinsics, pose):
    directions = np.concatenate([pixels, np.ones_like(pixels[:, :1])], axis=1) @ np.linalg.inv(intrinsics).T
    directions = directions @ pose[:3, :3].T
    origins = np.broadcast_to(pose[:3, 3], directions.shape)
    hits = [surface.shape.meet(origins, directions) for surface in surfaces]
    depths = np.stack([hit.depths for hit in hits])
    nearest = np.argmin(depths, axis=0)
    colours = np.zeros_like(directions)
    for index, (surface, hit) in enumerate(zip(surfaces, hits, strict=True)):
        seen = (nearest == index) & np.isfinite(hit.depths)
        colours[seen] = _shade(surface, hit.normals[seen], hit.places[seen], directions[seen])
    return colours, depths.min(axis=0)


def _shade(surface, normals, places, directions):
    """Half ambient and half diffuse light on the texture; a highlight (Phong) where the surface is glossy."""
    texture = _photographs()[surface.photograph]
    colours = _read_mirrored(texture, places * surface.scale + surface.start)
    colours = colours * (0.5 + 0.5 * np.maximum(normals @ LIGHT, 0))[:, None]
    if surface.gloss:
        back = directions / np.linalg.norm(directions, axis=1, keepdims=True)
        mirrored = back - 2 * np.sum(back * normals, axis=1, keepdims=True) * normals
        colours = colours + surface.gloss * np.maximum(mirrored @ LIGHT, 0)[:, None] ** 20
    return np.clip(colours, 0, 1)


@lru_cache(maxsize=1)
def _photographs():
    from sklearn.datasets import load_sample_images

    return [image / 255 for image in load_sample_images().images]


def _read_mirrored(texture, points):
    """Bilinear; the texture goes on mirrored beyond its borders."""
    size = np.array([texture.shape[1] - 1, texture.shape[0] - 1])
    return bilinear(texture, np.abs((points + size) % (2 * size) - size))


def bilinear(
    image: Float[np.ndarray, "height width channels"], points: Float[np.ndarray, "points 2"]
) -> Float[np.ndarray, "points channels"]:
    """The image at points (x, y) in pixels, from pixels' centres; beyond its border, the nearest pixel."""
    height, width = image.shape[:2]
    size = np.array([width - 1, height - 1])
    points = np.clip(points, 0, size)
    first = np.minimum(points.astype(int), np.maximum(size - 1, 0))
    right, down = (points - first).T[..., None]
    x, y = first.T
    beside, below = np.minimum(x + 1, width - 1), np.minimum(y + 1, height - 1)
    top = image[y, x] * (1 - right) + image[y, beside] * right
    bottom = image[below, x] * (1 - right) + image[below, beside] * right
    return top * (1 - down) + bottom * down


def look_at(position: Place, target: Place, down: Place = (0, 1, 0)) -> Float[np.ndarray, "4 4"]:
    """The pose of a camera at ``position`` that looks at ``target``, with the image's y along ``down``."""
    forward = np.subtract(target, position)
    forward = forward / np.linalg.norm(forward)
    right = np.cross(down, forward)
    right = right / np.linalg.norm(right)
    pose = np.eye(4)
    pose[:3, :3] = np.stack([right, np.cross(forward, right), forward], axis=1)
    pose[:3, 3] = position
    return pose
