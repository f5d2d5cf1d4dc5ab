"""Data sets on this machine: bundled digits, folders of images, IDX files, shards."""

import gzip
import hashlib
import logging
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from shiftaddvit_jax.data.examples import Dataset, Examples
from shiftaddvit_jax.data.folders import TEST_SHARE, Files, class_names, find_folders, image_files, split
from shiftaddvit_jax.data.images import SUFFIXES, open_image
from shiftaddvit_jax.data.listing import Listing, PackedNames, Paths
from shiftaddvit_jax.data.shards import FORMATS, all_images, load_shards
from shiftaddvit_jax.names import SOURCES
from shiftaddvit_jax.optional import require
from shiftaddvit_jax.validation import check_choice

logger = logging.getLogger(__name__)

# An IDX file has no names of classes. They are known of some training sets, by the SHA-256 of their labels:
# Fashion-MNIST (Xiao, Rasul and Vollgraf, 2017).
CLASS_NAMES = {
    "657fbd221bfc9f4198cc14b5619cc33ec57c58dd0e47af4d99d6650759e869a7": (
        "T-shirt/top", "Trouser", "Pullover", "Dress", "Coat",
        "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot",
    ),
}  # fmt: skip
EXPECTED = f"expected {', '.join(SUFFIXES)} in one folder a class, or shards with such images"


def load_dataset(source: str, path: str = "") -> Dataset:
    """The data set that ``source`` names.

    Args:
      source: ``"digits"``, scikit-learn's 1,797 handwritten digits of 8 x 8 pixels, every third held out;
        ``"folder"``, image files in one folder a class under ``path``; ``"idx"``, MNIST's file format;
        ``"tar"``, shards in WebDataset's layout; ``"array_record"``, records of ``tf.train.Example``, as
        TFDS writes them; ``"huggingface"``, Arrow files, as ``datasets`` saves them or keeps them in its
        cache.
      path: for ``"folder"``, a folder with ``train`` and ``val`` (``valid``, ``validation``) or ``test``, in
        any case, or with the classes themselves; then every third image of each class, chosen by its name, is
        held out. What is hidden or a system's is ignored, links are followed. For ``"idx"``, the folder
        with ``train-images-idx3-ubyte`` and its three companions, ``.gz`` or not (Debian's package
        dataset-fashion-mnist has them in /usr/share/datasets/fashion-mnist); its classes are numbers, unless
        it is Fashion-MNIST. For shards, a folder with them, see `load_shards`.

    No image is read: one that can't be is met where it is used, or by `check_data`.

    Raises:
      ValueError: an unknown source, a package missing, a path without the images expected there, fewer than
        two classes, or a class without training images.
    """
    check_choice("data source", source, SOURCES)
    if source == "digits":
        return _digits()
    root = Path(path)
    if not path or not root.is_dir():
        raise ValueError(
            f"data source {source!r} needs a folder as data path, got {path!r}; give it by --path, or for "
            "training by --config.data.path"
        )
    if source == "idx":
        return _idx(root)
    return _checked(_folder(root) if source == "folder" else load_shards(source, root), root)


def load_test_set(
    source: str, path: str = "", trained_on: str | None = None
) -> tuple[Examples, tuple[str, ...]]:
    """Images to evaluate on, and the names of their classes.

    Those are the data set's test images; but of a folder or shards without a ``test`` or ``val`` beside
    others, all images, unless the model was trained on a share of them.

    Args:
      source: as for `load_dataset`.
      path: as for `load_dataset`.
      trained_on: the folder that the model was trained on, None if unknown.

    Raises:
      ValueError: as `load_dataset`.
    """
    root = Path(path)
    is_trained_on = trained_on and Path(trained_on).absolute() == root.absolute()
    if not is_trained_on and path and root.is_dir():
        found = all_images(source, root) if source in FORMATS else None
        if source == "folder":
            listing = Listing(root)
            folders = find_folders(listing, root)
            if folders.test is None:
                names = class_names(listing, folders.train)
                files = image_files(listing, folders.train, names)
                listing.close()
                if not files:
                    raise ValueError(f"{folders.train} has no images; {EXPECTED}")
                found = _files(folders.train, files), names
        if found is not None:
            return found
    dataset = load_dataset(source, path)
    return dataset.test, dataset.class_names


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
    listing = Listing(path)
    folders = find_folders(listing, path)
    root, names = folders.train, class_names(listing, folders.train)
    files = image_files(listing, root, names)
    if folders.test is None:
        train, test = split(listing, root, names, files)
    else:
        extra = set(listing[folders.test].folders) - set(names)
        if extra:
            raise ValueError(f"{folders.test} has classes that {root} lacks: {', '.join(sorted(extra))}")
        train, test = files, image_files(listing, folders.test, names)
    listing.close()
    return Dataset(_files(root, train), _files(folders.test or root, test), names)


def _files(root: Path, files: Files) -> Examples:
    names = PackedNames(files.names)
    return Examples(Paths(root, names), files.labels.astype(np.int32), open_image, names)


def _checked(dataset: Dataset, root: Path) -> Dataset:
    """``dataset``, of images that can be learned from."""
    if not len(dataset.train):
        raise ValueError(f"{root} has no training images; {EXPECTED}")
    if len(dataset.class_names) < 2:
        raise ValueError(f"{root} has one class, {dataset.class_names[0]!r}; expected two or more")
    if not len(dataset.test):
        raise ValueError(f"{root} has no test images; {EXPECTED}")
    untrained, untested = (
        [
            repr(name)
            for name, count in zip(dataset.class_names, _counts(part, dataset), strict=True)
            if not count
        ]
        for part in (dataset.train, dataset.test)
    )
    if untrained:
        raise ValueError(
            f"{root} has no training images of class {', '.join(untrained)}; expected one or more; add some, "
            "or remove the class"
        )
    if untested:
        logger.warning("no test images of class %s", ", ".join(untested))
    return dataset


def _counts(examples, dataset):
    return np.bincount(np.asarray(examples.labels, np.int64), minlength=len(dataset.class_names))


def _idx(root: Path) -> Dataset:
    examples = []
    for part in ("train", "t10k"):
        images = _read_idx(root, f"{part}-images-idx3-ubyte", 3)
        labels = _read_idx(root, f"{part}-labels-idx1-ubyte", 1)
        if len(images) != len(labels):
            raise ValueError(f"{root} has {len(images)} {part} images but {len(labels)} labels")
        examples.append(Examples(images, labels, _gray_to_rgb))
    train, test = examples
    classes = 1 + max(int(np.max(part.labels)) for part in examples)
    known = CLASS_NAMES.get(hashlib.sha256(bytes(train.labels)).hexdigest())
    return Dataset(train, test, known or tuple(str(label) for label in range(classes)))


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
