"""Scenes: photographs with their cameras, from the folders that people have, or in closed form."""

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import ExifTags, Image

from shiftaddvit_jax.data.analytic_scenes import demo_surfaces, look_at, render
from shiftaddvit_jax.data.colmap import read_sparse_model, sparse_folder
from shiftaddvit_jax.data.images import SUFFIXES, decode_file
from shiftaddvit_jax.files import read_object

HELD_OUT_EVERY = 8  # views of a scene whose files say nothing of a test set, as LLFF's are split
BLENDER_DEPTHS = (2.0, 6.0)  # of NeRF's synthetic scenes, which their files don't say
NEAREST = 0.75  # where the nearest bound lies in a normalized scene: at 1 / NEAREST, as in NeRF's code
ANALYTIC = "analytic"
MOST_VIEWS = 10_000


@dataclass(frozen=True)
class Scene:
    """Photographs of one size, their cameras, and how far away things are.

    Cameras are as in `shiftaddvit_jax.ops.cameras`.

    Attributes:
      images: the photographs.
      intrinsics: focal lengths and principal points, in pixels.
      poses: from each camera's coordinates to the world's.
      near: the least depth of anything, in the scene's unit.
      far: the largest.
      held_out: indices of the views that are for tests; all others are for training and rendering.
      names: of the photographs.
      depths: depth at each pixel's centre, where it is known.
    """

    images: UInt8[np.ndarray, "views height width 3"]
    intrinsics: Float[np.ndarray, "views 3 3"]
    poses: Float[np.ndarray, "views 4 4"]
    near: float
    far: float
    held_out: tuple[int, ...]
    names: tuple[str, ...]
    depths: Float[np.ndarray, "views height width"] | None = None

    @property
    def training(self) -> tuple[int, ...]:
        """Indices of the views that are not held out."""
        return tuple(index for index in range(len(self.images)) if index not in self.held_out)

    def nearest(self, pose: Float[np.ndarray, "4 4"], count: int, without: int | None = None) -> list[int]:
        """Training views by their cameras' distance from ``pose``'s, at most ``count``, nearest first."""
        others = [index for index in self.training if index != without]
        distances = np.linalg.norm(self.poses[others, :3, 3] - pose[:3, 3], axis=1)
        return [others[at] for at in np.argsort(distances, kind="stable")[:count]]


def load_scene(
    source: str | Path,
    *,
    longest_side: int | None = None,
    near: float | None = None,
    far: float | None = None,
) -> Scene:
    """The scene that ``source`` names.

    - A folder with ``poses_bounds.npy`` (LLFF): photographs in ``images``, or in ``images_4`` or ``images_8``
      where these are the smallest not below ``longest_side``.
    - A folder with ``transforms.json`` (nerfstudio), or with ``transforms_train.json`` and
      ``transforms_test.json`` (NeRF's Blender scenes).
    - A folder with a sparse model of COLMAP, of undistorted photographs in ``images``.
    - ``"analytic"`` or ``"analytic:GLOSS"``: planes, boxes and spheres, see `analytic_scene`.

    Every 8th view is held out where no file says which are. Scenes of photographs are moved and scaled as
    NeRF does: the mean camera is at the origin, the nearest bound at 4/3. Principal points are half a pixel
    less than COLMAP's and nerfstudio's, whose first pixel's centre is (0.5, 0.5).

    Args:
      source: as above.
      longest_side: photographs are reduced to it, in pixels; by default they stay.
      near: the least depth in the files' unit, where they say none or to overrule them.
      far: the largest, likewise.

    Raises:
      ValueError: a folder of no known form; a photograph that is missing, unreadable, of another size than
        the others or turned by EXIF; poses of another number than photographs, or that are not finite or no
        rotations; cameras with distortion; no depths where nothing says them.
    """
    name, depths = str(source), _given_depths(near, far)
    if name.partition(":")[0] == ANALYTIC:
        if depths is not None:
            raise ValueError("the analytic scene knows its depths; leave out near and far")
        return _named_analytic(name, longest_side)
    folder = Path(source).expanduser()
    if not folder.is_dir():
        raise ValueError(f"no folder {folder}; a scene is a folder, or {ANALYTIC}")
    if (folder / "poses_bounds.npy").is_file():
        found = _read_llff(folder, longest_side)
    elif (folder / "transforms.json").is_file() or (folder / "transforms_train.json").is_file():
        found = _read_transforms(folder)
    elif (model := sparse_folder(folder)) is not None:
        found = _read_colmap(folder, model)
    else:
        raise ValueError(
            f"{folder} has no poses_bounds.npy, transforms.json, transforms_train.json or sparse model of "
            "COLMAP (sparse/0); a scene needs the cameras of its photographs"
        )
    return _as_scene(folder, found, longest_side, depths)


