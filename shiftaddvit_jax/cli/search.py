"""The command that searches which layer gets which primitive."""

import argparse
import math
import sys
from collections import Counter
from pathlib import Path

from shiftaddvit_jax.cli.arguments import (
    Commands,
    add_command,
    add_json,
    add_source,
    add_source_settings,
    present,
    source_settings,
)
from shiftaddvit_jax.cli.convert import add_examples, open_examples, read_evenly
from shiftaddvit_jax.command import print_table, program
from shiftaddvit_jax.files import write_json
from shiftaddvit_jax.names import GROUPS, LAYER_CHOICES, LOSSES, SOURCES

LEAST_RUNS = 64
LOSS_WORDS = {"error": "Error of the logits, % of their variance,", "cross_entropy": "Cross-entropy, nats,"}
CHOICES = "dense,shift_two_terms,moe,shift"


def add_search(commands: Commands) -> None:
    """Add ``search``."""
    command = add_command(
        commands,
        "search",
        search_choices,
        "Which layers of a dense model become shifts or mixtures, for the least loss within a budget.",
        "search runs/demo/dense --images digits --budget 10uJ --output found",
        "search runs/demo/dense --images digits --latencies choices.json --budget 2ms --json front.json",
    )
    add_source(command)
    add_source_settings(command)
    add_examples(command)
    command.add_argument(
        "--count",
        type=int,
        default=256,
        metavar="N",
        help="images to fit layers on, and as many others to measure the loss on (default: %(default)s)",
    )
    command.add_argument(
        "--loss",
        choices=LOSSES,
        default="error",
        help="the logits' squared error to the dense model's in percent of their variance, or the labels' "
        "cross-entropy in nats (default: %(default)s)",
    )
    command.add_argument(
        "--budget",
        required=True,
        metavar="COST",
        help="of the whole model: 6ms, or 120uJ without --latencies",
    )
    command.add_argument(
        "--latencies",
        metavar="FILE",
        help="of `measure-latency --choices --json FILE`; default: the accelerator's energy of the layers",
    )
    command.add_argument(
        "--groups",
        choices=GROUPS,
        default="block",
        help="layers that become the same together: a layer, a branch (an attention or an MLP), a block or a "
        "stage (default: %(default)s)",
    )
    command.add_argument(
        "--choices",
        default=CHOICES,
        metavar="KINDS",
        help=f"two or four of {', '.join(LAYER_CHOICES)} (default: %(default)s)",
    )
    command.add_argument(
        "--runs",
        type=int,
        metavar="N",
        help="configurations to measure, a power of two; default: as few as the groups take, at least "
        f"{LEAST_RUNS}",
    )
    command.add_argument(
        "--finetune-steps", type=int, default=0, metavar="N", help="ahead of each measurement (default: 0)"
    )
    command.add_argument(
        "--baselines",
        action="store_true",
        help="as many runs at random and on a greedy way, in the same table",
    )
    command.add_argument(
        "--confirm",
        type=int,
        default=3,
        metavar="N",
        help="of the best within the budget: converted as a whole, and measured (default: %(default)s)",
    )
    command.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")
    command.add_argument(
        "--output",
        metavar="DIR",
        help="where the confirmed configurations go, best first: 1.json, 2.json, ...; take them by "
        "`convert --layers`, `reparameterize --layers` or --config.model.layers",
    )
    command.add_argument("--plot", metavar="FILE", help="draw the front there, as PNG or SVG")
    add_json(command)


def search_choices(arguments: argparse.Namespace) -> None:
    """The front of loss against cost, and the best configurations within a budget."""
    from shiftaddvit_jax.calibrate.convert import check_dense
    from shiftaddvit_jax.checkpoints.source import open_source
    from shiftaddvit_jax.models.inspect import outputs_of
    from shiftaddvit_jax.models.variables import linear_layers
    from shiftaddvit_jax.search import (
        energy_costs,
        fewest_runs,
        group_layers,
        make_design,
        make_loss,
        make_run,
        parse_budget,
        read_costs,
        search,
    )
    from shiftaddvit_jax.search.run import BATCH
    from shiftaddvit_jax.validation import check_choice

    for name, least in (("count", 1), ("finetune_steps", 0), ("confirm", 0)):
        if getattr(arguments, name) < least:
            raise ValueError(
                f"--{name.replace('_', '-')} must be at least {least}, got {getattr(arguments, name)}"
            )
    choices = arguments.choices.replace(" ", "").split(",")
    for choice in choices:
        check_choice("choice", choice, LAYER_CHOICES)
    if len(set(choices)) < len(choices):
        raise ValueError(f"--choices names one twice: {arguments.choices}")
    if arguments.loss == "cross_entropy" and arguments.images not in SOURCES:
        raise ValueError(
            f"--loss cross_entropy needs labels: give --images one of {', '.join(SOURCES)}, or --loss error"
        )
    if arguments.plot:
        from shiftaddvit_jax.pictures.style import check_picture

        check_picture(arguments.plot)
    costs = read_costs(arguments.latencies) if arguments.latencies else None
    budget = parse_budget(arguments.budget, costs.unit if costs else "uJ")
    source = open_source(arguments.source, **source_settings(arguments))
    for note in source.notes:
        print(f"note: {note}", file=sys.stderr)
    model, variables = source.model, source.variables
    check_dense(model, variables)
    groups = group_layers(linear_layers(model), arguments.groups)
    runs = (
        arguments.runs
        if arguments.runs is not None
        else max(LEAST_RUNS, fewest_runs(len(groups), len(choices)))
    )
    design = make_design(len(groups), len(choices), runs, arguments.seed)
    costs = costs or energy_costs(model, variables, linear_layers(model))
    costs.check_budget(budget, groups, choices)
    examples = open_examples(arguments.images, arguments.path)
    images, labels = read_evenly(examples, 2 * arguments.count, source.preprocessing)
    if len(images) < 2:
        raise ValueError("a search takes images to fit layers on and others to measure on; give two or more")
    calibration, measured = images[::2], images[1::2]
    classes = labels[1::2] if arguments.loss == "cross_entropy" else None
    run = make_run(model, variables, groups, choices, costs, calibration, measured, arguments.finetune_steps)
    loss = make_loss(outputs_of(model, variables, measured, BATCH), classes)
    found = search(run, loss, groups, choices, costs, budget, design, arguments.baselines)
    confirmed = _confirm(found, source, costs, budget, calibration, measured, loss, arguments.confirm)
    report = _report(found, costs, budget, arguments.loss, confirmed)
    if arguments.output:
        _write(Path(arguments.output), report["confirmed"])
    if arguments.plot:
        from shiftaddvit_jax.pictures import plot_front

        plot_front(report, arguments.plot)
    present(arguments, report, lambda: _print(report, arguments))


