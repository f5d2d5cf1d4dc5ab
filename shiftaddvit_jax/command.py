"""What every command shares: how arguments are refused, how errors and logs reach a person."""

import argparse
import logging
import sys
from collections.abc import Callable

from rich.console import Console


class Parser(argparse.ArgumentParser):
    """A parser that asks for whole option names, so that ``--config.x`` is never taken for ``--config``."""

    def __init__(self, **arguments) -> None:
        super().__init__(allow_abbrev=False, **arguments)


def table_console() -> Console:
    """Where a table is printed: as wide as the terminal, or 100 columns where there is none."""
    console = Console()
    return console if console.is_terminal else Console(width=100)


def run_command(name: str, command: Callable[[], None]) -> int:
    """Run ``command`` and return an exit code: 0, 2 after one line about an error, 130 after Ctrl-C."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    package = logging.getLogger("shiftaddvit_jax")
    package.handlers = [handler]
    package.setLevel(logging.INFO)
    package.propagate = False
    try:
        command()
    except (ValueError, FloatingPointError, OSError) as error:
        print(f"{name}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{name}: interrupted", file=sys.stderr)
        return 130
    return 0
