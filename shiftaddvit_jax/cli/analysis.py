"""Commands that report what a model computes and costs."""

import argparse
import dataclasses
from pathlib import Path

from shiftaddvit_jax.cli.arguments import (
    Commands,
    add_command,
    add_images,
    add_json,
    add_precision,
    add_shift_share,
    add_subject,
    present,
    print_machine,
    print_shift_share,
)
from shiftaddvit_jax.command import print_table
from shiftaddvit_jax.files import check_parent
from shiftaddvit_jax.names import (
    ATTENTION_KINDS,
    IMPLEMENTATIONS,
    LAYER_CHOICES,
    NUMBER_FORMATS,
    PAPER_MODELS,
    PICTURES,
)
from shiftaddvit_jax.optional import require
from shiftaddvit_jax.validation import check_choice


def add_report(commands: Commands) -> None:
    """Add ``report``."""
    description = "What a model computes and what energy that takes, module by module."
    command = add_command(
        commands,
        "report",
        report,
        description,
        "report runs/demo/moe --compare runs/demo/dense",
        "report pvt_v2_b0 --attention hamming_linear --mlp moe --compare msa --json report.json",
        "report --savings",
    )
    add_subject(command, nargs="?")
    command.add_argument("--batch", type=int, default=1, metavar="N", help="images (default: %(default)s)")
    command.add_argument(
        "--number-format",
        choices=NUMBER_FORMATS,
        help="for energies; default: those the model computes in",
    )
    add_shift_share(command)
    command.add_argument(
        "--compare",
        metavar="OTHER",
        help="a checkpoint, a model's name, or a kind of attention: the same model, dense, with that",
    )
    command.add_argument(
        "--savings",
        action="store_true",
        help=f"instead of a model: what ShiftAddViT saves on {', '.join(PAPER_MODELS)}",
    )
    command.add_argument("--html", metavar="FILE", help="write one page there with all of it, and pictures")
    add_images(command)
    add_json(command)


def report(arguments: argparse.Namespace) -> None:
    """What a model computes, and what that costs in energy."""
    from shiftaddvit_jax.costs import cost_report, energy_savings
    from shiftaddvit_jax.progress import track
    from shiftaddvit_jax.subject import distinct_names, example_pixels

    if (arguments.model is None) != arguments.savings:
        raise ValueError(
            "give a checkpoint's folder or a model's name, or --savings; `shiftaddvit models` lists the names"
        )
    if arguments.html and arguments.savings:
        raise ValueError("--html is a page about one model; leave out --savings")
    if arguments.html:
        check_parent(arguments.html)
        require("plot", "drawing")
    if arguments.savings:
        rows = energy_savings(
            PAPER_MODELS,
            arguments.shift_share,
            lambda names: track(names, "tracing models", len(PAPER_MODELS)),
        )
        present(arguments, rows, lambda: _print_savings(rows, arguments.shift_share))
        return
    settings = {
        "shift_share": arguments.shift_share,
        "batch": arguments.batch,
        "number_format": arguments.number_format,
    }
    subject = _reported_subject(arguments)
    subjects = [subject]
    found = cost_report(subject.model, subject.variables, **settings)
    if arguments.compare:
        subjects = distinct_names([_compared_subject(arguments.compare, subject), subject])
        found["compare"] = cost_report(subjects[0].model, subjects[0].variables, **settings)
    if arguments.html:
        reports = [*filter(None, [found.get("compare")]), found]
        has_images = arguments.images or subject.data
        pixels = example_pixels(subject, 2, arguments.images) if has_images else None
        from shiftaddvit_jax.pictures.page import write_page

        write_page(arguments.html, subjects, reports, pixels)
    present(arguments, found, lambda: _print_costs(found, arguments))


def _print_costs(found, arguments):
    reports = [found]
    _print_report(found)
    if "compare" in found:
        reports.append(found["compare"])
        _print_comparison(*reports)
    mixtures = any(report["shift_share"] is not None for report in reports)
    _print_assumptions(arguments.shift_share if mixtures else None)
    if arguments.html:
        print(f"The page is in {arguments.html}")


def add_plot(commands: Commands) -> None:
    """Add ``plot``."""
    command = add_command(
        commands,
        "plot",
        plot,
        "Draw what a trained model does, or what it costs beside others.",
        "plot routing runs/demo/moe --output routing.png",
        "plot pareto runs/demo/dense runs/demo/shift runs/demo/moe --output pareto.svg",
    )
    command.add_argument("kind", metavar="KIND", help=", ".join(PICTURES))
    command.add_argument(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="of checkpoints or runs, such as runs/demo/moe; costs are compared with the first one's",
    )
    add_images(command)
    command.add_argument("--output", required=True, metavar="FILE", help="a PNG or SVG")


