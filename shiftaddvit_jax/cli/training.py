"""Commands that train a model and use it."""

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from shiftaddvit_jax.cli.arguments import (
    Commands,
    add_checkpoint,
    add_command,
    add_engine,
    add_json,
    open_engine,
    present,
    print_notes,
    shorten,
)
from shiftaddvit_jax.main import add_arguments
from shiftaddvit_jax.names import SOURCES
from shiftaddvit_jax.optional import require

if TYPE_CHECKING:
    from shiftaddvit_jax.checkpoints import Source
    from shiftaddvit_jax.data.sources import Examples
    from shiftaddvit_jax.train.evaluate import Evaluated

PART = 8  # batches that a worker of Ray evaluates at a time


def add_demo(commands: Commands) -> None:
    """Add ``demo``."""
    command = add_command(
        commands,
        "demo",
        demo,
        "On real handwritten digits: train a dense model, reparameterize it, compare (minutes).",
        "demo",
        "demo --workdir runs/second --seed 1",
    )
    command.add_argument("--workdir", default="runs/demo", metavar="DIR", help="default: %(default)s")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")


def demo(arguments: argparse.Namespace) -> None:
    """Train, reparameterize and compare on handwritten digits."""
    require("train,plot", "the demo")
    from shiftaddvit_jax.demo import print_report, run_demo

    workdir = Path(arguments.workdir).absolute()
    report = run_demo(workdir, seed=arguments.seed)
    print_report(report, workdir)


def add_train(commands: Commands) -> None:
    """Add ``train``."""
    command = add_command(
        commands,
        "train",
        None,
        "Train and evaluate what a config describes; run again to resume.",
        "train --config configs/digits.py --workdir runs/digits",
        "train --config configs/digits.py --workdir runs/short --config.train.steps=100",
        "train --config configs/pvt_v2_b0_imagenet.py:moe --plan",
    )
    add_arguments(command)


def add_eval(commands: Commands) -> None:
    """Add ``eval``."""
    command = add_command(
        commands,
        "eval",
        evaluate_checkpoint,
        "Accuracy of a checkpoint on held-out images.",
        "eval --checkpoint runs/demo/moe/model",
        "eval --checkpoint runs/mine/model --data folder --path photos --json eval.json",
    )
    add_checkpoint(command)
    command.add_argument(
        "--data",
        choices=SOURCES,
        default="digits",
        metavar="DATA",
        help=f"{', '.join(SOURCES)}; default: %(default)s",
    )
    command.add_argument("--path", default="", metavar="DIR", help="where the data set lies")
    add_engine(command)
    add_json(command)


def evaluate_checkpoint(arguments: argparse.Namespace) -> None:
    """Accuracy of a checkpoint on a test set."""
    with open_engine(arguments) as map_on_workers:
        found = _evaluated(arguments, map_on_workers)
    present(arguments, {**found, "confusion": found["confusion"].tolist()}, lambda: _print(found))


def _print(found):
    scores = f"top-1 {found['top1']:.2%}, top-5 {found['top5']:.2%}, loss {found['loss']:.4f} nats"
    print(f"{scores}, on {found['images']} held-out images")
    if found["shift_share"]:
        shares = found["shift_share"].values()
        print(f"tokens on shift experts: {sum(shares) / len(shares):.1%}")


def _evaluated(arguments, map_on_workers):
    """What `evaluate` returns, computed by workers if there are any."""
    from shiftaddvit_jax.progress import track
    from shiftaddvit_jax.train import evaluate
    from shiftaddvit_jax.train.evaluate import Evaluated, count_batches, summarize

    source, examples, note = open_evaluation(arguments.checkpoint, arguments.data, arguments.path)
    print_notes(filter(None, [note]))
    if map_on_workers is None:
        return evaluate(source.model, source.variables, examples, preprocessing=source.preprocessing)
    checkpoint, path = (
        os.path.abspath(place) if place else "" for place in (arguments.checkpoint, arguments.path)
    )
    make = partial(batch_evaluation, checkpoint, arguments.data, path)
    count = count_batches(len(examples))
    parts = [(first, min(first + PART, count)) for first in range(0, count, PART)]
    done = track(map_on_workers(make, parts), "evaluating", len(parts))
    batches = (Evaluated(*batch) for part in done for batch in part)
    return summarize(batches, source.model.num_classes)


def open_evaluation(checkpoint: str, data: str, path: str) -> tuple["Source", "Examples", str | None]:
    """A checkpoint, the images that it is evaluated on, and a note on its classes.

    Raises:
      ValueError: classes that are not the data's, or what `open_source` and `load_test_set` raise.
    """
    from shiftaddvit_jax.checkpoints.source import open_source
    from shiftaddvit_jax.data.identity import class_difference
    from shiftaddvit_jax.data.sources import load_test_set
    from shiftaddvit_jax.subject import training_data

    source = open_source(checkpoint)
    trained_on = training_data(checkpoint)
    examples, names = load_test_set(data, path, trained_on and trained_on[1])
    known = (source.about or {}).get("class_names")
    if known is None and len(names) != source.model.num_classes:
        raise ValueError(
            f"the checkpoint has {source.model.num_classes} classes without names, and the data {len(names)} "
            f"({shorten(names)})"
        )
    if known is None:
        return source, examples, f"the checkpoint does not name its classes; taken for {shorten(names)}"
    if class_difference(known, names):
        raise ValueError(f"the checkpoint's classes ({shorten(known)}) are not the data's ({shorten(names)})")
    return source, examples, None


def batch_evaluation(checkpoint: str, data: str, path: str) -> Callable[[list[int]], list["Evaluated"]]:
    """What a worker does: from the first number of a range of batches, and its end, to what they came to."""
    from shiftaddvit_jax.train.evaluate import evaluate_batches

    source, examples, _ = open_evaluation(checkpoint, data, path)
    model, variables, preprocessing = source.model, source.variables, source.preprocessing

    def work(part):
        return list(evaluate_batches(model, variables, examples, range(*part), preprocessing=preprocessing))

    return work
