"""The command that sets models side by side: finished runs by their summaries, or two models on images."""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiftaddvit_jax.cli.arguments import (
    Commands,
    add_command,
    add_json,
    model_notes,
    open_folder,
    open_test_set,
    present,
    print_notes,
    shorten,
)
from shiftaddvit_jax.command import print_table
from shiftaddvit_jax.names import SOURCES

if TYPE_CHECKING:
    from shiftaddvit_jax.classifier import Classifier
    from shiftaddvit_jax.compare import Comparison
    from shiftaddvit_jax.data import Examples

SHOWN = 5  # of the worst images, in the table
NEEDS_DATA = ("path", "count", "model", "no_layers", "no_times", "worst")  # options of a comparison on images


def add_compare(commands: Commands) -> None:
    """Add ``compare``."""
    command = add_command(
        commands,
        "compare",
        compare,
        "Finished runs side by side: accuracy, speed, configs; or two checkpoints on the same images.",
        "compare runs/demo/dense runs/demo/moe",
        "compare runs/demo/dense runs/demo/moe --data digits --worst worst.png",
    )
    command.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="a finished run's workdir, or its summary.json; with --data, two models from anywhere: what "
        "`shiftaddvit info` takes",
    )
    command.add_argument(
        "--data",
        metavar="DIR_OR_DATA",
        help="compare two models on these images: a folder of them without labels, or a data source's "
        f"held-out ones: {', '.join(SOURCES)}",
    )
    command.add_argument("--path", default="", metavar="DIR", help="where the data source's images lie")
    command.add_argument("--count", type=int, metavar="N", help="images to take, evenly; default: all")
    command.add_argument(
        "--model", metavar="NAME", help="whose weights a file has, where nothing beside it tells"
    )
    command.add_argument("--no-layers", action="store_true", help="leave layers out")
    command.add_argument("--no-times", action="store_true", help="leave times out")
    command.add_argument(
        "--worst", metavar="FILE", help="draw the images that differ most there, as PNG or SVG"
    )
    add_json(command)


def compare(arguments: argparse.Namespace) -> None:
    """Finished runs, or two models on images, side by side."""
    if arguments.data is not None:
        _compare_models(arguments)
        return
    values = {name: getattr(arguments, name) for name in NEEDS_DATA}
    given = [
        f"--{name.replace('_', '-')}"
        for name, value in values.items()
        if value is not False and value not in (None, "")
    ]
    if given:
        raise ValueError(f"{', '.join(given)}: only with --data, which says the images to compare models on")
    _compare_runs(arguments)


def _compare_models(arguments):
    from shiftaddvit_jax.checkpoints.source import our_folder
    from shiftaddvit_jax.classifier import from_pretrained
    from shiftaddvit_jax.compare import ROUNDS, check_classes, compare

    if len(arguments.runs) != 2:
        raise ValueError(
            f"--data compares two models, got {len(arguments.runs)}: {shorten(arguments.runs)}; name two, or "
            "leave out --data to compare finished runs"
        )
    if arguments.count is not None and arguments.count < 1:
        raise ValueError(f"--count must be at least 1, got {arguments.count}")
    if arguments.worst:
        from shiftaddvit_jax.pictures.style import check_picture

        check_picture(arguments.worst)
    names = (None if our_folder(source) else arguments.model for source in arguments.runs)
    first, second = (
        from_pretrained(source, model=name) for source, name in zip(arguments.runs, names, strict=True)
    )
    check_classes(first, second)
    examples, labelled, note = _open_images(arguments, (first, second))
    print_notes(filter(None, (*model_notes((first, second), arguments.runs), note)))
    rounds = 0 if arguments.no_times else ROUNDS
    found = compare(first, second, examples, labelled=labelled, layers=not arguments.no_layers, rounds=rounds)
    if arguments.worst:
        _draw_worst(found, examples, first, arguments.worst)

    def show():
        _print_comparison(found, arguments.runs)
        if arguments.worst:
            print(f"The images that differ most are in {arguments.worst}")

    present(arguments, _as_json(found, arguments.runs), show)


def _open_images(
    arguments: argparse.Namespace, models: Sequence["Classifier"]
) -> tuple["Examples", bool, str | None]:
    """The images, whether their labels are the models' classes, and a note on that."""
    if arguments.data in SOURCES:
        examples, labelled, note = open_test_set(arguments.data, arguments.path, arguments.runs, models)
        note = note if labelled else f"no top-1: {note}"
    else:
        if arguments.path:
            raise ValueError(f"--path is a data source's; give one with --data: {', '.join(SOURCES)}")
        examples, labelled, note = open_folder("--data", arguments.data), False, None
    return examples.evenly(arguments.count or len(examples)), labelled, note


def _draw_worst(found, examples, model, path):
    from shiftaddvit_jax.data.preprocessing import crop
    from shiftaddvit_jax.pictures import plot_worst

    pixels = [crop(examples[image.index]["image"], model.preprocessing) for image in found.worst]
    plot_worst(pixels, found.worst, path)