def plot(arguments: argparse.Namespace) -> None:
    """One picture of trained models."""
    from shiftaddvit_jax.pictures import gallery
    from shiftaddvit_jax.pictures.style import check_picture
    from shiftaddvit_jax.subject import distinct_names, example_pixels, load_subject

    if arguments.kind not in PICTURES:
        raise ValueError(f"unknown picture {arguments.kind!r}; known: {', '.join(PICTURES)}")
    check_picture(arguments.output)
    subjects = distinct_names([load_subject(folder) for folder in arguments.folders])
    picture = gallery.PICTURES[arguments.kind]
    pixels = example_pixels(subjects[0], 10, arguments.images) if picture.sees_images else None
    gallery.draw_picture(arguments.kind, subjects, pixels, arguments.output)
    print(f"{picture.caption} Written to {arguments.output}")


def add_measure_latency(commands: Commands) -> None:
    """Add ``measure-latency``."""
    description = (
        "Time both experts of each mixture here, for a balancing loss that follows them; or all choices."
    )
    command = add_command(
        commands,
        "measure-latency",
        measure_experts,
        description,
        "measure-latency runs/demo/moe --json latencies.json",
        "measure-latency runs/demo/dense --choices --json choices.json",
        "measure-latency pvt_v2_b0 --attention hamming_linear --mlp moe --activations int8",
    )
    add_subject(command)
    command.add_argument(
        "--choices",
        action="store_true",
        help="time every linear layer as each of what it may be, for `search --latencies`",
    )
    command.add_argument(
        "--activations",
        choices=("float", "int8"),
        default="float",
        help="of shift experts; default: %(default)s",
    )
    add_precision(command)
    command.add_argument(
        "--implementation", choices=IMPLEMENTATIONS, help="default: the kernels where they run"
    )
    command.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time (default: 1)")
    command.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="turns of each expert; default: %(default)s"
    )
    command.add_argument("--plot", metavar="FILE", help="draw them there, as PNG or SVG")
    add_json(command)


def measure_experts(arguments: argparse.Namespace) -> None:
    """Latencies of the experts of a model's mixtures."""
    from shiftaddvit_jax.bench import measure_choices, measure_latency

    if arguments.choices and arguments.plot:
        raise ValueError("--plot draws experts; leave it out with --choices")
    if arguments.plot:
        from shiftaddvit_jax.pictures.style import check_picture

        check_picture(arguments.plot)
    subject = _reported_subject(arguments)
    names = ("implementation", "activations", "precision")
    settings = {name: getattr(arguments, name) for name in names}
    primitives = dataclasses.replace(subject.model.primitives, **settings)
    subject = dataclasses.replace(subject, model=subject.model.clone(primitives=primitives))
    if arguments.choices:
        found = measure_choices(
            subject.model, subject.variables, batch=arguments.batch, rounds=arguments.rounds
        )
        present(arguments, found, lambda: _print_choices(found))
        return
    model, variables = (
        (subject.model, subject.variables) if arguments.implementation == "xla" else subject.for_inference()
    )
    found = measure_latency(model, variables, batch=arguments.batch, rounds=arguments.rounds)
    if arguments.plot:
        from shiftaddvit_jax.pictures import plot_expert_latency

        plot_expert_latency(found, arguments.plot)
    present(arguments, found, lambda: _print_experts(found))


def _print_choices(found):
    from rich.table import Table

    title = f"Layers of {found['model']['name']}, {found['batch']} x {found['model']['image_size']} px"
    table = Table(title=f"{title}; median µs by what they are")
    table.add_column("layer")
    for column in ("tokens", *LAYER_CHOICES):
        table.add_column(column, justify="right")
    for layer in found["layers"]:
        times = (f"{1e3 * layer['choices'][choice]:,.1f}" for choice in LAYER_CHOICES)
        table.add_row(layer["name"], str(layer["tokens"]), *times)
    print_table(table)
    print_machine(found["machine"])
    print(f"The rest of the dense model takes {found['rest']:.3f} ms.")
    print("To search with these: search --latencies FILE, of --json FILE.")


def _print_experts(found):
    from rich.table import Table

    title = f"Experts of {found['model']['name']}, {found['batch']} x {found['model']['image_size']} px"
    table = Table(title=f"{title}; median µs, and their line for n tokens")
    for column in ("layer", "tokens", "dense", "line", "shift", "line", "ratio"):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for layer in found["layers"]:
        dense_ms, shift_ms = layer["latencies"]
        lines = [
            f"{1e3 * layer[expert]['base_ms']:.1f} {layer[expert]['us_per_token']:+.3f} n"
            for expert in ("dense", "shift")
        ]
        times = (f"{1e3 * dense_ms:,.1f}", lines[0], f"{1e3 * shift_ms:,.1f}", lines[1])
        table.add_row(layer["name"], str(layer["tokens"]), *times, f"{dense_ms / shift_ms:.2f}")
    print_table(table)
    print_machine(found["machine"])
    print("Ratio: dense over shift. To train with these: --config.train.latencies=FILE, of --json FILE.")


def _reported_subject(arguments):
    """The model of ``report``: a checkpoint as it is, or any model with random weights."""
    from shiftaddvit_jax.models.kinds import parse_kinds

    changes = {
        name: parse_kinds(getattr(arguments, name))
        for name in ("attention", "mlp", "projections")
        if getattr(arguments, name)
    }
    if arguments.image_size:
        changes["image_size"] = arguments.image_size
    subject = _subject(arguments.model)
    return _changed(subject, changes) if changes else subject


