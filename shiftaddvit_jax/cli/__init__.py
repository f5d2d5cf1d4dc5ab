"""The command ``shiftaddvit``: one file for each group of its commands, with their arguments.

A parser needs nothing but names, so that help and errors come at once. What a command needs to run, the
function that runs it imports.
"""

import sys
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
from shiftaddvit_jax.cli.completion import add_completion
from shiftaddvit_jax.command import Parser, run_command
from shiftaddvit_jax.files import check_parent
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

# What the command alone says.
FIRST_STEPS = """\
shiftaddvit turns trained vision transformers into shifts and adds. Begin with

  shiftaddvit demo
      train a small one on handwritten digits, convert it, compare (minutes)
  shiftaddvit predict hf:OpenGVLab/pvt_v2_b0 cat.jpg
      ask published weights what an image shows

or in Python with

  import shiftaddvit_jax as sav
  sav.from_pretrained("hf:OpenGVLab/pvt_v2_b0")("cat.jpg")

`shiftaddvit --help` lists all commands.
"""


def build_parser() -> Parser:
    """The parser of all commands."""
    parser = Parser(
        prog="shiftaddvit",
        description="Vision transformers reparameterized into shifts and adds.",
        epilog="`shiftaddvit COMMAND --help` says more of each.",
        examples=["shiftaddvit demo", "shiftaddvit predict runs/demo/moe runs/demo/samples/*.png"],
    )
    parser.add_argument("--version", action="version", version=shiftaddvit_jax.__version__)
    add_completion(parser)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in COMMANDS:
        add(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` names and return the exit code."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv:
        print(FIRST_STEPS, end="", file=sys.stderr)
        return 2
    arguments, rest = build_parser().parse_known_args(argv)
    command = arguments.parser
    if arguments.command == "train":
        return run_command(command.prog, partial(train, arguments, rest))
    if rest:
        command.refuse(rest)

    def run():
        if getattr(arguments, "json", None):
            check_parent(arguments.json)
        arguments.run(arguments)

    return run_command(command.prog, run)
