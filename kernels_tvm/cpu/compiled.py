"""CPU kernels that another machine compiled: those of a bundle, and those of the installed package of them.

Both describe them by parts, one for each number of threads: ``threads``; ``made_by``, see `makers`; and
``targets``, a library's path by each kernel's key, by the target's name. The package, `PACKAGE`, is a folder
with ``manifest.json``: parts in ``kernels``, and the SHA-256 digest of every file by its path in ``files``.
"""

import hashlib
import json
import logging
import os
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from importlib import util
from pathlib import Path
from typing import Any, NamedTuple

from kernels_tvm import store
from kernels_tvm.cpu.targets import TARGETS, host_target, runs_here, thread_count
from kernels_tvm.runtime import LIBRARY, provide_runtime

logger = logging.getLogger(__name__)

PACKAGE = "shiftaddvit_jax_kernels"
RUNTIME = Path("kernels", "runtime")  # in a bundle and in the package: the folder of `LIBRARY`


def makers() -> dict[str, str | None]:
    """What kernels depend on beside their target: the text that makes them, and what they call."""
    return {"source": store.source_hash("cpu"), "apache-tvm-ffi": store.runtime_version()}


def choose(parts: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, str], int]:
    """The libraries for this machine, by the keys of their kernels, and how many threads share their work.

    Where there is a compiler, they are those that it would make; elsewhere, the best that run.

    Raises:
      ValueError: why there are none.
    """
    targets = {part["threads"]: part["targets"] for part in parts if part["made_by"] == makers()}
    if not targets:
        raise ValueError("other versions made them")
    threads = _choose_threads(targets)
    wanted = os.environ.get("SHIFTADDVIT_TARGET")
    suiting = [
        target
        for target in TARGETS
        if target.name in targets[threads] and wanted in (None, target.name) and runs_here(target)
    ]
    if not suiting or (store.is_installed() and suiting[0] != host_target()):
        raise ValueError(f"they are for {', '.join(targets[threads])}, not for this CPU")
    return targets[threads][suiting[0].name], threads


def _choose_threads(counts: Collection[int]) -> int:
    wanted = os.environ.get("TVM_NUM_THREADS")
    have = int(wanted) if wanted and wanted.isdigit() else thread_count()
    if have in counts:
        return have
    if wanted or store.is_installed():
        said = ", ".join(map(str, sorted(counts)))
        raise ValueError(f"they are for {said} threads, and there are {have}")
    return max((count for count in counts if count < have), default=min(counts))


class Installed(NamedTuple):
    """What the installed package has for this machine.

    Attributes:
      folder: where it is.
      libraries: their paths in there, by the keys of their kernels.
      digests: of every file, by its path.
    """

    folder: Path
    libraries: Mapping[str, str]
    digests: Mapping[str, str]

    def is_whole(self, path: str) -> bool:
        """Whether a file is what it was when the package was made."""
        try:
            found = hashlib.sha256((self.folder / path).read_bytes()).hexdigest()
        except OSError:
            return False
        return found == self.digests.get(path)


@cache
def installed() -> Installed | None:
    """What the installed package has for this machine, ready to run; None, and a line in the log, if nothing.

    The package is found, not imported.
    """
    spec = util.find_spec(PACKAGE)
    if spec is None or spec.origin is None:
        return None
    folder = Path(spec.origin).parent
    try:
        manifest = json.loads((folder / "manifest.json").read_text())
        libraries, threads = choose(manifest["kernels"])
        package = Installed(folder, libraries, manifest["files"])
        if not store.is_installed() and not package.is_whole((RUNTIME / LIBRARY).as_posix()):
            raise ValueError(f"{LIBRARY} is damaged")
    except (OSError, KeyError, TypeError, AttributeError):
        logger.warning("the compiled kernels in %s are not used: its manifest.json is not whole", folder)
        return None
    except ValueError as reason:
        logger.warning("the compiled kernels in %s are not used: %s", folder, reason)
        return None
    os.environ.setdefault("TVM_NUM_THREADS", str(threads))
    provide_runtime(folder / RUNTIME)
    return package


@cache
def installed_library(key: str) -> Path | None:
    """The installed package's library of the kernel with this key; None if it has none or a damaged one."""
    package = installed()
    path = package.libraries.get(key) if package else None
    if package is None or path is None:
        return None
    if not package.is_whole(path):
        logger.warning("%s is damaged and not used; install the package again", package.folder / path)
        return None
    return package.folder / path