def _compared_subject(name, subject):
    if name not in ATTENTION_KINDS:
        return _subject(name)
    return _changed(subject, {"attention": name, "mlp": "dense", "projections": "dense"})


def _changed(subject, changes):
    """The subject's model with ``changes`` and random weights: no longer the trained one."""
    from shiftaddvit_jax.bench.synthetic import random_variables
    from shiftaddvit_jax.models import create_model, model_arguments
    from shiftaddvit_jax.subject import Subject

    model = create_model(**model_arguments(subject.model) | changes)
    kinds = dict.fromkeys([*model.attention, *model.mlp, *model.projections])
    return Subject(f"{model.variant} ({', '.join(kinds)})", model, random_variables(model), is_trained=False)


def _subject(name):
    from shiftaddvit_jax.bench.synthetic import random_variables
    from shiftaddvit_jax.models import create_model, list_models
    from shiftaddvit_jax.subject import Subject, load_subject

    if Path(name).is_dir():
        return load_subject(name)
    check_choice("checkpoint or model", name, [*list_models(), *list_models("novel_views")])
    model = create_model(name)
    return Subject(name, model, random_variables(model), is_trained=False)


def _report_title(report):
    model = report["model"]
    kinds = [model[name] for name in ("attention", "mlp", "projections")]
    kinds = ["/".join(dict.fromkeys(kind)) for kind in kinds]
    if model["layers"]:
        kinds.append(f"{len(model['layers'])} layers of their own")
    unit = f"x {model['image_size']} px" if "image_size" in model else "rays"
    return f"{model['name']}, {', '.join(kinds)}, {report['batch']} {unit}"


def _print_report(report):
    from rich.table import Table

    from shiftaddvit_jax.costs import group_modules
    from shiftaddvit_jax.costs.counting import PRIMITIVES
    from shiftaddvit_jax.costs.report import ENERGY_MODELS

    operations = [name for name in PRIMITIVES if report[name]]
    energies = [name for name in ENERGY_MODELS if name in report["energy_mj"]]
    table = Table(title=f"{_report_title(report)}; energies in mJ")
    table.add_column("module", no_wrap=True)
    for column in [*(f"{name} (M)" for name in operations), *energies, "weights (kB)"]:
        table.add_column(column, justify="right")
    groups = group_modules(report["modules"])
    for name, costs in {**groups, "total": report}.items():
        if not any(costs[operation] for operation in operations):
            continue
        if name == "total":
            table.add_section()
        table.add_row(
            name,
            *(f"{costs[operation] / 1e6:,.1f}" if costs[operation] else "" for operation in operations),
            *(f"{costs['energy_mj'][model]:,.3f}" for model in energies),
            f"{costs['weight_bytes'] / 1e3:,.1f}",
        )
    print_table(table)


def _print_comparison(report, other):
    from rich.table import Table

    from shiftaddvit_jax.costs.counting import PRIMITIVES
    from shiftaddvit_jax.costs.report import ENERGY_MODELS

    rows = [(f"{name} (M)", report[name] / 1e6, other[name] / 1e6) for name in PRIMITIVES]
    for name in ENERGY_MODELS:
        if name in report["energy_mj"]:
            energies = [found["energy_mj"][name] for found in (report, other)]
            rows.append((f"energy, {name} (mJ)", *energies))
    rows.append(("accelerator latency (ms)", report["latency_ms"], other["latency_ms"]))
    for name in ("weight", "activation"):
        rows.append((f"{name}s (kB)", *(found[f"{name}_bytes"] / 1e3 for found in (report, other))))
    table = Table(title="Comparison")
    table.add_column("", no_wrap=True)
    for column in (_report_title(report), _report_title(other), "saved"):
        table.add_column(column, justify="right")
    for name, ours, theirs in rows:
        if ours or theirs:
            table.add_row(
                name, f"{ours:,.3f}", f"{theirs:,.3f}", f"{1 - ours / theirs:.1%}" if theirs else ""
            )
    print_table(table)


def _print_savings(rows, shift_share):
    from rich.table import Table

    from shiftaddvit_jax.costs.report import ENERGY_MODELS

    table = Table(title="Energy that ShiftAddViT (hamming_linear, moe) saves of msa and sra, at 224 px")
    table.add_column("model", no_wrap=True)
    for dense in ("msa", "sra"):
        for name in ENERGY_MODELS:
            table.add_column(f"{dense}: {name}", justify="right")
    for row in rows:
        ours = row["energy_mj"]["shiftaddvit"]
        saved = [
            f"{1 - ours[name] / row['energy_mj'][dense][name]:.1%}" if dense in row["energy_mj"] else "-"
            for dense in ("msa", "sra")
            for name in ENERGY_MODELS
        ]
        table.add_row(row["name"], *saved)
    print_table(table)
    _print_assumptions(shift_share)


def _print_assumptions(shift_share):
    print("Energy: compute is arithmetic alone; accelerator and authors are two models with data movement.")
    print_shift_share(shift_share)
