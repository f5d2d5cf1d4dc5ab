"""ShiftAddViT's claims on Fashion-MNIST, three seeds each, with one command that can be stopped and repeated.

    python -m studies.fashion_mnist begin               # with the results and the models that are there
    python -m studies.fashion_mnist run --jobs 2        # hours; prints what it does
    python -m studies.fashion_mnist time                # nothing else may run
    python -m studies.fashion_mnist report              # tables and pictures of what is there
    python -m studies.fashion_mnist ship                # models for the package

Hyperparameters were chosen on 5,000 images held out of training: ``run --held-out`` does the same, in a
folder of its own in the workdir.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from shiftaddvit_jax.command import run_command
from shiftaddvit_jax.validation import check_choice
from studies.fashion_mnist.data import hold_out
from studies.fashion_mnist.rows import BY_NAME, HELD_OUT, ROWS, WORKDIR
from studies.fashion_mnist.run import run_rows

DATA = "/usr/share/datasets/fashion-mnist"
PROGRAM = "python -m studies.fashion_mnist"


def main(argv: Sequence[str] | None = None) -> int:
    """What the command line asks for; 1 if some rows failed, 2 after an error."""
    asked = _parse(argv)
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("studies").setLevel(logging.INFO)
    failed: list[str] = []
    code = run_command(PROGRAM, lambda: failed.extend(_run(asked)))
    if failed:
        print(f"failed: {', '.join(failed)}", file=sys.stderr)
    return code or bool(failed)


def _parse(argv) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        PROGRAM, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    begin = commands.add_parser("begin", help="put what docs/ and the package have into the workdir")
    begin.add_argument("--docs", type=Path, default=Path("docs"), help="default: %(default)s")
    run = commands.add_parser("run", help="train, convert and evaluate what is not done yet")
    run.add_argument("--held-out", action="store_true", help="evaluate on 5,000 training images instead")
    run.add_argument("--rows", default="", help=f"some of {', '.join(BY_NAME)}; default: all")
    run.add_argument("--seeds", type=int, default=3, help="from 0 on (default: 3)")
    run.add_argument("--jobs", type=int, default=1, help="commands at a time, each on cores of its own")
    time = commands.add_parser("time", help="time the models of seed 0 on the kernels, in turns")
    report = commands.add_parser("report", help="write tables and pictures into docs/")
    report.add_argument("--docs", type=Path, default=Path("docs"), help="default: %(default)s")
    ship = commands.add_parser("ship", help="write three models of seed 0 into the package")
    ship.add_argument("--docs", type=Path, default=Path("docs"), help="default: %(default)s")
    for command in (run, report, ship):
        command.add_argument(
            "--data", type=Path, default=DATA, help="the four IDX files (default: %(default)s)"
        )
    for command in (begin, run, time, report, ship):
        command.add_argument("--workdir", type=Path, default=WORKDIR, help="default: %(default)s")
    return parser.parse_args(argv)


def _run(asked) -> list[str]:
    """Do what was asked for; the names of the rows that failed."""
    if asked.command == "run":
        return _run_rows(asked)
    if asked.command == "begin":
        from studies.fashion_mnist.begin import begin as begin_with

        begin_with(asked.workdir, asked.docs)
    elif asked.command == "time":
        from studies.fashion_mnist.times import write_times

        write_times(asked.workdir)
    elif asked.command == "report":
        from studies.fashion_mnist.report import write_report

        write_report(asked.workdir, asked.data, asked.docs)
    else:
        from studies.fashion_mnist.ship import ship as ship_models

        ship_models(asked.workdir, asked.data, asked.docs)
    return []


def _run_rows(asked):
    names = list(filter(None, asked.rows.split(","))) or list(BY_NAME)
    for name in names:
        check_choice("row", name, tuple(BY_NAME))
    if asked.seeds < 1:
        raise ValueError(f"--seeds must be at least 1, got {asked.seeds}")
    data, workdir = asked.data, asked.workdir
    if not data.is_dir():
        raise ValueError(
            f"no folder {data}; install Debian's package dataset-fashion-mnist, or name one by --data"
        )
    if asked.held_out:
        workdir = workdir / HELD_OUT
        data = hold_out(data, workdir / "data")
    rows = [row for row in ROWS if row.name in names]
    return run_rows(workdir, data, rows, range(asked.seeds), asked.jobs)


if __name__ == "__main__":
    sys.exit(main())
