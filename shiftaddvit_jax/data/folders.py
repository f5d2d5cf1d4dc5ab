"""A folder of images as people have it: where its classes lie, which files count, what is held out."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Int

from shiftaddvit_jax.data.listing import Listing, walk

logger = logging.getLogger(__name__)

TEST_SHARE = 3  # one image in three is held out where the data set has no split of its own
# Names of folders, in any case.
TRAIN, VALIDATION, TEST = ("train", "training"), ("val", "valid", "validation"), ("test", "testing")


@dataclass(frozen=True)
class Folders:
    """Where the images of a data set lie.

    Attributes:
      train: the folder with the class folders of the training images.
      test: the same of the images to evaluate on; None if they are to be held out from ``train``.
    """

    train: Path
    test: Path | None


@dataclass(frozen=True)
class Files:
    """Image files of known classes.

    Attributes:
      names: their paths from the folder that has the class folders.
      labels: class of each, from 0.
    """

    names: Sequence[str]
    labels: Int[np.ndarray, "files"]

    def __len__(self) -> int:
        return len(self.names)

    def chosen(self, these: Bool[np.ndarray, "files"]) -> "Files":
        """Those of the files."""
        return Files([self.names[index] for index in np.flatnonzero(these).tolist()], self.labels[these])


def find_folders(listing: Listing, root: Path) -> Folders:
    """The folders of the data set in ``root``, which may lie deeper, in the only folder that is there.

    Beside ``train``, ``val`` (``valid``, ``validation``) is what a run is evaluated on; ``test`` if there is
    none. The log says what was found where names alone do not tell.

    Raises:
      ValueError: two folders for one part, or a folder that cannot be read.
    """
    seen = set()
    while True:
        seen.add(os.path.realpath(root))
        train = _one_of(listing, root, TRAIN)
        held_out = [folder for names in (VALIDATION, TEST) if (folder := _one_of(listing, root, names))]
        if train and (held_out or listing[train].folders):
            return _beside(listing, root, train, held_out)
        only = _only_folder(listing, root)
        if only is None or not listing[only].folders or listing[only].images:
            return Folders(root, None)
        if os.path.realpath(only) in seen:
            return Folders(root, None)
        root = only
        logger.info("the data set is taken to lie deeper, in %s", root)


def _only_folder(listing, root):
    held = listing[root]
    return root / held.folders[0] if len(held.folders) == 1 and not held.images else None


def _beside(listing, root, train, held_out):
    known = {folder.name for folder in (train, *held_out)}
    others = [name for name in listing[root].folders if name not in known]
    if others:
        logger.warning("%s is a split; left alone beside it: %s", root, ", ".join(others[:5]))
    with_classes = [folder for folder in held_out if listing[folder].folders]
    for folder in held_out:
        if folder not in with_classes:
            logger.warning("%s has no class folders and is left alone", folder)
    if not with_classes:
        return Folders(train, None)
    test, *others = with_classes
    for folder in others:
        logger.info("evaluating on %s; %s is left alone", test, folder)
    return Folders(train, test)


def class_names(listing: Listing, root: Path) -> tuple[str, ...]:
    """The names of the class folders in their order; numbers in that of their values.

    Raises:
      ValueError: no class folders.
    """
    names = listing[root].folders
    for name in listing[root].dangling:
        logger.warning("left out %s, a link to nothing", root / name)
    if not names:
        raise ValueError(f"{root} has no class folders; expected one folder a class with image files")
    return in_order(names)


def in_order(names: Sequence[str]) -> tuple[str, ...]:
    """``names`` of classes in their order; numbers in that of their values."""
    are_numbers = all(name.isascii() and name.isdigit() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if are_numbers else 0, name)))


def image_files(listing: Listing, root: Path, names: Sequence[str]) -> Files:
    """The images of each class, in the order of their names; what else there is, the log counts.

    Links are followed, each folder once a class.

    Raises:
      ValueError: a folder that cannot be read.
    """
    files: list[str] = []
    counts: list[int] = []
    others: Counter[str] = Counter()
    held = set(listing[root].folders)
    for name in names:
        before = len(files)
        for path, folder in walk(listing, root / name) if name in held else ():
            files.extend([f"{name}/{path}{image}" for image in folder.images])
            others.update(folder.others)
        counts.append(len(files) - before)
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        logger.warning("left out %d files in %s that are no images: %s", others.total(), root, kinds)
    if loose := len(listing[root].images):
        logger.warning("left out %d images in %s that are in no class folder", loose, root)
    return Files(files, np.repeat(np.arange(len(names)), counts))


def split(listing: Listing, root: Path, names: Sequence[str], files: Files) -> tuple[Files, Files]:
    """Training and test images: those of the folders ``train`` and ``val`` in every class, if they are there.

    Else a third of each class is held out, see `held_out`.
    """
    own = [
        (
            _one_of(listing, folder, TRAIN),
            _one_of(listing, folder, VALIDATION) or _one_of(listing, folder, TEST),
        )
        for folder in (root / name for name in names)
    ]
    if all(train and test for train, test in own):
        logger.info("each class in %s has training and test images of its own", root)
        labelled = list(zip(files.names, files.labels, strict=True))
        inside = [
            np.array(
                [name.split("/")[1] == part[label].name for name, label in labelled],
                bool,
            )
            for part in zip(*own, strict=True)
        ]
        train, test = (files.chosen(these) for these in inside)
        return train, test
    out = held_out([os.fsencode(name) for name in files.names], files.labels)
    return files.chosen(~out), files.chosen(out)


def held_out(names: Sequence[bytes], labels: Int[np.ndarray, "images"]) -> Bool[np.ndarray, "images"]:
    """Which images are held out: a third of each class, by hashes of their names.

    So few change sides when others come or go. A class keeps at least one training image, and of two images
    has one held out.
    """
    chosen = np.zeros(len(names), bool)
    drawn = [int.from_bytes(hashlib.sha256(name).digest()[:8]) for name in names]
    order = np.argsort(labels, kind="stable")
    for mine in np.split(order, np.flatnonzero(np.diff(labels[order])) + 1):
        count = min(len(mine) - 1, max(1, round(len(mine) / TEST_SHARE)))
        # First those that versions up to 0.1 held out.
        ranked = sorted(mine, key=lambda index: (drawn[index] % TEST_SHARE != 0, drawn[index], names[index]))
        chosen[ranked[: max(count, 0)]] = True
    return chosen


def _one_of(listing, root, names):
    """The folder in ``root`` with one of ``names``, in any case; None if there is none."""
    found = [name for name in listing[root].folders if name.lower() in names]
    if len(found) > 1:
        raise ValueError(f"{root} has {' and '.join(found)}; keep one of them")
    return root / found[0] if found else None
