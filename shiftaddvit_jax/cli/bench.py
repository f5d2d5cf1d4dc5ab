"""The command that times models and kernels beside others."""

import argparse
from typing import Any

from shiftaddvit_jax.cli.arguments import (
    Commands,
    add_command,
    add_json,
    add_kinds,
    add_shift_share,
    present,
    print_machine,
    print_shift_share,
    shorten,
)
from shiftaddvit_jax.command import print_table
from shiftaddvit_jax.names import IMPLEMENTATIONS, PEERS


def add_bench(commands: Commands) -> None:
    """Add ``bench``."""
    description = "Time a ShiftAddViT beside its dense model, in JAX and in other runtimes, or the kernels."
    command = add_command(
        commands,
        "bench",
        bench,
        description,
        "bench pvt_v2_b0 --activations int8",
        "bench pvt_v2_b0 --peers onnxruntime,openvino --json bench.json",
        "bench pvt_v2_b0 --kernels",
        "bench --kernels",
    )
    command.add_argument("model", nargs="?", metavar="MODEL", help="one of those of `shiftaddvit models`")
    command.add_argument(
        "--device",
        choices=("cpu", "gpu"),
        default="cpu",
        help="where; default: %(default)s; a GPU takes neither --peers, --threads nor --implementation",
    )
    command.add_argument(
        "--kernels",
        action="store_true",
        help="every kernel instead of a model; or MODEL's own kernels, beside what is possible here",
    )
    add_kinds(command)
    add_shift_share(command)
    command.add_argument(
        "--implementation",
        action="append",
        choices=IMPLEMENTATIONS,
        help="may be repeated; default: tvm and xla",
    )
    command.add_argument(
        "--batch", type=int, default=1, metavar="N", help="images or rays at a time (default: 1)"
    )
    command.add_argument(
        "--peers",
        default="",
        metavar="NAMES",
        help=f"other runtimes, separated by commas: {', '.join(PEERS)}; or all that have the model",
    )
    command.add_argument("--threads", type=int, metavar="N", help="default: as many as there are cores")
    command.add_argument(
        "--rounds", type=int, default=10, metavar="N", help="turns of each contestant; default: %(default)s"
    )
    command.add_argument("--plot", metavar="FILE", help="draw them there, as PNG or SVG")
    add_json(command)


def bench(arguments: argparse.Namespace) -> None:
    """How long models, or kernels, take here beside others."""
    from shiftaddvit_jax.bench.models import bench_kernels, bench_model, bench_model_kernels
    from shiftaddvit_jax.bench.rounds import available_threads
    from shiftaddvit_jax.models.kinds import parse_kinds

    if arguments.model is None and not arguments.kernels:
        raise ValueError("give a model's name, or --kernels; `shiftaddvit models` lists the names")
    _check_options(arguments)
    threads = available_threads() if arguments.threads is None else arguments.threads
    settings = {"threads": threads, "rounds": arguments.rounds}
    if arguments.plot:
        from shiftaddvit_jax.pictures.style import check_picture

        check_picture(arguments.plot)
    model: dict[str, Any] = {
        name: parse_kinds(getattr(arguments, name)) for name in ("attention", "mlp", "projections")
    }
    model |= {
        name: getattr(arguments, name)
        for name in ("batch", "image_size", "activations", "precision", "shift_share")
    }
    show = _print_bench
    if arguments.device == "gpu":
        from shiftaddvit_jax.bench.gpu import bench_gpu_kernels, bench_gpu_model

        if arguments.kernels:
            report = bench_gpu_kernels(arguments.rounds)
        else:
            report = bench_gpu_model(arguments.model, rounds=arguments.rounds, **model)
    elif arguments.kernels and arguments.model is None:
        report = bench_kernels(**settings)
    elif arguments.kernels:
        if not isinstance(arguments.shift_share, float):
            raise ValueError("--shift-share is one number for the kernels of a model")
        report, show = bench_model_kernels(arguments.model, **settings, **model), _print_model_kernels
    else:
        report = bench_model(
            arguments.model,
            **settings,
            **model,
            implementations=arguments.implementation or ("tvm", "xla"),
            peers=_peers(arguments),
        )
    if arguments.plot:
        from shiftaddvit_jax.pictures import plot_bench

        plot_bench(report, arguments.plot)
    present(arguments, report, lambda: show(report))


