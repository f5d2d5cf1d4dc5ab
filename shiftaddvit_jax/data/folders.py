"""A folder of images as people have it: where its classes lie, which files count, what is held out."""

import hashlib
import logging
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from shiftaddvit_jax.data.images import SUFFIXES

logger = logging.getLogger(__name__)

TEST_SHARE = 3  # one image in three is held out where the data set has no split of its own
# Names of folders, in any case.
TRAIN, VALIDATION, TEST = ("train", "training"), ("val", "valid", "validation"), ("test", "testing")
# What systems and programs leave behind; beside it, all that begins with a dot or an @.
LEFTOVERS = (
    "__macosx",
    "__pycache__",
    "thumbs.db",
    "desktop.ini",
    "lost+found",
    "$recycle.bin",
    "system volume information",
)
File = tuple[Path, int]  # and its class


@dataclass(frozen=True)
class Folders:
    """Where the images of a data set lie.

    Attributes:
      train: the folder with the class folders of the training images.
      test: the same of the images to evaluate on; None if they are to be held out from ``train``.
    """

    train: Path
    test: Path | None


def find_folders(root: Path) -> Folders:
    """The folders of the data set in ``root``, which may lie deeper, in the only folder that is there.

    Beside ``train``, ``val`` (``valid``, ``validation``) is what a run is evaluated on; ``test`` if there is
    none. The log says what was found where names alone do not tell.

    Raises:
      ValueError: two folders for one part, or a folder that cannot be read.
    """
    seen = set()
    while True:
        seen.add(os.path.realpath(root))
        train = _one_of(root, TRAIN)
        held_out = [folder for names in (VALIDATION, TEST) if (folder := _one_of(root, names))]
        if train and (held_out or subfolders(train)):
            return _beside(root, train, held_out)
        only = _only_folder(root)
        if only is None or not subfolders(only) or _has_images(only) or os.path.realpath(only) in seen:
            return Folders(root, None)
        root = only
        logger.info("the data set is taken to lie deeper, in %s", root)


def _only_folder(root):
    found = subfolders(root)
    return found[0] if len(found) == 1 and not _has_images(root) else None


def _beside(root, train, held_out):
    others = [folder.name for folder in subfolders(root) if folder not in (train, *held_out)]
    if others:
        logger.warning("%s is a split; left alone beside it: %s", root, ", ".join(others[:5]))
    with_classes = [folder for folder in held_out if subfolders(folder)]
    for folder in held_out:
        if folder not in with_classes:
            logger.warning("%s has no class folders and is left alone", folder)
    if not with_classes:
        return Folders(train, None)
    test, *others = with_classes
    for folder in others:
        logger.info("evaluating on %s; %s is left alone", test, folder)
    return Folders(train, test)


def class_names(root: Path) -> tuple[str, ...]:
    """The names of the class folders in their order; numbers in that of their values.

    Raises:
      ValueError: no class folders.
    """
    names = [folder.name for folder in subfolders(root)]
    for entry in _entries(root):
        _is_dangling(entry)
    if not names:
        raise ValueError(f"{root} has no class folders; expected one folder a class with image files")
    are_numbers = all(name.isascii() and name.isdigit() for name in names)
    return tuple(sorted(names, key=lambda name: (int(name) if are_numbers else 0, name)))


def image_files(root: Path, names: Sequence[str]) -> list[File]:
    """The images of each class, in the order of their names; what else there is, the log counts.

    Links are followed, each folder once a class.

    Raises:
      ValueError: a folder that cannot be read.
    """
    files: list[File] = []
    others: Counter[str] = Counter()
    for label, name in enumerate(names):
        if not (root / name).is_dir():
            continue
        for file in _walk(root / name, {os.path.realpath(root / name)}):
            if file.suffix.lower() in SUFFIXES:
                files.append((file, label))
            else:
                others[file.suffix.lower() or "no suffix"] += 1
    if others:
        kinds = ", ".join(f"{count} {suffix}" for suffix, count in others.most_common(5))
        logger.warning("left out %d files in %s that are no images: %s", others.total(), root, kinds)
    loose = sum(file.suffix.lower() in SUFFIXES for file in _entries(root))
    if loose:
        logger.warning("left out %d images in %s that are in no class folder", loose, root)
    return files


def hold_out(root: Path, names: Sequence[str], files: Sequence[File]) -> tuple[list[File], list[File]]:
    """Training and test images: those of the folders ``train`` and ``val`` in every class, if they are there.

    Else a third of each class is held out, by hashes of the files' names, so that few change sides when
    others come or go. A class keeps at least one training image, and of two images has one held out.
    """
    own = [
        (_one_of(folder, TRAIN), _one_of(folder, VALIDATION) or _one_of(folder, TEST))
        for folder in (root / name for name in names)
    ]
    if all(train and test for train, test in own):
        logger.info("each class in %s has training and test images of its own", root)
        parts = zip(*own, strict=True)
        train, test = ([entry for entry in files if part[entry[1]] in entry[0].parents] for part in parts)
        return train, test
    by_class: dict[int, list[Path]] = {}
    for file, label in files:
        by_class.setdefault(label, []).append(file)
    chosen = set()
    for mine in by_class.values():
        count = min(len(mine) - 1, max(1, round(len(mine) / TEST_SHARE)))
        chosen.update(sorted(mine, key=lambda file: _draw(root, file))[:count])
    train = [entry for entry in files if entry[0] not in chosen]
    return train, [entry for entry in files if entry[0] in chosen]


def _draw(root, file):
    name = os.fsencode(file.relative_to(root).as_posix())
    drawn = int.from_bytes(hashlib.sha256(name).digest()[:8])
    return drawn % TEST_SHARE != 0, drawn, name  # first those that versions up to 0.1 held out


def subfolders(folder: Path) -> list[Path]:
    """The folders in ``folder`` that may hold images, by name."""
    return [entry for entry in _entries(folder) if entry.is_dir()]


def _entries(folder: Path) -> list[Path]:
    try:
        entries = sorted(folder.iterdir())
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from None
    return [
        entry
        for entry in entries
        if not entry.name.startswith((".", "@")) and entry.name.lower() not in LEFTOVERS
    ]


def _walk(folder: Path, seen: set[str]) -> Iterator[Path]:
    for entry in _entries(folder):
        if _is_dangling(entry):
            continue
        if not entry.is_dir():
            yield entry
        elif (real := os.path.realpath(entry)) not in seen:
            seen.add(real)
            yield from _walk(entry, seen)


def _is_dangling(entry):
    """Whether ``entry`` is a link to nothing, which the log then says."""
    if not entry.is_symlink() or entry.exists():
        return False
    logger.warning("left out %s, a link to nothing", entry)
    return True


def _has_images(folder):
    return any(entry.suffix.lower() in SUFFIXES and not entry.is_dir() for entry in _entries(folder))


def _one_of(root, names):
    """The folder in ``root`` with one of ``names``, in any case; None if there is none."""
    found = [folder for folder in subfolders(root) if folder.name.lower() in names]
    if len(found) > 1:
        raise ValueError(f"{root} has {' and '.join(folder.name for folder in found)}; keep one of them")
    return found[0] if found else None
