"""Commands about the TVM kernels of a model."""

import argparse
import time
from pathlib import Path
from typing import Any

from kernels_tvm.gpu.targets import GPU_TARGETS, gpu_target
from shiftaddvit_jax.cli.arguments import Commands, add_command, add_json, add_kinds, present
from shiftaddvit_jax.command import print_table
from shiftaddvit_jax.optional import require


def add_compile(commands: Commands) -> None:
    """Add ``compile``."""
    description = (
        "Compile a model's TVM kernels into the cache, ahead of its use, or for a GPU into a folder."
    )
    command = add_command(
        commands,
        "compile",
        compile_model,
        description,
        "compile pvt_v2_b0 --activations int8",
        "compile pvt_v2_b0 --target sm_86 --output kernels",
    )
    command.add_argument("model", metavar="MODEL", help="one of those of `shiftaddvit models`")
    add_kinds(command)
    targets = ", ".join(target.name for target in GPU_TARGETS)
    command.add_argument("--target", metavar="GPU", help=f"instead of this CPU: {targets}")
    command.add_argument("--output", metavar="DIR", help="where a GPU's libraries and manifest.json go")
    add_json(command)


def compile_model(arguments: argparse.Namespace) -> None:
    """A model's kernels, compiled into the cache, or for a GPU into a folder."""
    from kernels_tvm.cpu.library import needed_target
    from kernels_tvm.store import cache_folder
    from shiftaddvit_jax.bench.rounds import describe_timing
    from shiftaddvit_jax.compile import compile_kernels, export_kernels, kernels_of

    if (arguments.target is None) != (arguments.output is None):
        raise ValueError("--target and --output come together: a GPU's libraries go to a folder")
    target = gpu_target(arguments.target) if arguments.target else None
    model = _kernel_model(arguments)
    start = time.perf_counter()
    if target:
        manifest = export_kernels(model, target, Path(arguments.output))
        seconds = time.perf_counter() - start
        said = f"{len(manifest['kernels'])} kernels for {target.name} in {seconds:.1f} s: {arguments.output}"
        figures = {"output": arguments.output, **manifest, "seconds": seconds}
        present(arguments, describe_timing() | figures, lambda: print(said))
        return
    kernels = kernels_of(model)
    traced = time.perf_counter() - start
    compile_kernels(kernels)
    seconds = time.perf_counter() - start - traced
    figures = {
        **describe_timing(),
        "output": str(cache_folder()),
        "target": needed_target().name,
        "kernels": [kernel.name for kernel in kernels],
        "seconds": seconds,
        "tracing_seconds": traced,
    }
    found = f"{len(kernels)} kernels for {figures['target']} in {seconds:.2f} s"
    said = f"{found}, after {traced:.2f} s to trace the model; kept in {figures['output']}"
    present(arguments, figures, lambda: print(said))


def add_tune(commands: Commands) -> None:
    """Add ``tune``."""
    description = "Measure which tile sizes suit a model's TVM kernels here, and keep them (minutes)."
    command = add_command(
        commands, "tune", tune_model, description, "tune pvt_v2_b0", "tune pvt_v2_b0 --activations int8"
    )
    command.add_argument("model", metavar="MODEL", help="one of those of `shiftaddvit models`")
    add_kinds(command)
    command.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time (default: 1)")
    add_json(command)


def tune_model(arguments: argparse.Namespace) -> None:
    """Tile sizes for a model's kernels, measured here."""
    from kernels_tvm.cpu.library import needed_target, user_records
    from shiftaddvit_jax.bench.rounds import describe_timing
    from shiftaddvit_jax.compile import tune_kernels

    results = tune_kernels(_kernel_model(arguments), arguments.batch)
    target = needed_target()
    figures = {
        **describe_timing(),
        "model": arguments.model,
        "target": target.name,
        "records": str(user_records(target)),
        "kernels": [
            {"name": kernel.name, "before_ms": 1e3 * before, "after_ms": 1e3 * after, "changed": facts}
            for kernel, facts, before, after in results
        ],
    }
    present(arguments, figures, lambda: _print_tuned(figures))


def _print_tuned(figures):
    from rich.table import Table

    table = Table(title=f"Kernels of {figures['model']} on {figures['target']}")
    for column in ("kernel", "before (ms)", "after (ms)", "changed"):
        table.add_column(column, justify="right" if "ms" in column else "left")
    for row in figures["kernels"]:
        changed = ", ".join(f"{name} {value}" for name, value in row["changed"].items()) or "nothing"
        table.add_row(row["name"], f"{row['before_ms']:.3f}", f"{row['after_ms']:.3f}", changed)
    print_table(table)
    print(f"written to {figures['records']}")


def add_gpu_report(commands: Commands) -> None:
    """Add ``gpu-report``."""
    description = "What the GPU kernels move, take and can reach at most, said by nvcc without a GPU."
    command = add_command(
        commands, "gpu-report", gpu_report, description, "gpu-report", "gpu-report --json report.json"
    )
    add_json(command)


def gpu_report(arguments: argparse.Namespace) -> None:
    """What the GPU kernels take and can reach, computed without a GPU."""
    require("tvm", "gpu-report, which compiles kernels,", "tvm")
    from shiftaddvit_jax.costs.gpu_bounds import static_report

    report = static_report()
    present(arguments, report, lambda: _print_gpu_report(report))


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
