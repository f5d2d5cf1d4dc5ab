"""Data sets on this machine: bundled digits, folders of images, IDX files."""

import gzip
import hashlib
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from shiftaddvit_jax.data.images import SUFFIXES, decode_file
from shiftaddvit_jax.names import SOURCES
from shiftaddvit_jax.optional import require
from shiftaddvit_jax.progress import track
from shiftaddvit_jax.validation import check_choice

logger = logging.getLogger(__name__)

TEST_SHARE = 3  # one image in three is held out where the data set has no split of its own


@dataclass(frozen=True)
class Examples:
    """Images with labels, each decoded when it is asked for.

    Attributes:
      images: where the images are, one entry an image.
      labels: class of each image, from 0.
      decode: from an entry of ``images`` to pixels, uint8 [height, width, 3], of any size.
    """

    images: Sequence | np.ndarray
    labels: Sequence[int] | np.ndarray
    decode: Callable[[Any], UInt8[np.ndarray, "height width 3"]]

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": self.decode(self.images[index]), "label": np.int32(self.labels[index])}


@dataclass(frozen=True)
class Dataset:
    """Two fixed, disjoint sets of examples.

    Attributes:
      train: what models are trained on.
      test: what they are evaluated on, never trained on.
      class_names: name of each class.
    """

    train: Examples
    test: Examples
    class_names: tuple[str, ...]


def load_dataset(source: str, path: str = "") -> Dataset:
    """The data set that ``source`` names.

    Args:
      source: ``"digits"``, scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, every third held out;
        ``"folder"``, image files in one folder a class under ``path``; ``"idx"``, MNIST's file format.
      path: for ``"folder"``, a folder with ``train`` and ``test`` (or ``val``), or with the classes
        themselves; then about every third image, chosen by its name, is held out. For ``"idx"``, the folder
        with ``train-images-idx3-ubyte`` and its three companions, ``.gz`` or not (Debian's package
        dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist).

    Raises:
      ValueError: an unknown source, scikit-learn missing, or a path without the images expected there.
    """
    check_choice("data source", source, SOURCES)
    if source == "digits":
        return _digits()
    root = Path(path)
    if not path or not root.is_dir():
        raise ValueError(f"data source {source!r} needs a folder as data path, got {path!r}")
    return _folder(root) if source == "folder" else _idx(root)


def load_test_set(
    source: str, path: str = "", trained_on: str | None = None
) -> tuple[Examples, tuple[str, ...]]:
    """Images to evaluate on, and the names of their classes.

    Those are the data set's test images; but of a folder that has the classes themselves and no ``test`` or
    ``val``, all images, unless the model was trained on a share of them.

    Args:
      source: as for `load_dataset`.
      path: as for `load_dataset`.
      trained_on: the folder that the model was trained on, None if unknown.

    Raises:
      ValueError: as `load_dataset`.
    """
    root = Path(path)
    is_plain = source == "folder" and path and root.is_dir() and _split(root) is None
    if not is_plain or (trained_on and Path(trained_on).absolute() == root.absolute()):
        dataset = load_dataset(source, path)
        return dataset.test, dataset.class_names
    names = _class_names(root)
    files = _files(root, names)
    if not files:
        raise ValueError(f"{root} has no images; expected {', '.join(SUFFIXES)} in one folder a class")
    return _readable("test", files), names


def _gray_to_rgb(gray: UInt8[np.ndarray, "height width"]) -> UInt8[np.ndarray, "height width 3"]:
    return np.repeat(gray[..., None], 3, axis=-1)


def _digits() -> Dataset:
    require("train", "the data source 'digits'", "sklearn")
    from sklearn.datasets import load_digits

    bunch: Any = load_digits()
    images = np.round(bunch.images * (255 / 16)).astype(np.uint8)
    held_out = np.arange(len(images)) % TEST_SHARE == 0
    train, test = (
        Examples(images[chosen], bunch.target[chosen], _gray_to_rgb) for chosen in (~held_out, held_out)
    )
    return Dataset(train, test, tuple(str(name) for name in bunch.target_names))