def _check_options(arguments):
    """Raise a ``ValueError`` about options that what is timed has no use for."""
    if arguments.kernels and arguments.model and (arguments.plot or arguments.device == "gpu"):
        raise ValueError("the kernels of a model have neither --plot nor --device gpu; leave it out")
    cases = (
        (arguments.kernels, "--kernels", ("implementation", "peers")),
        (arguments.device == "gpu", "--device gpu", ("implementation", "peers", "threads")),
    )
    for holds, case, unused in cases:
        given = [f"--{name}" for name in unused if getattr(arguments, name)]
        if holds and given:
            raise ValueError(f"{case} has no use for {' and '.join(given)}; leave it out")


def _print_model_kernels(report):
    from rich.table import Table

    from shiftaddvit_jax.bench.models import subject_of

    total = sum(row["calls"] * row["median_ms"] for row in report["kernels"])
    table = Table(title=f"Kernels of {subject_of(report)}; all calls together {total:.2f} ms")
    table.add_column("kernel", no_wrap=True)
    for column in ("calls", "ms", "share", "MMAC", "kB", "bound", "by", "reached"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in report["kernels"]:
        table.add_row(
            row["name"],
            str(row["calls"]),
            f"{row['median_ms']:.3f}",
            f"{row['calls'] * row['median_ms'] / total:.0%}",
            f"{sum(row['products'].values()) / 1e6:.1f}",
            f"{row['bytes'] / 1e3:,.0f}",
            f"{row['bound_ms']:.3f}",
            row["bound_by"],
            f"{row['of_bound']:.0%}",
        )
    print_table(table)
    peaks = {name: rate / 1e9 for name, rate in report["peaks"].items()}
    print("All but the shares are of one call; bounds in ms, by this machine's peaks, a second:")
    print(
        f"{peaks['float32']:.0f} GMAC in float32, {peaks['int8']:.0f} GMAC in int8, "
        f"{peaks['memory']:.1f} GB from and to memory."
    )
    print_machine(report["machine"])


def _peers(arguments):
    if arguments.peers == "all":
        return [peer for peer in PEERS if peer != "torch" or arguments.model.startswith("pvt_v2")]
    return [peer for peer in arguments.peers.split(",") if peer]


def _print_bench(report):
    from rich.table import Table

    from shiftaddvit_jax.bench.models import subject_of

    kernels = "model" not in report
    if kernels:
        title, unit, scale, digits = "Kernels; ratios are to XLA's dense float32", "µs", 1e3, 1
    else:
        references = [row.get("reference") for row in report["rows"]]
        title = f"{subject_of(report)}; ratios are to {next(filter(None, references), 'none')}"
        unit, scale, digits = "ms", 1, 2
    table = Table(title=title)
    table.add_column("contestant", no_wrap=True)
    last = ("Gop/s",) if kernels else (f"{report.get('unit', 'image')}s/s", "numbers")
    for column in (f"median ({unit})", f"10 to 90 % ({unit})", "ratio", *last):
        table.add_column(column, justify="right", no_wrap=True)
    refused = {}
    for row in report["rows"]:
        if "refused" in row:
            refused.setdefault(row["refused"], []).append(row["name"])
            continue
        median, low, high = (f"{scale * row[key]:,.{digits}f}" for key in ("median_ms", "p10_ms", "p90_ms"))
        share = f"{row['ratio']:.2f}" if "ratio" in row else ""
        if kernels:
            rates = (f"{row['giga_operations_a_second']:,.0f}",)
        else:
            rates = (f"{1e3 * report['batch'] / row['median_ms']:,.3g}", row["precision"])
        table.add_row(row["name"], median, f"{low} to {high}", share, *rates)
    print_table(table)
    for kind, rival in report.get("best_rivals", {}).items():
        reference = next(row["reference"] for row in report["rows"] if row["name"] == rival["name"])
        print(f"best rival with {kind}: {rival['name']}, {rival['ratio']:.2f} times as long as {reference}")
    for message, names in refused.items():
        print(f"not run: {shorten(names)}: {message}")
    if not kernels:
        print_shift_share(report["shift_share"])
    print_machine(report["machine"])
    print(", ".join(f"{package} {version}" for package, version in report["versions"].items()))
