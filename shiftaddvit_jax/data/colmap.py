"""COLMAP's sparse models, binary and text (https://colmap.github.io/format.html)."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

# Names and numbers of parameters by id.
_MODELS = {
    0: ("SIMPLE_PINHOLE", 3),
    1: ("PINHOLE", 4),
    2: ("SIMPLE_RADIAL", 4),
    3: ("RADIAL", 5),
    4: ("OPENCV", 8),
    5: ("OPENCV_FISHEYE", 8),
    6: ("FULL_OPENCV", 12),
    7: ("FOV", 5),
    8: ("SIMPLE_RADIAL_FISHEYE", 4),
    9: ("RADIAL_FISHEYE", 5),
    10: ("THIN_PRISM_FISHEYE", 12),
}
_IDS = {name: model for model, (name, _) in _MODELS.items()}
# Models of which one focal length is for both axes; of all others two.
_ONE_FOCAL_LENGTH = ("SIMPLE_PINHOLE", "SIMPLE_RADIAL", "RADIAL")
# Models that are pinholes where all parameters after the principal point are 0.
_PINHOLES = ("SIMPLE_PINHOLE", "PINHOLE", "SIMPLE_RADIAL", "RADIAL", "OPENCV", "FULL_OPENCV")
_MOST = 10**7  # of anything in a file


@dataclass(frozen=True)
class Photograph:
    """One registered image.

    Attributes:
      name: of its file, relative to the folder of images.
      size: height and width of the camera's images, in pixels.
      intrinsics: focal lengths and principal point; the first pixel's centre is (0, 0), COLMAP's (0.5, 0.5).
      pose: from the camera's coordinates to the world's.
      points: the points of the model that it sees.
    """

    name: str
    size: tuple[int, int]
    intrinsics: Float[np.ndarray, "3 3"]
    pose: Float[np.ndarray, "4 4"]
    points: Float[np.ndarray, "points 3"]


def sparse_folder(folder: Path) -> Path | None:
    """The folder with the sparse model in or under ``folder``; None if there is none."""
    places = (folder, folder / "sparse" / "0", folder / "sparse", folder / "colmap" / "sparse" / "0")
    return next((place for place in places if any(_find(place, "cameras"))), None)


def read_sparse_model(folder: Path) -> list[Photograph]:
    """The photographs of a sparse model, by name.

    Raises:
      ValueError: a file that is missing or damaged, or a camera with distortion, by the file's name.
    """
    tables: dict[str, Any] = {}
    for name, read in (
        ("cameras", (_binary_cameras, _text_cameras)),
        ("images", (_binary_images, _text_images)),
        ("points3D", (_binary_points, _text_points)),
    ):
        files = [(file, parse) for file, parse in zip(_find(folder, name), read, strict=True) if file]
        if not files:
            raise ValueError(f"{folder} has neither {name}.bin nor {name}.txt; export the whole sparse model")
        file, parse = files[0]
        try:
            tables[name] = parse(file)
        except (struct.error, ValueError, IndexError, OverflowError, OSError) as error:
            raise ValueError(f"{file} is damaged or no COLMAP file: {error}") from None
    cameras, points = tables["cameras"], tables["points3D"]
    found = []
    for name, quaternion, translation, camera, seen in tables["images"]:
        if camera not in cameras:
            raise ValueError(f"{folder}: image {name} has camera {camera}, which the cameras lack")
        model, width, height, parameters = cameras[camera]
        pose = _pose(quaternion, translation)
        seen = [points[point] for point in seen if point in points]
        intrinsics = _intrinsics(model, parameters, f"{folder}: camera {camera}")
        places = np.array(seen, np.float64).reshape(-1, 3)
        found.append(Photograph(name, (height, width), intrinsics, pose, places))
    return sorted(found, key=lambda photograph: photograph.name)


def _find(folder, name):
    """The binary and the text file called ``name``; None for those that are missing."""
    return [file if (file := folder / f"{name}{suffix}").is_file() else None for suffix in (".bin", ".txt")]


def _intrinsics(model, parameters, what):
    names, _ = _MODELS[model]
    focal = 1 if names in _ONE_FOCAL_LENGTH else 2
    distortion = parameters[focal + 2 :]
    if names not in _PINHOLES or any(distortion):
        raise ValueError(
            f"{what} is a {names} with distortion {', '.join(f'{it:g}' for it in distortion)}; undistort the "
            "photographs first: colmap image_undistorter"
        )
    fx, fy = parameters[0], parameters[focal - 1]
    cx, cy = parameters[focal : focal + 2]
    return np.array([[fx, 0, cx - 0.5], [0, fy, cy - 0.5], [0, 0, 1]])


def _pose(quaternion, translation):
    """From the rotation and translation of world to camera, the quaternion's real part first."""
    norm = np.linalg.norm(quaternion)
    w, x, y, z = np.asarray(quaternion) / norm if norm else quaternion
    rotation = np.array(
        [
            [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
            [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
            [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
        ]
    )
    pose = np.eye(4)
    pose[:3, :3] = rotation.T
    pose[:3, 3] = -rotation.T @ np.asarray(translation)
    return pose


class _Binary:
    """A binary file from its start on; little-endian."""

    def __init__(self, file: Path):
        self.data, self.at = file.read_bytes(), 0

    def take(self, form: str) -> tuple:
        values = struct.unpack_from(f"<{form}", self.data, self.at)
        self.at += struct.calcsize(f"<{form}")
        return values

    def count(self) -> int:
        (count,) = self.take("Q")
        if count > _MOST:
            raise ValueError(f"it claims {count} entries; at most {_MOST} are read")
        return count

    def name(self) -> str:
        end = self.data.index(b"\0", self.at)
        name, self.at = self.data[self.at : end].decode(), end + 1
        return name


def _known(model):
    if model not in _MODELS:
        raise ValueError(f"camera model {model} is unknown")
    return model


def _binary_cameras(file):
    binary, cameras = _Binary(file), {}
    for _ in range(binary.count()):
        camera, model, width, height = binary.take("iiQQ")
        parameters = binary.take(f"{_MODELS[_known(model)][1]}d")
        cameras[camera] = (model, width, height, parameters)
    return cameras


def _binary_images(file):
    binary, images = _Binary(file), []
    for _ in range(binary.count()):
        _, *pose, camera = binary.take("i7di")
        name, count = binary.name(), binary.count()
        seen = [binary.take("ddq")[2] for _ in range(count)]
        images.append((name, pose[:4], pose[4:], camera, seen))
    return images


def _binary_points(file):
    binary, points = _Binary(file), {}
    for _ in range(binary.count()):
        point, *place = binary.take("Q3d3Bd")[:4]
        points[point] = place
        binary.take(f"{2 * binary.count()}i")
    return points


def _lines(file: Path) -> Iterator[str]:
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            yield line


def _text_cameras(file):
    cameras = {}
    for line in filter(str.strip, _lines(file)):
        camera, model, width, height, *parameters = line.split()
        if model not in _IDS or len(parameters) != _MODELS[_IDS[model]][1]:
            raise ValueError(f"camera {camera} is no {model} of known parameters")
        cameras[int(camera)] = (_IDS[model], int(width), int(height), tuple(map(float, parameters)))
    return cameras


def _text_images(file):
    lines, images = list(_lines(file)), []
    # Two lines an image; the second is empty if it sees no point.
    for first, second in zip(lines[::2], [*lines[1::2], ""], strict=False):
        if not first.strip():
            break
        _, *numbers, name = first.split(maxsplit=9)
        pose, camera = [float(number) for number in numbers[:7]], int(numbers[7])
        images.append((name, pose[:4], pose[4:], camera, [int(seen) for seen in second.split()[2::3]]))
    return images


def _text_points(file):
    rows = (line.split() for line in filter(str.strip, _lines(file)))
    return {int(row[0]): [float(number) for number in row[1:4]] for row in rows}
