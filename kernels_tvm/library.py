"""Kernels by name and description: compiled once, then loaded from a folder of the user's cache.

An entry is named by what it depends on: the kernel and its description, the target, the number of threads,
TVM's version and the text of this package. Entries are written under a temporary name and renamed, so
concurrent processes and a kill leave nothing half written. Each ends with its hash, since loading a damaged
library can crash the process; what is damaged or does not load is compiled again.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import Any, NamedTuple

from kernels_tvm.runtime import load_function, once, start
from kernels_tvm.targets import Target, host_target, thread_count

PACKAGES = ("apache-tvm", "apache-tvm-ffi")


class Kernel(NamedTuple):
    """A kernel to be: the name of its function in `builders`, and the description that the function takes."""

    name: str
    description: Any


def builders() -> dict[str, Callable]:
    """The functions (target, threads, description) -> TIR, by the names of their kernels. Imports TVM."""
    from kernels_tvm.attention import hamming_linear_kernel
    from kernels_tvm.binarize import binarize_kernel
    from kernels_tvm.depthwise_conv import depthwise_conv_kernel
    from kernels_tvm.head import head_kernel
    from kernels_tvm.matadd import hamming_product_kernel, matadd_kernel
    from kernels_tvm.matshift import linear_kernel
    from kernels_tvm.mlp import mlp_kernel
    from kernels_tvm.patch_embed import patch_embed_kernel
    from kernels_tvm.softmax import softmax_attention_kernel

    return {
        "patch_embed": patch_embed_kernel,
        "softmax_attention": softmax_attention_kernel,
        "linear": linear_kernel,
        "head": head_kernel,
        "matadd": matadd_kernel,
        "hamming_product": hamming_product_kernel,
        "binarize": binarize_kernel,
        "depthwise_conv": depthwise_conv_kernel,
        "mlp": mlp_kernel,
        "hamming_linear": hamming_linear_kernel,
    }


def is_installed() -> bool:
    """Whether TVM can be imported."""
    return util.find_spec("tvm") is not None


def cache_folder() -> Path:
    """Where compiled kernels are kept: $XDG_CACHE_HOME/shiftaddvit_jax/kernels, by default in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "shiftaddvit_jax" / "kernels"


def kernel_key(kernel: Kernel) -> str:
    """What identifies a kernel in a file of records."""
    return f"{kernel.name} {json.dumps(dataclasses.asdict(kernel.description), sort_keys=True)}"


def user_records(target: Target) -> Path:
    """Where tuned tile sizes are kept: in $XDG_DATA_HOME, by default ~/.local/share."""
    root = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(root) / "shiftaddvit_jax" / "records" / f"{target.name}.json"


def kernel_target(kernel: Kernel) -> Target:
    """The machine's target with the tile sizes on record for a kernel: the user's, else the package's."""
    target = host_target()
    shipped = Path(__file__).parent / "records" / f"{target.name}.json"
    for path in (user_records(target), shipped):
        facts = _records(path).get(kernel_key(kernel))
        if facts is not None:
            facts = {
                name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()
            }
            return dataclasses.replace(target, **facts)
    return target


@cache
def _records(path: Path) -> dict[str, dict]:
    """The facts of a file by the keys of their kernels; of a damaged file none, with a warning."""
    facts = {field.name for field in dataclasses.fields(Target)}
    try:
        records = json.loads(path.read_text())
        if not all(facts.issuperset(record) for record in records.values()):
            raise ValueError("unknown facts")
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError) as error:
        warnings.warn(
            f"{path} does not hold tile sizes ({error}) and is ignored; delete it and run `shiftaddvit tune`",
            stacklevel=2,
        )
        return {}
    return records


def entry_name(kernel: Kernel, target: Target, threads: int) -> str:
    """What identifies the compiled kernel, also as the name of a custom call."""
    depends_on = {
        "kernel": kernel.name,
        "description": dataclasses.asdict(kernel.description),
        "target": [target.name, sorted(target.llvm, key=str), target.float_tile, target.int8_tile],
        "cache": [target.strip_bytes, target.convolved_tokens],
        "threads": threads,
        "versions": [metadata.version(package) for package in PACKAGES],
        "source": source_hash(),
    }
    text = json.dumps(depends_on, sort_keys=True, default=str)
    return f"{kernel.name}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


@cache
def source_hash() -> str:
    """The hash of this package's text."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@once
def load(kernel: Kernel):
    """The kernel's function for this machine, compiled now if no process has before.

    Raises:
      ValueError: this machine's CPU is not among the targets.
    """
    if host_target() is None:
        raise ValueError("no TVM kernels for this CPU; use implementation='xla' or None")
    target, threads = kernel_target(kernel), thread_count()
    # TVM's own guess is half of the CPUs, on machines without hyper-threads too.
    os.environ.setdefault("TVM_NUM_THREADS", str(threads))
    return load_or_build(entry_name(kernel, target, threads), lambda: build(kernel, target, threads))


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


def build(kernel: Kernel, target: Target, threads: int):
    """The kernel's library, compiled for ``target``."""
    start()  # ahead of the imports of TVM
    from kernels_tvm.build import compile_kernel

    return compile_kernel(builders()[kernel.name](target, threads, kernel.description), target)


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
