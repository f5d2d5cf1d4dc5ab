"""Data sets on this machine: bundled digits, folders of images, IDX files."""

import gzip
import logging
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from shiftaddvit_jax.data.folders import TEST_SHARE, class_names, find_folders, hold_out, image_files
from shiftaddvit_jax.data.images import SUFFIXES, decode_file
from shiftaddvit_jax.names import SOURCES
from shiftaddvit_jax.optional import require
from shiftaddvit_jax.progress import track
from shiftaddvit_jax.validation import check_choice

logger = logging.getLogger(__name__)


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
      root: the folder that the images' paths lie in; None if ``images`` are pixels.
    """

    train: Examples
    test: Examples
    class_names: tuple[str, ...]
    root: Path | None = None


def load_dataset(source: str, path: str = "") -> Dataset:
    """The data set that ``source`` names.

    Args:
      source: ``"digits"``, scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, every third held out;
        ``"folder"``, image files in one folder a class under ``path``; ``"idx"``, MNIST's file format.
      path: for ``"folder"``, a folder with ``train`` and ``val`` (``valid``, ``validation``) or ``test``, in
        any case, or with the classes themselves; then every third image of each class, chosen by its name, is
        held out. What is hidden or a system's is ignored, links are followed. For ``"idx"``, the folder
        with ``train-images-idx3-ubyte`` and its three companions, ``.gz`` or not (Debian's package
        dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist).

    Raises:
      ValueError: an unknown source, scikit-learn missing, a path without the images expected there, fewer
        than two classes, or a class without training images.
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
    folders = find_folders(root) if source == "folder" and path and root.is_dir() else None
    is_trained_on = trained_on and Path(trained_on).absolute() == root.absolute()
    if folders is None or folders.test is not None or is_trained_on:
        dataset = load_dataset(source, path)
        return dataset.test, dataset.class_names
    root = folders.train
    names = class_names(root)
    files = image_files(root, names)
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


def _folder(path: Path) -> Dataset:
    folders = find_folders(path)
    root, names = folders.train, class_names(folders.train)
    if folders.test is None:
        train, test = hold_out(root, names, image_files(root, names))
    else:
        extra = set(class_names(folders.test)) - set(names)
        if extra:
            raise ValueError(f"{folders.test} has classes that {root} lacks: {', '.join(sorted(extra))}")
        train, test = image_files(root, names), image_files(folders.test, names)
    expected = f"expected {', '.join(SUFFIXES)} in one folder a class"
    if not train:
        raise ValueError(f"{path} has no training images; {expected}")
    if len(names) < 2:
        raise ValueError(f"{root} has one class, {names[0]!r}; expected two or more, one folder a class")
    if not test:
        raise ValueError(f"{path} has no test images; {expected}")
    train, test = _readable("training", train), _readable("test", test)
    untrained, untested = (
        [repr(name) for name, count in zip(names, _counts(part, names), strict=True) if not count]
        for part in (train, test)
    )
    if untrained:
        raise ValueError(
            f"{root} has no training images of class {', '.join(untrained)}; expected at least one that can "
            "be read; add some, or remove the folder"
        )
    if untested:
        logger.warning("no test images of class %s", ", ".join(untested))
    return Dataset(train, test, names, path)


def _counts(examples, names):
    return np.bincount(np.asarray(examples.labels, np.int64), minlength=len(names))


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
