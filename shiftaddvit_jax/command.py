"""What every command shares: how arguments are refused, how errors and logs reach a person."""

import argparse
import logging
import shlex
import shutil
import signal
import sys
import textwrap
from collections.abc import Callable, Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from shiftaddvit_jax.validation import check_choice

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
    """A parser whose help ends with examples, and whose errors are one line that says what to do next.

    It asks for whole option names, so that ``--config.x`` is never taken for ``--config``.

    Attributes:
      examples: commands that a person could type.
    """

    def __init__(self, *, examples: Sequence[str] = (), **arguments: Any) -> None:
        super().__init__(allow_abbrev=False, **arguments)
        self.examples = tuple(examples)

    def format_help(self) -> str:
        """The help of argparse, and the examples in lines of at most 78 columns."""
        lines = (
            " \\\n      ".join(textwrap.wrap(example, 70, break_long_words=False, break_on_hyphens=False))
            for example in self.examples
        )
        shown = "".join(f"\n  {line}" for line in lines)
        return super().format_help() + (f"\nexamples:{shown}\n" if shown else "")

    def error(self, message: str) -> NoReturn:
        """Exit with code 2 after one line, which ends with where to read on."""
        self.exit(2, f"{self.prog}: error: {message} (see `{self.prog} --help`)\n")

    def refuse(self, unknown: Sequence[str]) -> NoReturn:
        """`error` about arguments that no option takes; the nearest option is named."""
        name = unknown[0].partition("=")[0]
        if name.startswith("--"):
            try:
                check_choice(
                    "option", name, [text for text in self._option_string_actions if text[:2] == "--"]
                )
            except ValueError as error:
                self.error(str(error))
        self.error(f"unexpected arguments: {' '.join(unknown)}")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        """Refuse what is none of an argument's choices, with the nearest of them."""
        if action.choices is not None:
            try:
                check_choice("command" if action.metavar == "COMMAND" else "choice", value, action.choices)
            except ValueError as error:
                raise argparse.ArgumentError(action, str(error)) from None


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
