"""Commands that train a model and use it."""

import argparse
import json
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

    from shiftaddvit_jax.checkpoints import load_model
    from shiftaddvit_jax.data import load_dataset
    from shiftaddvit_jax.train import evaluate

    model, variables, description = load_model(arguments.checkpoint)
    dataset = load_dataset(arguments.data, arguments.path)
    known = description.get("class_names")
    if known is not None and tuple(known) != dataset.class_names:
        raise ValueError(
            f"the checkpoint's classes ({shorten(known)}) are not the data's ({shorten(dataset.class_names)})"
        )
    found = evaluate(model, variables, dataset.test)
    if arguments.json:
        print(json.dumps({**found, "confusion": found["confusion"].tolist(), "images": len(dataset.test)}))
        return
    print(f"top-1 {found['top1']:.2%}, loss {found['loss']:.4f} nats, on {len(dataset.test)} held-out images")
    if found["shift_share"]:
        print(f"tokens on shift experts: {np.mean(list(found['shift_share'].values())):.1%}")
