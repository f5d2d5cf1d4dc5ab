"""CPU kernels by name and description: compiled once, then loaded from the cache, see `kernels_tvm.store`.

Kernels that came with a model, see `provide`, or that `kernels_tvm.cpu.compiled` finds, take the cache's
place: they need no compiler.
"""

import dataclasses
import json
import os
import warnings
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from kernels_tvm import store
from kernels_tvm.cpu.compiled import installed, installed_library
from kernels_tvm.cpu.targets import TARGETS, Target, host_target, thread_count
from kernels_tvm.runtime import load_function, once, start
from kernels_tvm.store import Kernel, load_or_build


def builders() -> dict[str, Callable]:
    """The functions (target, threads, description) -> TIR, by the names of their kernels. Imports TVM."""
    from kernels_tvm.cpu.binarize import binarize_kernel
    from kernels_tvm.cpu.binary_softmax import binary_softmax_kernel
    from kernels_tvm.cpu.depthwise_conv import depthwise_conv_kernel
    from kernels_tvm.cpu.hadamard import hadamard_kernel
    from kernels_tvm.cpu.hamming import hamming_product_kernel
    from kernels_tvm.cpu.hamming_attention import hamming_linear_kernel
    from kernels_tvm.cpu.head import head_kernel
    from kernels_tvm.cpu.linear import linear_kernel
    from kernels_tvm.cpu.matadd import matadd_kernel
    from kernels_tvm.cpu.mlp import mlp_kernel
    from kernels_tvm.cpu.patch_embed import patch_embed_kernel
    from kernels_tvm.cpu.softmax_attention import softmax_attention_kernel

    return {
        "patch_embed": patch_embed_kernel,
        "softmax_attention": softmax_attention_kernel,
        "binary_softmax": binary_softmax_kernel,
        "linear": linear_kernel,
        "head": head_kernel,
        "matadd": matadd_kernel,
        "hamming_product": hamming_product_kernel,
        "hadamard": hadamard_kernel,
        "binarize": binarize_kernel,
        "depthwise_conv": depthwise_conv_kernel,
        "mlp": mlp_kernel,
        "hamming_linear": hamming_linear_kernel,
    }


def needed_target() -> Target:
    """The best target that this machine runs, or the one that SHIFTADDVIT_TARGET chooses.

    Raises:
      ValueError: it runs none, or not that one.
    """
    target = host_target()
    if target is None:
        raise ValueError(f"no kernels for this CPU, only for {', '.join(target.name for target in TARGETS)}")
    return target


def user_records(target: Target) -> Path:
    """The file of the user's tuned tile sizes: in $XDG_DATA_HOME, by default in ~/.local/share."""
    root = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(root) / "shiftaddvit_jax" / "records" / f"{target.name}.json"


def kernel_target(kernel: Kernel, target: Target | None = None) -> Target:
    """A target, by default the machine's, with a kernel's tile sizes on record: the user's, or else ours.

    Raises:
      ValueError: this machine's CPU is not among the targets.
    """
    target = target or needed_target()
    shipped = Path(__file__).parent / "records" / f"{target.name}.json"
    for path in (user_records(target), shipped):
        facts = _records(path).get(kernel.key)
        if facts is not None:
            changed: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value for name, value in facts.items()
            }
            return dataclasses.replace(target, **changed)
    return target


@cache
def _records(path: Path) -> dict[str, dict]:
    """A file's facts of targets, by the keys of their kernels; a damaged file gives a warning and none."""
    facts = {field.name for field in dataclasses.fields(Target)}
    try:
        records = json.loads(path.read_text())
        if not all(facts.issuperset(record) for record in records.values()):
            raise ValueError("unknown facts")
    except FileNotFoundError:
        return {}
    except (ValueError, AttributeError, TypeError) as error:
        warnings.warn(
            f"{path} does not hold tile sizes ({error}) and is ignored; delete it, and tune again",
            stacklevel=2,
        )
        return {}
    return records


def entry_name(kernel: Kernel, target: Target, threads: int) -> str:
    """What identifies the compiled kernel, also as the name of a custom call."""
    return store.entry_name("cpu", kernel, target, threads=threads)


_provided: dict[str, Path] = {}


def provide(libraries: Mapping[str, Path], threads: int) -> None:
    """Have `load` take kernels from libraries that were compiled elsewhere, for this machine's kind of CPU.

    Args:
      libraries: a library by each kernel's key; one that is provided already stays.
      threads: for how many they were compiled.
    """
    os.environ.setdefault("TVM_NUM_THREADS", str(threads))
    for key, path in libraries.items():
        _provided.setdefault(key, path)


def is_provided(key: str | None = None) -> bool:
    """Whether the kernel with this key, or by default any, came with a model or an installed package."""
    if key is None:
        return bool(_provided) or installed() is not None
    return _provided_library(key) is not None


def _provided_library(key):
    """The path of a provided kernel's library, or None. Tile sizes that were tuned here want another one."""
    path = _provided.get(key) or installed_library(key)
    if path is None or key in _provided or not store.is_installed():
        return path
    return None if key in _records(user_records(needed_target())) else path


@once
def load_provided(key: str):
    """The function of the provided kernel with this key."""
    path = _provided_library(key)
    assert path is not None  # `is_provided` said so
    return load_function(path)


@once
def load(kernel: Kernel):
    """The kernel's function for this machine: a provided one, or one from the cache, or else compiled now.

    Raises:
      ValueError: this machine's CPU is not among the targets.
      RuntimeError: there is no compiler.
    """
    if is_provided(kernel.key):
        return load_provided(kernel.key)
    if not store.is_installed():
        raise RuntimeError(f"no compiled kernel {kernel.name} of this description, and TVM is not installed")
    target, threads = kernel_target(kernel), thread_count()
    # TVM itself takes half of the CPUs, even on machines without hyper-threads.
    os.environ.setdefault("TVM_NUM_THREADS", str(threads))
    return load_or_build(entry_name(kernel, target, threads), lambda: build(kernel, target, threads))


def build(kernel: Kernel, target: Target, threads: int):
    """The kernel's library, compiled for ``target``."""
    start()  # before TVM is imported
    from kernels_tvm.cpu.build import compile_kernel

    return compile_kernel(builders()[kernel.name](target, threads, kernel.description), target)