def _folder(root: Path) -> Dataset:
    split = _split(root)
    if split is not None:
        train_root, test_root = split
        class_names = _class_names(train_root)
        extra = set(_class_names(test_root)) - set(class_names)
        if extra:
            raise ValueError(f"{test_root} has classes that {train_root} lacks: {', '.join(sorted(extra))}")
        train, test = (_files(folder, class_names) for folder in split)
    else:
        class_names = _class_names(root)
        files = _files(root, class_names)
        # By name, so that a file stays in its set when other files come or go.
        train, test = [], []
        for file, label in files:
            name = file.relative_to(root).as_posix().encode()
            held_out = int.from_bytes(hashlib.sha256(name).digest()[:8]) % TEST_SHARE == 0
            (test if held_out else train).append((file, label))
    if not train or not test:
        empty = "training" if not train else "test"
        raise ValueError(
            f"{root} has no {empty} images; expected {', '.join(SUFFIXES)} in one folder a class"
        )
    return Dataset(_readable("training", train), _readable("test", test), class_names)


def _split(root: Path) -> tuple[Path, Path] | None:
    """The folders of the training and the test images, None if ``root`` has no such two."""
    test_root = next((root / name for name in ("test", "val") if (root / name).is_dir()), None)
    return (root / "train", test_root) if (root / "train").is_dir() and test_root is not None else None


def _class_names(root: Path) -> tuple[str, ...]:
    """The names of the class folders in their order; numbers in that of their values."""
    names = [entry.name for entry in root.iterdir() if entry.is_dir()]
    if not names:
        raise ValueError(f"{root} has no class folders; expected one folder a class with image files")
    are_numbers = all(name.isascii() and name.isdigit() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if are_numbers else 0, name)))


def _files(root: Path, class_names: Sequence[str]) -> list[tuple[Path, int]]:
    return [
        (file, label)
        for label, name in enumerate(class_names)
        for file in sorted((root / name).rglob("*"))
        if file.suffix.lower() in SUFFIXES
    ]


def _readable(what: str, files: Sequence[tuple[Path, int]]) -> Examples:
    """The files that can be decoded; the others are named, counted and left out."""

    def problem(entry):
        try:
            decode_file(entry[0])
        except ValueError as error:
            return str(error)
        return None

    with ThreadPoolExecutor() as pool:
        problems = list(track(pool.map(problem, files), f"checking {what} images", len(files)))
    for message in filter(None, problems):
        logger.warning("skipped: %s", message)
    good = [entry for entry, message in zip(files, problems, strict=True) if message is None]
    if len(good) < len(files):
        logger.warning("skipped %d of %d %s images", len(files) - len(good), len(files), what)
    if not good:
        raise ValueError(f"none of the {len(files)} {what} images can be read")
    paths, labels = zip(*good, strict=True)
    return Examples(paths, labels, decode_file)


def _idx(root: Path) -> Dataset:
    examples = []
    for part in ("train", "t10k"):
        images = _read_idx(root, f"{part}-images-idx3-ubyte", 3)
        labels = _read_idx(root, f"{part}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise ValueError(f"{root} has {len(images)} {part} images but {len(labels)} labels")
        examples.append(Examples(images, labels, _gray_to_rgb))
    classes = 1 + max(int(np.max(part.labels)) for part in examples)
    train, test = examples
    return Dataset(train, test, tuple(str(label) for label in range(classes)))


def _read_idx(root: Path, name: str, rank: int) -> UInt8[np.ndarray, "..."]:
    file = next((path for path in (root / name, root / f"{name}.gz") if path.exists()), None)
    if file is None:
        raise ValueError(f"{root} has no {name} or {name}.gz")
    try:
        data = gzip.decompress(file.read_bytes()) if file.suffix == ".gz" else file.read_bytes()
    except (OSError, EOFError) as error:
        raise ValueError(f"{file} cannot be decompressed: {error}") from None
    header = 4 + 4 * rank
    # Two zero bytes, the type (8: unsigned byte), the rank, then the sizes, big-endian.
    if len(data) < header or data[:4] != bytes((0, 0, 8, rank)):
        raise ValueError(f"{file} is not an IDX file of unsigned bytes with {rank} axes")
    shape = tuple(int(size) for size in np.frombuffer(data[4:header], ">u4"))
    if len(data) - header != np.prod(shape, dtype=np.int64) or 0 in shape:
        raise ValueError(f"{file} is truncated: its header says {shape}, it holds {len(data) - header} bytes")
    return np.frombuffer(data, np.uint8, offset=header).reshape(shape)
