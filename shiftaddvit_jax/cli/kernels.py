"""Commands about the TVM kernels of a model."""

import argparse
import time
from pathlib import Path
from typing import Any

from kernels_tvm.gpu.targets import GPU_TARGETS, gpu_target
from shiftaddvit_jax.cli.arguments import Commands, add_command, add_kinds, check_folders
from shiftaddvit_jax.command import print_table
from shiftaddvit_jax.files import write_json
from shiftaddvit_jax.optional import require


def add_compile(commands: Commands) -> None:
    """Add ``compile``."""
    description = (
        "Compile a model's TVM kernels into the cache, ahead of its use, or for a GPU into a folder."
    )
    command = add_command(commands, "compile", compile_model, description)
    command.add_argument("model", metavar="MODEL", help="one of those of `shiftaddvit models`")
    add_kinds(command)
    targets = ", ".join(target.name for target in GPU_TARGETS)
    command.add_argument("--target", metavar="GPU", help=f"instead of this CPU: {targets}")
    command.add_argument("--output", metavar="DIR", help="where a GPU's libraries and manifest.json go")


def compile_model(arguments: argparse.Namespace) -> None:
    """A model's kernels, compiled into the cache, or for a GPU into a folder."""
    from kernels_tvm.cpu.library import needed_target
    from kernels_tvm.store import cache_folder
    from shiftaddvit_jax.compile import compile_kernels, export_kernels, kernels_of

    if (arguments.target is None) != (arguments.output is None):
        raise ValueError("--target and --output come together: a GPU's libraries go to a folder")
    target = gpu_target(arguments.target) if arguments.target else None
    model = _kernel_model(arguments)
    start = time.perf_counter()
    if target:
        manifest = export_kernels(model, target, Path(arguments.output))
        seconds = time.perf_counter() - start
        print(f"{len(manifest['kernels'])} kernels for {target.name} in {seconds:.1f} s: {arguments.output}")
        return
    kernels = kernels_of(model)
    traced = time.perf_counter() - start
    compile_kernels(kernels)
    seconds = time.perf_counter() - start - traced
    found = f"{len(kernels)} kernels for {needed_target().name} in {seconds:.2f} s"
    print(f"{found}, after {traced:.2f} s to trace the model; kept in {cache_folder()}")


def add_tune(commands: Commands) -> None:
    """Add ``tune``."""
    description = "Measure which tile sizes suit a model's TVM kernels here, and keep them (minutes)."
    command = add_command(commands, "tune", tune_model, description)
    command.add_argument("model", metavar="MODEL", help="one of those of `shiftaddvit models`")
    add_kinds(command)
    command.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time (default: 1)")


def tune_model(arguments: argparse.Namespace) -> None:
    """Tile sizes for a model's kernels, measured here."""
    from rich.table import Table

    from kernels_tvm.cpu.library import needed_target, user_records
    from shiftaddvit_jax.compile import tune_kernels

    results = tune_kernels(_kernel_model(arguments), arguments.batch)
    table = Table(title=f"Kernels of {arguments.model} on {needed_target().name}")
    for column in ("kernel", "before (ms)", "after (ms)", "changed"):
        table.add_column(column, justify="right" if "ms" in column else "left")
    for kernel, facts, before, after in results:
        changed = ", ".join(f"{name} {value}" for name, value in facts.items()) or "nothing"
        table.add_row(kernel.name, f"{before * 1e3:.3f}", f"{after * 1e3:.3f}", changed)
    print_table(table)
    print(f"written to {user_records(needed_target())}")


def add_gpu_report(commands: Commands) -> None:
    """Add ``gpu-report``."""
    description = "What the GPU kernels move, take and can reach at most, said by nvcc without a GPU."
    command = add_command(commands, "gpu-report", gpu_report, description)
    command.add_argument("--json", metavar="FILE", help="write all figures there")


def gpu_report(arguments: argparse.Namespace) -> None:
    """What the GPU kernels take and can reach, computed without a GPU."""
    require("tvm", "gpu-report, which compiles kernels,", "tvm")
    from shiftaddvit_jax.costs.gpu_bounds import static_report

    check_folders(arguments.json)
    report = static_report()
    _print_gpu_report(report)
    if arguments.json:
        write_json(arguments.json, report)


def _kernel_model(arguments):
    from shiftaddvit_jax.models import create_model
    from shiftaddvit_jax.models.kinds import parse_kinds

    kinds: dict[str, Any] = {
        name: parse_kinds(getattr(arguments, name)) for name in ("attention", "mlp", "projections")
    }
    return create_model(
        arguments.model,
        image_size=arguments.image_size,
        **kinds,
        activations=arguments.activations,
        precision=arguments.precision,
        implementation="tvm",
    )


def _print_gpu_report(report: dict) -> None:
    from rich.box import SIMPLE
    from rich.table import Table

    kernels = {}
    for row in report["rows"]:
        kernels.setdefault(row["kernel"], []).append(row)
    takes = Table(title="What a launch takes, on the GPU where it takes most", box=SIMPLE)
    bounds = Table(title="Lower bounds of times in µs, in brackets those of dense float32", box=SIMPLE)
    for table, columns in (
        (takes, ("kB", "Mop", "registers", "shared kB", "occupancy", "spills")),
        (bounds, [row["gpu"] for row in next(iter(kernels.values()))]),
    ):
        table.add_column("kernel", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
    for name, rows in kernels.items():
        launches = [launch for row in rows for launch in row["launches"].values()]
        takes.add_row(
            name,
            f"{rows[0]['bytes'] / 1e3:,.0f}",
            f"{sum(rows[0]['operations'].values()) / 1e6:,.1f}",
            str(max(launch["registers"] for launch in launches)),
            f"{max(launch['shared_memory'] for launch in launches) / 1e3:.1f}",
            f"{min(launch['occupancy'] for launch in launches):.0%}",
            str(max(launch["spills"] for launch in launches)),
        )
        dense = [row["dense_bound_seconds"] for row in rows]
        bounds.add_row(
            name,
            *(
                f"{1e6 * row['bound_seconds']:.1f}" + (f" ({1e6 * other:.1f})" if other else "")
                for row, other in zip(rows, dense, strict=True)
            ),
        )
    for table in (takes, bounds):
        print_table(table)
