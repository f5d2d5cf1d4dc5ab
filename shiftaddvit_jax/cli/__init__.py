"""The command ``shiftaddvit``: one file for each group of its commands, with their arguments.

A parser needs nothing but names, so that help and errors come at once. What a command needs to run, the
function that runs it imports.
"""

import argparse
from collections.abc import Sequence
from functools import partial

import shiftaddvit_jax
from shiftaddvit_jax.cli import (
    analysis,
    bench,
    checkpoints,
    compare,
    convert,
    kernels,
    models,
    nvs,
    predict,
    robustness,
    search,
    serve,
    training,
)
from shiftaddvit_jax.command import Parser, run_command
from shiftaddvit_jax.main import train

# In the order of ``shiftaddvit --help``.
COMMANDS = (
    training.add_demo,
    training.add_train,
    training.add_eval,
    nvs.add_nvs,
    compare.add_compare,
    robustness.add_robustness,
    models.add_models,
    predict.add_info,
    predict.add_predict,
    checkpoints.add_reparameterize,
    convert.add_convert,
    convert.add_balance,
    search.add_search,
    bench.add_bench,
    analysis.add_report,
    kernels.add_gpu_report,
    analysis.add_plot,
    analysis.add_measure_latency,
    checkpoints.add_pack,
    checkpoints.add_export,
    kernels.add_compile,
    kernels.add_tune,
    serve.add_serve,
)


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="shiftaddvit",
        description="Vision transformers reparameterized into shifts and adds.",
        epilog="Start with `shiftaddvit demo`; `shiftaddvit COMMAND --help` says more of each.",
    )
    parser.add_argument("--version", action="version", version=shiftaddvit_jax.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` names and return the exit code."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "train":
        return run_command("shiftaddvit train", partial(train, arguments, rest))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return run_command(f"shiftaddvit {arguments.command}", partial(arguments.run, arguments))
