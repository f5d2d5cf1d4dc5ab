"""The command that says how much worse a model gets when images are perturbed."""

import argparse
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from shiftaddvit_jax.cli.arguments import (
    Commands,
    add_command,
    add_json,
    model_notes,
    open_test_set,
    present,
    print_notes,
)
from shiftaddvit_jax.command import print_table
from shiftaddvit_jax.names import PERTURBATIONS, POINTS, RANDOMIZATIONS, SOURCES, STOPPING_RULES
from shiftaddvit_jax.optional import require

if TYPE_CHECKING:
    from shiftaddvit_jax.robustness import Means, Robustness, Surrogate

ENOUGH = 0.5  # of the variance predicted at points left out; below, Sobol' indices are not to be trusted


def add_robustness(commands: Commands) -> None:
    """Add ``robustness``."""
    command = add_command(
        commands,
        "robustness",
        robustness,
        "Mean accuracy and loss over perturbed images, to a tolerance, and which perturbation costs most.",
        "robustness runs/demo/moe --data digits --rotation uniform:-20:20",
        "robustness runs/demo/moe --compare runs/demo/dense --data digits --blur uniform:0:1 --noise "
        "uniform:0:0.1 --json robustness.json",
    )
    command.add_argument("checkpoint", metavar="CHECKPOINT", help="a model from anywhere, as `info` takes it")
    command.add_argument("--compare", metavar="DENSE", help="another model, on the same perturbations")
    command.add_argument(
        "--data",
        required=True,
        choices=SOURCES,
        metavar="DATA",
        help=f"whose held-out images are perturbed: {', '.join(SOURCES)}",
    )
    command.add_argument("--path", default="", metavar="DIR", help="where the data source's images lie")
    command.add_argument("--count", type=int, metavar="N", help="images to take, evenly; default: all")
    command.add_argument(
        "--model", metavar="NAME", help="whose weights a file has, where nothing beside it tells"
    )
    drawn = command.add_argument_group("perturbations, each with a distribution")
    for name, (meaning, example) in PERTURBATIONS.items():
        drawn.add_argument(f"--{name}", metavar="DISTRIBUTION", help=f"{meaning}, as in {example}")
    known = command.add_argument_group("how well the means are known")
    known.add_argument(
        "--tolerance",
        type=float,
        default=0.5,
        metavar="X",
        help="half-width of the bound on mean accuracies, in points; default: %(default)s",
    )
    known.add_argument(
        "--points", choices=POINTS, default="digital_net", help="default: %(default)s, which needs fewest"
    )
    known.add_argument(
        "--rule",
        choices=STOPPING_RULES,
        help="when there are enough: cone, of a net or a lattice by the decay of the transformed scores "
        "(their default); student, by the spread of 16 randomizations (Halton points' default); clt, by the "
        "central limit theorem (of iid points)",
    )
    known.add_argument(
        "--randomization",
        choices=RANDOMIZATIONS,
        metavar="KIND",
        help=f"of the points: {', '.join(RANDOMIZATIONS)}; default: the first that they have",
    )
    known.add_argument(
        "--alpha", type=int, default=1, metavar="N", help="interlaced digits: above 1, higher-order points"
    )
    known.add_argument(
        "--most",
        type=int,
        default=2**14,
        metavar="N",
        help="perturbations of all images at most, a power of two; default: %(default)s",
    )
    known.add_argument("--seed", type=int, default=0, metavar="N", help="of the points; default: %(default)s")
    command.add_argument("--output", metavar="FILE", help="draw accuracy along each parameter, as PNG or SVG")
    add_json(command)


def robustness(arguments: argparse.Namespace) -> None:
    """Means over perturbed images, and what costs most."""
    require("qmc", "a mean over perturbations", "qmcpy")
    from shiftaddvit_jax.checkpoints.source import our_folder
    from shiftaddvit_jax.classifier import from_pretrained
    from shiftaddvit_jax.compare import check_classes
    from shiftaddvit_jax.robustness import Design, fit_surrogate, measure_robustness

    asked = {name: getattr(arguments, name) for name in PERTURBATIONS}
    design = Design(
        {name: text for name, text in asked.items() if text is not None},
        arguments.tolerance,
        arguments.points,
        arguments.rule,
        arguments.randomization,
        arguments.alpha,
        arguments.most,
        arguments.seed,
    )
    if arguments.count is not None and arguments.count < 1:
        raise ValueError(f"--count must be at least 1, got {arguments.count}")
    if arguments.output:
        from shiftaddvit_jax.pictures.style import check_picture

        check_picture(arguments.output)
    sources = [source for source in (arguments.checkpoint, arguments.compare) if source is not None]
    models = [
        from_pretrained(source, model=None if our_folder(source) else arguments.model) for source in sources
    ]
    if len(models) == 2:
        check_classes(*models)
    examples, labelled, note = open_test_set(arguments.data, arguments.path, sources, models)
    if not labelled:
        raise ValueError(f"{note}; perturb images of the classes that the model knows")
    print_notes(filter(None, (*model_notes(models, sources), note)))
    found = measure_robustness(models, examples.evenly(arguments.count or len(examples)), design)
    surrogates = [fit_surrogate(found, found.scores[:, model, 0]) for model in range(len(models))]
    if arguments.output:
        from shiftaddvit_jax.pictures import plot_robustness

        plot_robustness(found, surrogates, sources, arguments.output)

    def show():
        _print(found, surrogates, sources)
        if arguments.output:
            print(f"Accuracy along each parameter is in {arguments.output}")

    present(arguments, _as_json(found, surrogates, sources), show)