def _confirm(found, source, costs, budget, calibration, images, loss, count):
    """The best trials within the budget, each with the loss of its whole conversion."""
    from shiftaddvit_jax.calibrate import calibrate
    from shiftaddvit_jax.models.inspect import outputs_of
    from shiftaddvit_jax.search.run import BATCH

    confirmed = []
    for trial in found.best(budget, count):
        layers = found.layers(trial.levels)
        pair = source.model, source.variables
        if set(layers.values()) != {"dense"}:
            pair = calibrate(*pair, calibration, layers=layers, latencies=costs.latencies())
        confirmed.append((trial, float(loss(outputs_of(*pair, images, BATCH)))))
    return sorted(confirmed, key=lambda pair: pair[1])


def _report(found, costs, budget, loss, confirmed):
    """All figures, in types that JSON can hold."""
    return {
        "unit": costs.unit,
        "budget": budget,
        "loss": loss,
        "runs": len(found.trials),
        "choices": list(found.choices),
        "groups": found.groups,
        "front": [
            {
                "budget": point.budget,
                "predicted": point.predicted,
                "cost": point.best.cost,
                "measured": point.best.loss,
                "random": _finite(point.random),
                "greedy": _finite(point.greedy),
                "configuration": found.configuration(point.best.levels),
            }
            for point in found.front
        ],
        "uniform": {
            choice: {"cost": trial.cost, "measured": trial.loss} for choice, trial in found.uniform.items()
        },
        "confirmed": [
            {
                "layers": found.layers(trial.levels),
                "unit": costs.unit,
                "cost": trial.cost,
                "loss": loss,
                "measured": trial.loss,
                "converted": converted,
            }
            for trial, converted in confirmed
        ],
    }


def _finite(loss):
    return loss if loss is not None and math.isfinite(loss) else None


def _write(folder, confirmed):
    folder.mkdir(parents=True, exist_ok=True)
    for number, configuration in enumerate(confirmed, start=1):
        write_json(folder / f"{number}.json", configuration)


def _print(report, arguments):
    from rich.table import Table

    unit, baselines = report["unit"], arguments.baselines
    table = Table(title=f"{LOSS_WORDS[report['loss']]} against {unit}, after {report['runs']} runs")
    for column in (f"budget, {unit}", f"cost, {unit}", "predicted", "measured"):
        table.add_column(column, justify="right")
    for column in ("random", "greedy") if baselines else ():
        table.add_column(column, justify="right")
    table.add_column("groups")
    for point in report["front"]:
        numbers = [point[name] for name in ("budget", "cost", "predicted", "measured")]
        numbers += [point[name] for name in ("random", "greedy") if baselines]
        counts = Counter(point["configuration"].values())
        table.add_row(
            *("-" if number is None else f"{number:.4g}" for number in numbers),
            ", ".join(f"{counts[choice]} {choice}" for choice in report["choices"] if counts[choice]),
        )
    print_table(table)
    for choice, same in report["uniform"].items():
        least = min(
            point["measured"] for point in report["front"] if point["cost"] <= same["cost"] * (1 + 1e-9)
        )
        verdict = f"the front has {least:.4g}" if least < same["measured"] else "the front has no less"
        print(f"all {choice}: {same['measured']:.4g} at {same['cost']:.4g} {unit}; {verdict}")
    for number, one in enumerate(report["confirmed"], start=1):
        place = f"; {arguments.output}/{number}.json" if arguments.output else ""
        print(
            f"{number}. {one['cost']:.4g} {unit}: {one['measured']:.4g} composed, {one['converted']:.4g} "
            f"converted{place}"
        )
    if arguments.output and report["confirmed"]:
        where = f" --path {arguments.path}" if arguments.path else ""
        print(
            f"Next: {program()} convert {arguments.source} --images {arguments.images}{where} "
            f"--layers {arguments.output}/1.json --output {arguments.output}/model"
        )
