"""What folders hold: each is read once, and not at all while it is as it was in an earlier run."""

import logging
import os
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from shiftaddvit_jax.data.cache import recall, remember
from shiftaddvit_jax.data.images import SUFFIXES

logger = logging.getLogger(__name__)

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
REMEMBERED_FROM = 10_000  # images; fewer are listed as fast as a cache is read
SETTLED = (
    2_000_000_000  # nanoseconds after which a change leaves another time on a folder, on any file system
)


@dataclass(frozen=True)
class Folder:
    """What a folder holds, by name and in order, without what systems leave behind.

    Attributes:
      folders: folders, and links to such.
      images: files with one of `SUFFIXES`.
      others: number of other files by suffix.
      dangling: links to nothing.
    """

    folders: Sequence[str]
    images: Sequence[str]
    others: dict[str, int]
    dangling: Sequence[str]


class Listing:
    """The folders under ``root``, links to others included, as they were when they were first asked for.

    A folder's time of change tells whether names came or went since an earlier run. `close` keeps what was
    read.
    """

    def __init__(self, root: Path) -> None:
        self._root = root
        remembered = recall("listing", root)
        self._remembered = remembered if isinstance(remembered, dict) else {}
        self._changed: dict[str, int] = {}
        self._folders: dict[str, Folder] = {}
        self._was_read = False

    def __getitem__(self, folder: Path) -> Folder:
        """What ``folder`` holds.

        Raises:
          ValueError: a folder that cannot be read.
        """
        real = os.path.realpath(folder)
        if real not in self._folders:
            try:
                self._folders[real] = self._recalled(real) or self._read(real)
            except OSError as error:
                raise ValueError(f"{folder} cannot be read: {error.strerror}") from None
        return self._folders[real]

    def close(self) -> None:
        """Keep what was read for later runs, where that saves them time."""
        images = sum(len(folder.images) for folder in self._folders.values())
        if not self._was_read or images < REMEMBERED_FROM:
            return
        settled = {
            path: [self._changed[path], folder.folders, folder.images, folder.others, folder.dangling]
            for path, folder in self._folders.items()
            if path in self._changed
        }
        remember("listing", self._root, settled)

    def _recalled(self, real):
        match self._remembered.get(real):
            case [int(changed), list(folders), list(images), dict(others), list(dangling)]:
                if os.stat(real).st_mtime_ns != changed:
                    return None
                self._changed[real] = changed
                return Folder(folders, images, others, dangling)
        return None

    def _read(self, real):
        self._was_read = True
        # Read before the names are, so that one that comes meanwhile is noticed next time.
        changed, now = os.stat(real).st_mtime_ns, time.time_ns()
        folders, images, dangling, others = [], [], [], Counter()
        with os.scandir(real) as entries:
            for entry in entries:
                name = entry.name
                if name[0] in ".@" or name.lower() in LEFTOVERS:
                    continue
                if entry.is_dir():
                    folders.append(name)
                elif entry.is_symlink() and not os.path.exists(entry.path):
                    dangling.append(name)
                elif (suffix := os.path.splitext(name)[1].lower()) in SUFFIXES:
                    images.append(name)
                else:
                    others[suffix or "no suffix"] += 1
        if changed < now - SETTLED:
            self._changed[real] = changed
        return Folder(sorted(folders), sorted(images), dict(others), sorted(dangling))


def walk(listing: Listing, folder: Path) -> Iterator[tuple[str, Folder]]:
    """``folder`` and all below it, each once: its path from there, empty or ending in a slash, and it."""
    seen = set()

    def below(path: str) -> Iterator[tuple[str, Folder]]:
        real = os.path.realpath(folder / path)
        if real in seen:
            return
        seen.add(real)
        held = listing[folder / path]
        for name in held.dangling:
            logger.warning("left out %s, a link to nothing", folder / path / name)
        yield path, held
        for name in held.folders:
            yield from below(f"{path}{name}/")

    return below("")


class PackedNames:
    """Many names in little memory, and quick to send to other processes; as bytes, since any are allowed.

    Args:
      names: without NUL characters, as those of files are.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self._packed = os.fsencode("\0".join(names)) + b"\0" if names else b""
        self._ends = np.flatnonzero(np.frombuffer(self._packed, np.uint8) == 0)

    def __len__(self) -> int:
        return len(self._ends)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self._packed.split(b"\0")[:-1])

    def __getitem__(self, index: int) -> bytes:
        if not 0 <= index < len(self):
            raise IndexError(index)
        start = int(self._ends[index - 1]) + 1 if index else 0
        return self._packed[start : int(self._ends[index])]


class Paths:
    """The paths of files below a folder.

    Args:
      root: the folder.
      names: of the files from there.
    """

    def __init__(self, root: Path, names: PackedNames) -> None:
        self._root, self._names = root, names

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int) -> Path:
        return self._root / os.fsdecode(self._names[index])
