"""Compiled kernels in a folder of the user's cache, for CPUs and for GPUs.

An entry is written under a temporary name and renamed, so concurrent processes and a kill leave nothing half
written. It ends with its hash, since loading a damaged library can crash the process; what is damaged or does
not load is compiled again.
"""

import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

from kernels_tvm.runtime import load_function

PACKAGES = ("apache-tvm", "apache-tvm-ffi")


class Kernel(NamedTuple):
    """A kernel to compile: its name, and the description of what it computes."""

    name: str
    description: Any


def is_installed() -> bool:
    """Whether TVM can be imported."""
    return util.find_spec("tvm") is not None


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/shiftaddvit_jax/kernels, by default in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "shiftaddvit_jax" / "kernels"


@cache
def source_hash() -> str:
    """The hash of this package's text."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def load_or_build(entry: str, build: Callable):
    """The function ``main`` of the cache's library of that name, which ``build()`` makes if it must."""
    path = cache_folder() / f"{entry}.so"
    if read_entry(path) is not None:
        try:
            return load_function(path)
        except Exception:  # whatever a library of another system makes the loader raise
            path.unlink(missing_ok=True)
    library = build()
    if can_link() and save_entry(library.export_library, path):
        return load_function(path)
    return library["main"]


def save_entry(write: Callable[[str], None], path: Path) -> bool:
    """Keep what ``write(path)`` writes, and its hash at the end; False where that can't be written."""
    try:
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as folder:
            temporary = Path(folder) / path.name
            write(str(temporary))
            with temporary.open("ab") as file:  # loaders ignore what follows a library
                file.write(hashlib.sha256(temporary.read_bytes()).digest())
            os.replace(temporary, path)
    except OSError:
        return False
    return True


def read_entry(path: Path) -> bytes | None:
    """What `save_entry` kept, without the hash; None where nothing is kept, or the file is damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    size = hashlib.sha256().digest_size
    kept, digest = content[:-size], content[-size:]
    return kept if hashlib.sha256(kept).digest() == digest else None


def can_link() -> bool:
    """Whether this machine has a linker, as TVM looks for one."""
    return shutil.which("g++") is not None or shutil.which("clang++") is not None