@dataclass(frozen=True)
class _Cameras:
    """What files say of a scene; ``files`` are photographs, ``sizes`` those that the intrinsics are for."""

    files: list[Path]
    sizes: list[tuple[int, int] | None]
    intrinsics: list[np.ndarray]
    poses: list[np.ndarray]
    held_out: tuple[int, ...] | None
    depths: tuple[float, float] | None
    normalize: bool


def _given_depths(near, far):
    if (near is None) != (far is None):
        raise ValueError("give both near and far, or neither")
    if near is not None and not 0 < near < far < math.inf:
        raise ValueError(f"depths must have 0 < near < far, got {near} and {far}")
    return None if near is None else (near, far)


def _as_scene(folder, found, longest_side, depths):
    if not 2 <= len(found.files) <= MOST_VIEWS:
        raise ValueError(f"{folder} has {len(found.files)} views; expected 2 to {MOST_VIEWS}")
    poses = np.stack([np.asarray(pose, np.float64) for pose in found.poses])
    for file, pose in zip(found.files, poses, strict=True):
        _check_pose(pose, f"{folder}: the pose of {file.name}")
    depths = depths or found.depths
    if depths is None:
        raise ValueError(f"{folder} does not say how far away things are; give near and far (--near, --far)")
    images, intrinsics = [], []
    for file, size, matrix in zip(found.files, found.sizes, found.intrinsics, strict=True):
        pixels, scale = _photograph(file, longest_side)
        height, width = pixels.shape[:2]
        if images and images[0].shape != pixels.shape:
            raise ValueError(
                f"{file} has {width} x {height} pixels, and {found.files[0]} "
                f"{images[0].shape[1]} x {images[0].shape[0]}; a scene's photographs must have one size"
            )
        # Intrinsics may be for photographs of another size: LLFF's are, beside smaller copies.
        shrink = scale if size is None else (width / size[1], height / size[0])
        images.append(pixels)
        intrinsics.append(_scaled(np.asarray(matrix, np.float64), *shrink))
    held_out = found.held_out
    if held_out is None:
        held_out = tuple(range(0, len(images), HELD_OUT_EVERY))
    names = tuple(file.name for file in found.files)
    least, largest = depths
    scene = Scene(np.stack(images), np.stack(intrinsics), poses, least, largest, held_out, names)
    return _normalized(scene) if found.normalize else scene


def _photograph(file, longest_side):
    """The pixels, reduced to ``longest_side``, and by what width and height were multiplied."""
    try:
        with Image.open(file) as image:
            turned = image.getexif().get(ExifTags.Base.Orientation, 1)
    except OSError:
        turned = 1  # the next line says what is wrong
    pixels = decode_file(file)
    if turned not in (0, 1):
        raise ValueError(
            f"{file} is turned by EXIF (orientation {turned}), so its pixels are not those that the camera's "
            "pose is for; turn the pixels, drop the tag, and find the poses again"
        )
    height, width = pixels.shape[:2]
    factor = 1 if longest_side is None else longest_side / max(height, width)
    if factor >= 1:
        return pixels, (1.0, 1.0)
    size = max(1, round(width * factor)), max(1, round(height * factor))
    smaller = Image.fromarray(pixels).resize(size, Image.Resampling.BOX)
    return np.asarray(smaller), (size[0] / width, size[1] / height)


def _scaled(intrinsics, across, down):
    """The intrinsics of an image resized by these factors; the image's corner stays, not its first centre."""
    factors = np.array([across, down, 1.0])[:, None]
    moved = intrinsics * factors
    moved[:2, 2] += (np.array([across, down]) - 1) / 2
    return moved


def _check_pose(pose, what):
    if pose.shape != (4, 4):
        raise ValueError(f"{what} has shape {pose.shape}; expected a matrix of 4 x 4")
    if not np.isfinite(pose).all():
        raise ValueError(f"{what} is not finite; find the cameras again, or drop the view")
    rotation = pose[:3, :3]
    if not np.allclose(rotation @ rotation.T, np.eye(3), atol=1e-3) or np.linalg.det(rotation) < 0:
        raise ValueError(f"{what} is no rotation and translation")


