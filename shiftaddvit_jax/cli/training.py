"""Commands that train a model and use it."""

import argparse
import json
import sys
from pathlib import Path

from shiftaddvit_jax.cli.arguments import Commands, add_checkpoint, add_command, shorten
from shiftaddvit_jax.main import add_arguments
from shiftaddvit_jax.names import SOURCES
from shiftaddvit_jax.optional import require


def add_demo(commands: Commands) -> None:
    """Add ``demo``."""
    command = add_command(
        commands,
        "demo",
        demo,
        "On real handwritten digits: train a dense model, reparameterize it, compare (minutes).",
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
        commands, "train", None, "Train and evaluate what a config describes; run again to resume."
    )
    add_arguments(command)


def add_eval(commands: Commands) -> None:
    """Add ``eval``."""
    command = add_command(
        commands, "eval", evaluate_checkpoint, "Accuracy of a checkpoint on held-out images."
    )
    add_checkpoint(command)
    command.add_argument("--data", choices=SOURCES, default="digits", help="default: %(default)s")
    command.add_argument("--path", default="", metavar="DIR", help="where a folder or IDX data set lies")
    command.add_argument("--json", action="store_true", help="print JSON")


def evaluate_checkpoint(arguments: argparse.Namespace) -> None:
    """Accuracy of a checkpoint on a test set."""
    import numpy as np

    from shiftaddvit_jax.checkpoints.source import open_source
    from shiftaddvit_jax.data.sources import load_test_set
    from shiftaddvit_jax.subject import training_data
    from shiftaddvit_jax.train import evaluate

    source = open_source(arguments.checkpoint)
    trained_on = training_data(arguments.checkpoint)
    examples, names = load_test_set(arguments.data, arguments.path, trained_on and trained_on[1])
    known = (source.about or {}).get("class_names")
    if known is None and len(names) != source.model.num_classes:
        raise ValueError(
            f"the checkpoint has {source.model.num_classes} classes without names, and the data {len(names)} "
            f"({shorten(names)})"
        )
    if known is None:
        print(f"note: the checkpoint does not name its classes; taken for {shorten(names)}", file=sys.stderr)
    elif tuple(known) != names:
        raise ValueError(f"the checkpoint's classes ({shorten(known)}) are not the data's ({shorten(names)})")
    found = evaluate(source.model, source.variables, examples, preprocessing=source.preprocessing)
    if arguments.json:
        print(json.dumps({**found, "confusion": found["confusion"].tolist(), "images": len(examples)}))
        return
    print(f"top-1 {found['top1']:.2%}, loss {found['loss']:.4f} nats, on {len(examples)} held-out images")
    if found["shift_share"]:
        print(f"tokens on shift experts: {np.mean(list(found['shift_share'].values())):.1%}")