def _as_json(found: "Robustness", surrogates: "Sequence[Surrogate]", names: Sequence[str]) -> dict[str, Any]:
    """The figures as values of JSON."""

    def means(of: "Means"):
        return {name: estimate._asdict() for name, estimate in of._asdict().items()}

    design = found.design
    return {
        "images": found.images,
        "evaluations": len(found.values),
        "perturbations": dict(design.perturbations),
        "points": design.points,
        "rule": design.rule,
        "randomization": design.randomization,
        "alpha": design.alpha,
        "tolerance": design.tolerance,
        "seed": design.seed,
        "parameters": [parameter.name for parameter in design.parameters],
        "models": [
            {
                "source": name,
                "unperturbed": {"accuracy": float(plain[0]), "loss": float(plain[1])},
                **means(of),
                "sobol": {
                    "kernel": surrogate.kernel,
                    "evaluations": surrogate.evaluations,
                    "predicted": float(surrogate.predicted),
                    "first_order": list(map(float, surrogate.first_order)),
                    "total": list(map(float, surrogate.total)),
                },
            }
            for name, plain, of, surrogate in zip(
                names, found.unperturbed, found.models, surrogates, strict=True
            )
        ],
        "difference": found.difference and means(found.difference),
    }


def _print(found: "Robustness", surrogates: "Sequence[Surrogate]", names: Sequence[str]) -> None:
    from rich import box
    from rich.table import Table

    letters = "AB"[: len(names)]
    for letter, name in zip(letters, names, strict=True):
        print(f"{letter}: {name}")
    table = Table(box=box.SIMPLE)
    table.add_column(f"{found.images:,} image{'s' * (found.images != 1)}")
    columns = list(found.models) + ([found.difference] if found.difference else [])
    for name in [*letters, *(["A - B"] if found.difference else [])]:
        table.add_column(name, justify="right")
    plain = [*found.unperturbed, *([found.unperturbed[0] - found.unperturbed[1]] if found.difference else [])]
    table.add_row("top-1 as they are, %", *(f"{100 * each[0]:.2f}" for each in plain))
    table.add_row("top-1 perturbed, %", *(_bounded(each.accuracy, 100, 2) for each in columns))
    table.add_row("loss as they are, nats", *(f"{each[1]:.4f}" for each in plain))
    table.add_row("loss perturbed, nats", *(_bounded(each.loss, 1, 4) for each in columns))
    print_table(table)
    condition = {
        "cone": "the scores' coefficients decay as in the rule's cone; --rule student does without",
        "student": "the means of 16 randomizations are normal, in 99 % of cases",
        "clt": "means are normal, in 99 % of cases",
    }[found.design.rule or ""]
    print(f"{len(found.values):,} perturbations of all images ({found.design.points}).")
    print(f"Bounds hold if {condition}.\n")
    shares = Table(box=box.SIMPLE)
    shares.add_column("share of top-1's variance")
    for letter in letters:
        shares.add_column(f"{letter} alone", justify="right")
        shares.add_column(f"{letter} in all", justify="right")
    parameters = [parameter.name.replace("_", " ") for parameter in found.design.parameters]
    for index in sorted(range(len(parameters)), key=lambda index: -surrogates[0].total[index]):
        cells = [(each.first_order[index], each.total[index]) for each in surrogates]
        shares.add_row(
            parameters[index], *("-" if math.isnan(x) else f"{x:.2f}" for pair in cells for x in pair)
        )
    print_table(shares)
    for letter, each in zip(letters, surrogates, strict=True):
        if math.isnan(each.predicted):
            print(f"{letter}: top-1 never changes.")
            continue
        trust = "" if each.predicted >= ENOUGH else "; don't trust it"
        process = f"a Gaussian process ({each.kernel}, {each.evaluations:,} points)"
        print(f"{letter}: {process} predicts {max(each.predicted, 0):.0%} of what is left out{trust}.")


def _bounded(estimate, factor, digits):
    mean, half_width = (f"{factor * each:.{digits}f}" for each in estimate)
    return f"{mean} ± {half_width}"