def _normalized(scene):
    """The scene in the mean camera's coordinates, scaled so that the nearest bound is at 1 / `NEAREST`."""
    forward = scene.poses[:, :3, 2].sum(axis=0)
    down = scene.poses[:, :3, 1].sum(axis=0)
    centre = scene.poses[:, :3, 3].mean(axis=0)
    if np.linalg.norm(np.cross(down, forward)) < 1e-6:  # cameras all around: there is no mean direction
        mean = np.eye(4)
        mean[:3, 3] = centre
    else:
        mean = look_at(centre, centre + forward, down)
    scale = 1 / (NEAREST * scene.near)
    poses = np.linalg.inv(mean) @ scene.poses
    poses[:, :3, 3] *= scale
    return dataclasses.replace(scene, poses=poses, near=scene.near * scale, far=scene.far * scale)


def _in_folder(folder: Path) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix.lower() in SUFFIXES)


def _read_llff(folder, longest_side):
    file = folder / "poses_bounds.npy"
    try:
        table = np.load(file, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"{file} is no whole NumPy file: {error}") from None
    if table.ndim != 2 or table.shape[1] != 17:
        raise ValueError(f"{file} has shape {table.shape}; expected 17 numbers a view")
    whole = folder / "images"
    if not whole.is_dir():
        raise ValueError(f"{folder} has no folder images")
    files = _in_folder(whole)
    if len(files) != len(table):
        raise ValueError(f"{file} has {len(table)} poses, and {whole} {len(files)} photographs")
    for reduction in (8, 4):
        smaller = folder / f"images_{reduction}"
        if longest_side is None or not smaller.is_dir():
            continue
        copies = _in_folder(smaller)
        if len(copies) == len(table) and max(Image.open(copies[0]).size) >= longest_side:
            files = copies
            break
    poses, intrinsics, sizes = [], [], []
    for row in table:
        matrix = row[:15].reshape(3, 5)
        # Their axes are down, right, backwards.
        pose = np.eye(4)
        pose[:3, :4] = np.stack([matrix[:, 1], matrix[:, 0], -matrix[:, 2], matrix[:, 3]], axis=1)
        height, width, focal = matrix[:, 4]
        poses.append(pose)
        intrinsics.append(_intrinsics(focal, focal, width / 2 - 0.5, height / 2 - 0.5))
        sizes.append((height, width))
    bounds = table[:, 15:]
    if not np.isfinite(bounds).all() or not 0 < bounds.min() < bounds.max():
        raise ValueError(f"{file} has depths from {bounds.min()} to {bounds.max()}; expected 0 < near < far")
    depths = float(bounds.min()), float(bounds.max())
    return _Cameras(files, sizes, intrinsics, poses, None, depths, normalize=True)


def _intrinsics(fx, fy, cx, cy):
    return np.array([[fx, 0, cx], [0, fy, cy], [0, 0, 1]], np.float64)


def _read_transforms(folder):
    parts = [folder / "transforms.json"]
    if not parts[0].is_file():
        parts = [folder / "transforms_train.json"]
        parts += [file for file in (folder / "transforms_test.json",) if file.is_file()]
    files, sizes, intrinsics, poses = [], [], [], []
    counts, blender, tests = [], False, set()
    for part in parts:
        try:
            content = read_object(part)
            frames = content["frames"]
            tests |= {Path(name).name for name in content.get("test_filenames", ())}
            for frame in frames:
                file = _frame_file(folder, frame["file_path"])
                matrix = np.asarray(frame["transform_matrix"], np.float64)
                size, found = _transforms_intrinsics({**content, **frame}, file)
                # Their axes are right, up, backwards.
                pose = matrix * np.array([1, -1, -1, 1]) if matrix.shape == (4, 4) else matrix
                files.append(file)
                sizes.append(size)
                intrinsics.append(found)
                poses.append(pose)
        except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
            raise ValueError(f"{part} is not a whole JSON file: {error}") from None
        except (KeyError, TypeError) as error:
            raise ValueError(
                f"{part} lacks or misspells {error}; expected nerfstudio's or Blender's keys"
            ) from None
        counts.append(len(frames))
        blender |= "camera_angle_x" in content and "fl_x" not in content
    held_out = tuple(range(counts[0], sum(counts))) or None
    if tests:
        held_out = tuple(index for index, file in enumerate(files) if file.name in tests) or None
    depths = BLENDER_DEPTHS if blender else None
    return _Cameras(files, sizes, intrinsics, poses, held_out, depths, normalize=not blender)


