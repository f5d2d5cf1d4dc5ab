"""A model's TVM kernels before its first use: compiled for this machine or for a GPU, or tuned here."""

import contextlib
import dataclasses
import hashlib
import shutil
from collections.abc import Collection, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from kernels_tvm.cpu.compiled import RUNTIME, makers
from kernels_tvm.cpu.library import build, entry_name, is_provided, kernel_target, load
from kernels_tvm.cpu.targets import Target
from kernels_tvm.cpu.tuning import count_trials, save_record, tune
from kernels_tvm.gpu.targets import GpuTarget
from kernels_tvm.runtime import LIBRARY, runtime_folder
from kernels_tvm.store import (
    PACKAGES,
    Kernel,
    adopt,
    cache_folder,
    can_link,
    is_installed,
    read_entry,
    save_entry,
)
from shiftaddvit_jax.files import file_digests, whole_folder, write_json
from shiftaddvit_jax.models.variables import example_inputs
from shiftaddvit_jax.ops.implementation.custom_call import record_kernels, unavailable
from shiftaddvit_jax.optional import how_to_install
from shiftaddvit_jax.pack import packed_shapes
from shiftaddvit_jax.progress import progress_bar, track

Shapes = list[tuple[tuple[int, ...], str]]


def kernels_of(model: nn.Module, batch: int = 1, for_gpu: bool = False) -> Mapping[Kernel, Shapes]:
    """The kernels of a model with ``implementation="tvm"``, with the shapes of their arguments and outputs.

    ``for_gpu`` returns GPU kernels on any machine.

    Raises:
      ValueError: TVM can't run here, or a batch below 1.
    """
    return {kernel: calls[-1] for kernel, calls in kernel_calls(model, batch, for_gpu).items()}


def kernel_calls(model: nn.Module, batch: int = 1, for_gpu: bool = False) -> Mapping[Kernel, list[Shapes]]:
    """`kernels_of` with the shapes of each call in a forward pass; kernels in the order of their first."""
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    variables = packed_shapes(model)
    with record_kernels(for_gpu) as kernels:
        jax.eval_shape(model.apply, variables, *example_inputs(model, batch))
    return dict(kernels)


def runs_on_kernels(model: nn.Module) -> bool:
    """Whether a model's kernels are to be had here: compiled when they are called, or found compiled."""
    if unavailable() is not None:
        return False
    return is_installed() or all(is_provided(kernel.key) for kernel in kernels_of(model))


def check_compiler() -> None:
    """Raise a ``ValueError`` unless TVM and a linker are here."""
    if not is_installed() or not can_link():
        raise ValueError(f"TVM and a linker make kernels: {how_to_install('tvm')}, and put g++ on the PATH")


def compile_kernels(kernels: Collection[Kernel]) -> None:
    """Compile kernels into the cache, with a progress bar; kernels that are in the cache are loaded."""
    for kernel in track(kernels, "compiling", len(kernels)):
        load(kernel)


def write_kernels(
    folder: Path, kernels: Collection[Kernel], targets: Sequence[Target], threads: int
) -> dict[str, Any]:
    """Compile CPU kernels for other machines, with a progress bar, and describe them: a part of a manifest.

    Libraries go to ``kernels/TARGET/`` in ``folder``, and what they call to ``kernels/runtime/``. What the
    cache has is copied.

    Args:
      folder: of a bundle, or of the package of compiled kernels.
      kernels: what is compiled.
      targets: for what kinds of CPU, with the tile sizes on record for each.
      threads: how many share a kernel's work.

    Raises:
      ValueError: one can't be linked here, such as for another processor architecture.
    """
    made = {}
    work = [(target, kernel) for target in targets for kernel in kernels]
    for target, kernel in track(work, f"compiling for {threads} threads", len(work)):
        library = _compile_library(kernel, target, threads, folder / "kernels" / target.name)
        made.setdefault(target.name, {})[kernel.key] = library.relative_to(folder).as_posix()
    installed, copied = runtime_folder(), folder / RUNTIME
    assert installed is not None  # it has just compiled
    copied.mkdir(exist_ok=True)
    shutil.copyfile(installed / LIBRARY, copied / LIBRARY)
    return {"threads": threads, "made_by": makers(), "targets": made}


def _compile_library(kernel, target, threads, folder):
    """The path of the kernel's library in ``folder``, a copy of the cache's entry."""
    tiled = kernel_target(kernel, target)
    library = folder / f"{entry_name(kernel, tiled, threads)}.so"
    kept = cache_folder() / library.name
    if read_entry(kept) is not None:
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(kept, library)
        return library
    built = build(kernel, tiled, threads)
    try:
        save_entry(built.export_library, library)
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"{kernel.name} can't be linked for {target.name} here: {reason}") from None
    with contextlib.suppress(OSError):  # the cache can't be written
        adopt(library)
    return library


def write_package(
    folder: Path, kernels: Collection[Kernel], targets: Sequence[Target], threads: Sequence[int]
) -> dict[str, Any]:
    """Write the package of compiled CPU kernels, whole or not at all, and return its manifest.

    Args:
      folder: an existing one is replaced.
      kernels: what is compiled.
      targets: for what kinds of CPU, with the tile sizes on record for each.
      threads: for each number of threads that share a kernel's work.

    Raises:
      ValueError: there is no compiler here, or it can't compile for a target.
    """
    check_compiler()
    with whole_folder(folder) as temporary:
        parts = [write_kernels(temporary, kernels, targets, count) for count in threads]
        manifest = {"kernels": parts, "files": file_digests(temporary)}
        write_json(temporary / "manifest.json", manifest)
        (temporary / "__init__.py").write_text('"""Compiled kernels: found here, never imported."""\n')
    return manifest


def export_kernels(model: nn.Module, target: GpuTarget, folder: Path) -> dict[str, Any]:
    """Compile a model's GPU kernels into libraries in a folder, with a progress bar, and describe them.

    The description is written to ``manifest.json`` in the folder. A machine with the same versions and the
    libraries in its cache needs no compiler.

    Raises:
      ValueError: there is no compiler here.
    """
    check_compiler()
    from kernels_tvm.gpu.export import export_kernel

    folder.mkdir(parents=True, exist_ok=True)
    kernels = kernels_of(model, for_gpu=True)
    entries = []
    for kernel, shapes in track(kernels.items(), "compiling", len(kernels)):
        try:
            path, resources = export_kernel(kernel, target, folder)
        except RuntimeError as error:
            raise ValueError(error) from error
        entries.append(
            {
                "kernel": kernel.name,
                "description": dataclasses.asdict(kernel.description),
                "shapes": shapes,
                "file": path.name,
                "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
                "launches": {name: dataclasses.asdict(each) for name, each in resources.items()},
            }
        )
    manifest = {
        "target": target.name,
        "versions": {package: metadata.version(package) for package in (*PACKAGES, "jax")},
        "kernels": entries,
    }
    write_json(folder / "manifest.json", manifest)
    return manifest


def tune_kernels(model: nn.Module, batch: int = 1) -> list[tuple[Kernel, dict, float, float]]:
    """Tune all kernels of a model and keep the records: (kernel, what changed, seconds before and after)."""
    kernels = kernels_of(model, batch)
    results = []
    with progress_bar() as progress:
        task = progress.add_task("tuning", total=sum(map(count_trials, kernels)), note="")
        for kernel, shapes in kernels.items():
            facts, before, after = tune(kernel, shapes, lambda: progress.advance(task))
            save_record(kernel, facts)
            results.append((kernel, facts, before, after))
    return results