def _as_json(found: "Comparison", names: Sequence[str]) -> dict[str, Any]:
    """The figures as values of JSON."""
    from shiftaddvit_jax.bench.rounds import describe_timing

    return {
        "models": [
            {
                "source": name,
                "top1": found.top1 and found.top1[index],
                **found.sizes[index]._asdict(),
                "median_ms": found.times and found.times.medians[index],
            }
            for index, name in enumerate(names)
        ],
        "images": found.images,
        "agreement": found.agreement,
        "logits": found.logits._asdict(),
        "time_ratio": found.times and found.times.ratio,
        **(describe_timing() if found.times else {}),
        "layers": dict(found.layers),
        "worst": [
            image._asdict() | {"answers": [answer._asdict() for answer in image.answers]}
            for image in found.worst
        ],
    }


def _print_comparison(found: "Comparison", names: Sequence[str]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    for letter, name in zip("AB", names, strict=True):
        print(f"{letter}: {name}")
    table = Table(box=box.SIMPLE)
    table.add_column(f"{found.images:,} image{'s' * (found.images != 1)}")
    for name in ("A", "B", "B / A"):
        table.add_column(name, justify="right")
    for row in _rows(found):
        table.add_row(*row)
    print_table(table)
    if found.layers:
        layers = Table(box=box.SIMPLE)
        layers.add_column("layer")
        layers.add_column("signal to noise, dB", justify="right")
        for name, decibels in found.layers.items():
            layers.add_row(Text(name), _decibels(decibels))
        print_table(layers)
    worst = Table(box=box.SIMPLE)
    worst.add_column("images that differ most")
    worst.add_column("logits' error", justify="right")
    for name in ("class", "A", "B"):
        worst.add_column(name)
    for image in found.worst[:SHOWN]:
        answers = (Text(f"{answer.label} {answer.probability:.1%}") for answer in image.answers)
        worst.add_row(Text(image.name), f"{image.error:.4g}", Text(image.label or "-"), *answers)
    print_table(worst)


def _rows(found):
    """The rows of the first table: a figure's name, A's, B's, and their ratio."""
    if found.top1:
        yield "top-1", *(f"{share:.2%}" for share in found.top1), ""
    yield "same answer as A", "", f"{found.agreement:.2%}", ""
    yield "logits, signal to noise in dB", "", _decibels(found.logits.decibels), ""
    for name in ("mean", "percentile_99", "largest"):
        words = "99th percentile" if name == "percentile_99" else name
        yield f"logits, {words} error", "", f"{getattr(found.logits, name):.4g}", ""
    counts = {
        "parameters": "parameters",
        "parameter_bytes": "bytes of parameters",
        "stored_bytes": "bytes on disk",
    }
    for name, words in counts.items():
        a, b = (getattr(size, name) for size in found.sizes)
        if a and b:
            yield words, f"{a:,}", f"{b:,}", f"{b / a:.3f}"
    if found.times:
        yield "ms an image", *(f"{ms:.2f}" for ms in found.times.medians), f"{found.times.ratio:.3f}"


def _decibels(value):
    """Decibels; what does not differ at all is exact, and what does not vary has none."""
    return f"{value:.1f}" if math.isfinite(value) else ("exact" if value == math.inf else "-")


def _compare_runs(arguments):
    from shiftaddvit_jax.train.summary import compare_runs, read_summary

    rows = compare_runs({name: read_summary(run) for name, run in _run_names(arguments.runs).items()})
    present(arguments, rows, lambda: _print_runs(rows))


def _print_runs(rows):
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    table.add_column("run")
    for name in _FIGURES:
        table.add_column(name, justify="right")
    for row in rows:
        cells = [("-" if row[key] is None else show(row[key])) for key, show in _FIGURES.values()]
        table.add_row(Text(row["run"]), *cells)
    print_table(table)
    differences = Table(box=box.SIMPLE)
    for name in ("differs", "value", "in"):
        differences.add_column(name)
    for key in rows[0]["config"]:
        values: dict[str, list[str]] = {}
        for row in rows:
            value = row["config"][key]
            values.setdefault("-" if value is None else json.dumps(value), []).append(row["run"])
        for index, (value, runs) in enumerate(values.items()):
            differences.add_row(*map(Text, ("" if index else key, value, ", ".join(runs))))
    if differences.rows:
        print_table(differences)
    for row in rows:
        if row["note"]:
            print(f"note: {row['run']} is not of the data of {rows[0]['run']}: {row['note']}")


_FIGURES: dict[str, tuple[str, Callable[[float], str]]] = {
    "steps": ("steps", "{:,}".format),
    "top-1": ("top1", "{:.2%}".format),
    "top-5": ("top5", "{:.2%}".format),
    "loss": ("loss", "{:.4f}".format),
    "EMA top-1": ("ema_top1", "{:.2%}".format),
    "parameters": ("parameters", "{:,}".format),
    "images/s": ("images_per_second", "{:,.0f}".format),
    "on shift": ("shift_share", "{:.1%}".format),
    "best step": ("best_step", "{:,}".format),
}


def _run_names(runs: Sequence[str]) -> dict[str, str]:
    """``runs`` by their folders' names; by what was typed where these are not all different."""
    folders = [Path(run).absolute() for run in runs]
    names = [folder.parent.name if folder.is_file() else folder.name for folder in folders]
    if len(set(names)) < len(names):
        names = runs
    if len(set(names)) < len(names):
        raise ValueError(f"a run is named twice: {', '.join(runs)}; name each once")
    return dict(zip(names, runs, strict=True))
