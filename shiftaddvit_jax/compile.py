"""A model's TVM kernels before its first use: compiled for this machine or for a GPU, or tuned here."""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax

from kernels_tvm.cpu.library import build, kernel_target, load
from kernels_tvm.cpu.targets import Target
from kernels_tvm.cpu.tuning import count_trials, save_record, tune
from kernels_tvm.gpu.targets import GpuTarget
from kernels_tvm.store import PACKAGES, Kernel, can_link, is_installed
from shiftaddvit_jax.files import write_json
from shiftaddvit_jax.models.variables import example_inputs
from shiftaddvit_jax.ops.implementation.custom_call import record_kernels
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


def compile_kernels(kernels: Collection[Kernel]) -> None:
    """Compile kernels into the cache, with a progress bar; kernels that are in the cache are loaded."""
    for kernel in track(kernels, "compiling", len(kernels)):
        load(kernel)


def compile_kernel_library(kernel: Kernel, target: Target, threads: int, path: Path) -> None:
    """Compile a CPU kernel into a library for another machine.

    Args:
      kernel: what is compiled.
      target: for what kind of CPU, with the tile sizes on record for it.
      threads: how many share its work.
      path: the library.

    Raises:
      ValueError: it can't be linked here, such as for another processor architecture.
    """
    built = build(kernel, kernel_target(kernel, target), threads)
    try:
        built.export_library(str(path))
    except RuntimeError as error:
        reason = (str(error).strip().splitlines() or ["no reason given"])[-1]
        raise ValueError(f"{kernel.name} can't be linked for {target.name} here: {reason}") from None


def export_kernels(model: nn.Module, target: GpuTarget, folder: Path) -> dict[str, Any]:
    """Compile a model's GPU kernels into libraries in a folder, with a progress bar, and describe them.

    The description is written to ``manifest.json`` in the folder. A machine with the same versions and the
    libraries in its cache needs no compiler.

    Raises:
      ValueError: there is no compiler here.
    """
    if not is_installed() or not can_link():
        raise ValueError(
            f"TVM and a linker make the libraries: {how_to_install('tvm')}, and put g++ on the PATH"
        )
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