def _frame_file(folder, name):
    file = folder / name
    # Blender's leave out the suffix.
    return file if file.suffix else file.with_name(f"{file.name}.png")


def _transforms_intrinsics(values: Mapping[str, Any], file: Path):
    """Height and width that they are for (None for the photograph's own), and the matrix."""
    distortion = {key: values[key] for key in ("k1", "k2", "k3", "k4", "p1", "p2") if values.get(key)}
    if distortion:
        shown = ", ".join(f"{key} {value:g}" for key, value in distortion.items())
        raise ValueError(f"the camera of {file} has distortion ({shown}); undistort the photographs first")
    if "fl_x" in values:
        fx, size = float(values["fl_x"]), (float(values["h"]), float(values["w"]))
        fy = float(values.get("fl_y", fx))
        cx, cy = float(values.get("cx", size[1] / 2)), float(values.get("cy", size[0] / 2))
        return size, _intrinsics(fx, fy, cx - 0.5, cy - 0.5)
    try:
        with Image.open(file) as image:
            width, height = image.size
    except OSError:
        raise ValueError(f"no image file at {file}") from None
    focal = width / 2 / math.tan(float(values["camera_angle_x"]) / 2)
    return (height, width), _intrinsics(focal, focal, width / 2 - 0.5, height / 2 - 0.5)


def _read_colmap(folder, model):
    photographs = read_sparse_model(model)
    places = folder / "images"
    if not places.is_dir():
        raise ValueError(f"{folder} has no folder images with the photographs of its sparse model")
    bounds = []
    for photograph in photographs:
        pose, points = photograph.pose, photograph.points
        depths = (points - pose[:3, 3]) @ pose[:3, 2]
        if (depths > 0).any():
            # A few points of any sparse model are far off; LLFF's code leaves out as many.
            bounds.append(np.percentile(depths[depths > 0], [0.1, 99.9]))
    known = (float(min(it[0] for it in bounds)), float(max(it[1] for it in bounds))) if bounds else None
    return _Cameras(
        [places / it.name for it in photographs],
        [it.size for it in photographs],
        [it.intrinsics for it in photographs],
        [it.pose for it in photographs],
        None,
        known,
        normalize=True,
    )


def analytic_scene(
    views: int = 24, side: int = 64, gloss: float = 0.0, held_out: Sequence[int] | None = None
) -> Scene:
    """The scene of `demo_surfaces` from cameras before it, in a spiral, with exact depths.

    Args:
      views: cameras.
      side: of the square photographs, in pixels.
      gloss: of its spheres.
      held_out: views for tests; by default every sixth.
    """
    intrinsics = _intrinsics(side, side, (side - 1) / 2, (side - 1) / 2)
    poses, images, depths = [], [], []
    golden = math.pi * (3 - math.sqrt(5))
    for index in range(views):
        angle, radius = golden * index, math.sqrt((index + 0.5) / views)
        place = (2 * radius * math.cos(angle), 0.9 * radius * math.sin(angle) - 0.4, -3.5)
        pose = look_at(place, (0.1, 0.2, 0.8))
        colours, depth = render(demo_surfaces(gloss), intrinsics, pose, side, side)
        poses.append(pose)
        images.append(np.round(255 * colours).astype(np.uint8))
        depths.append(depth)
    seen = np.stack(depths)
    return Scene(
        np.stack(images),
        np.repeat(intrinsics[None], views, axis=0),
        np.stack(poses),
        float(0.95 * seen.min()),
        float(1.05 * seen.max()),
        tuple(range(3, views, 6)) if held_out is None else tuple(held_out),
        tuple(f"{index:03d}" for index in range(views)),
        seen,
    )


def _named_analytic(name, longest_side):
    gloss = name.partition(":")[2] or "0"
    try:
        strength = float(gloss)
    except ValueError:
        strength = -1.0
    if not 0 <= strength <= 1:
        raise ValueError(f"{name} is no scene; write {ANALYTIC}, or {ANALYTIC}:0.5 for a gloss from 0 to 1")
    return analytic_scene(side=longest_side or 64, gloss=strength)
