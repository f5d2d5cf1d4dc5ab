"""Compiled kernels in a folder of the user's cache, for CPUs and for GPUs.

An entry is named by all that it depends on: the kernel and its description, the target, TVM's version and the
text of the package that makes kernels for that side. It is written under a temporary name and renamed, so
concurrent processes and a kill leave nothing half written. It ends with its hash, since loading a damaged
library can crash the process; what is damaged or does not load is compiled again.
"""

import dataclasses
import hashlib
import json
import logging
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Generator
from contextlib import contextmanager
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

from kernels_tvm.runtime import load_function

logger = logging.getLogger(__name__)

PACKAGES = ("apache-tvm", "apache-tvm-ffi")


class Kernel(NamedTuple):
    """A kernel to compile: its name, and the description of what it computes."""

    name: str
    description: Any

    @property
    def key(self) -> str:
        """Name and description as text: what a kernel computes, on whatever machine."""
        return f"{self.name} {json.dumps(dataclasses.asdict(self.description), sort_keys=True)}"


def runtime_version() -> str | None:
    """The version of what compiled kernels are called through, None if it is not installed."""
    try:
        return metadata.version("apache-tvm-ffi")
    except metadata.PackageNotFoundError:
        return None


def is_installed() -> bool:
    """Whether TVM can be imported."""
    return util.find_spec("tvm") is not None


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/shiftaddvit_jax/kernels, by default in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "shiftaddvit_jax" / "kernels"


def portable_name(key: str) -> str:
    """A short name for a kernel's key, the same on every machine."""
    return f"{key.split()[0]}-{hashlib.sha256(key.encode()).hexdigest()[:32]}"


def entry_name(side: str, kernel: Kernel, target, **facts) -> str:
    """What identifies a compiled kernel, also as the name of a custom call.

    Args:
      side: ``"cpu"`` or ``"gpu"``.
      kernel: what is compiled.
      target: for what: a dataclass, all of whose fields count.
      facts: what else the machine code depends on.
    """
    depends_on = {
        "kernel": kernel.name,
        "description": dataclasses.asdict(kernel.description),
        "target": dataclasses.asdict(target),
        "versions": [metadata.version(package) for package in PACKAGES],
        "source": source_hash(side),
    }
    text = json.dumps(depends_on | facts, sort_keys=True, default=sorted)  # a set as a sorted list
    return f"{kernel.name}-{target.name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


@cache
def source_hash(side: str, package: Path = Path(__file__).parent) -> str:
    """The hash of the text that makes a side's kernels: files of ``package`` and of its folder ``side``."""
    digest = hashlib.sha256()
    for path in sorted([*package.glob("*.py"), *(package / side).glob("*.py")]):
        digest.update(str(path.relative_to(package)).encode() + path.read_bytes())
    return digest.hexdigest()


def load_or_build(entry: str, build: Callable):
    """The function ``main`` of the cache's library ``entry``, which ``build()`` makes if it is missing."""
    path = cache_folder() / f"{entry}.so"
    if read_entry(path) is not None:
        try:
            return load_function(path)
        except Exception:  # a library of another system can raise anything
            path.unlink(missing_ok=True)
    _tell_of_compiling(path.parent)
    library = build()
    if can_link() and try_to_save(library.export_library, path):
        return load_function(path)
    return library["main"]


def try_to_save(write: Callable[[str], object], path: Path) -> bool:
    """Whether `save_entry` could write. Its first failure in a process is a warning."""
    try:
        save_entry(write, path)
    except OSError:
        _warn_of_unwritable(path.parent)
        return False
    return True


@cache
def _tell_of_compiling(folder: Path) -> None:
    logger.info("compiling kernels, up to a minute for a model; %s keeps them", folder)


@cache
def _warn_of_unwritable(folder: Path) -> None:
    warnings.warn(f"{folder} can't be written, so every kernel is compiled at every start", stacklevel=4)


def save_entry(write: Callable[[str], object], path: Path) -> None:
    """Keep what ``write(path)`` writes, and its hash at the end.

    Raises:
      OSError: the folder can't be written.
    """
    with replacing(path) as temporary:
        write(str(temporary))
        with temporary.open("ab") as file:  # loaders ignore what follows a library
            file.write(hashlib.sha256(temporary.read_bytes()).digest())


def adopt(path: Path) -> None:
    """Keep a copy of an entry that was made elsewhere, unless the cache has it.

    Raises:
      OSError: the folder can't be written.
    """
    kept = cache_folder() / path.name
    if read_entry(kept) is None:
        with replacing(kept) as temporary:
            shutil.copyfile(path, temporary)


@contextmanager
def replacing(path: Path) -> Generator[Path]:
    """A temporary path, whose file takes the place of ``path`` at the end and is deleted after an error.

    A folder that does not exist yet becomes one that its owner alone can read.

    Raises:
      OSError: the folder can't be written.
    """
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        temporary = Path(folder) / path.name
        yield temporary
        os.replace(temporary, path)


def read_entry(path: Path) -> bytes | None:
    """What `save_entry` kept, without the hash; None if nothing is kept or the file is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    kept, digest = content[:-size], content[-size:]
    return kept if hashlib.sha256(kept).digest() == digest else None


def can_link() -> bool:
    """Whether this machine has a linker that TVM would find."""
    return shutil.which("g++") is not None or shutil.which("clang++") is not None
