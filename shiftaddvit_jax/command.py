"""What every command shares: how arguments are refused, how errors and logs reach a person."""

import argparse
import logging
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

WIDEST = 10_000  # columns, more than any table has
NAME_WIDTH = 16  # columns, enough to read names in


class Stopped(Exception):
    """A signal ended the work, and what was done is saved; the message says how to go on.

    Attributes:
      signal: which.
    """

    def __init__(self, message: str, signal: signal.Signals) -> None:
        super().__init__(message)
        self.signal = signal


class Parser(argparse.ArgumentParser):
    """A parser that asks for whole option names, so that ``--config.x`` is never taken for ``--config``."""

    def __init__(self, **arguments) -> None:
        super().__init__(allow_abbrev=False, **arguments)


def table_console() -> "Console":
    """Where a table is printed: as wide as the terminal, or 100 columns where there is none."""
    from rich.console import Console

    console = Console()
    return console if console.is_terminal else Console(width=100)


def print_table(table: "Table") -> None:
    """Print a table whose numbers, in columns justified to the right, are never cut.

    If the table is too wide, headers break between words and names break anywhere. If it still does not fit,
    it is wider than the terminal.
    """
    from rich.cells import cell_len
    from rich.console import Console

    console = table_console()
    if Console(width=WIDEST).measure(table).maximum > console.width:
        needed = 1
        for column in table.columns:
            if column.justify == "right":
                column.width = max(map(cell_len, (*str(column.header).split(), *map(str, column.cells))))
            else:
                column.no_wrap, column.overflow = False, "fold"
            needed += (column.width or NAME_WIDTH) + 3  # spaces beside it, and a line
        console.width = max(console.width, needed)
    console.print(table)


def program() -> str:
    """The command that runs ``shiftaddvit`` here: its name if it is on the PATH, else Python with ``-m``."""
    if shutil.which("shiftaddvit"):
        return "shiftaddvit"
    python, here = Path(sys.executable), Path.cwd()
    python = python.relative_to(here) if python.is_relative_to(here) else python
    return f"{shlex.quote(str(python))} -m shiftaddvit_jax"


def run_command(name: str, command: Callable[[], None]) -> int:
    """Run ``command`` and return an exit code: 0, 2 after one line about an error.

    After a signal that ended it, it is 128 and the signal's number: 130 after Ctrl-C, 143 after SIGTERM.
    """
    try:
        with _logs_shown():
            command()
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(f"{name}: {stopped}", file=sys.stderr)
        return 128 + stopped.signal
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0


@contextmanager
def _logs_shown() -> Generator[None]:
    """What the packages log goes to the standard error stream as it is now; loggers are left as they were."""
    handler: logging.Handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    levels = {"shiftaddvit_jax": logging.INFO, "kernels_tvm": logging.INFO}
    levels["absl"] = logging.CRITICAL  # what Orbax says there, with a traceback, it also raises
    loggers = [logging.getLogger(name) for name in levels]
    before = [(logger.handlers, logger.level, logger.propagate) for logger in loggers]
    for logger, level in zip(loggers, levels.values(), strict=True):
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(level)
    try:
        yield
    finally:
        for logger, (handlers, level, propagate) in zip(loggers, before, strict=True):
            logger.handlers, logger.propagate = handlers, propagate
            logger.setLevel(level)
