"""Tab completion: the script that a shell reads."""

import argparse
from typing import Any

from shiftaddvit_jax.names import ATTENTION_KINDS, LINEAR_KINDS, SHELLS
from shiftaddvit_jax.optional import MissingExtra, require


def add_completion(parser: argparse.ArgumentParser) -> None:
    """Add ``--print-completion`` to the parser of all commands."""
    parser.add_argument(
        "--print-completion",
        action=_PrintCompletion,
        choices=SHELLS,
        help="print a script by which the shell completes commands, and exit",
    )


class _PrintCompletion(argparse.Action):
    def __call__(self, parser, namespace, values, option_string=None):
        try:
            require("completion", "a script for tab completion")
        except MissingExtra as error:
            parser.error(str(error))
        import shtab

        _suggest(parser, shtab.FILE)
        print(shtab.complete(parser, values))
        parser.exit()


def _suggest(parser: argparse.ArgumentParser, files: Any) -> None:
    """Give arguments of free text what can be suggested: names of models and of kinds, and files."""
    from shiftaddvit_jax.models import list_models

    names = {
        "model": [*list_models(), *list_models("novel_views")],
        "attention": ATTENTION_KINDS,
        **dict.fromkeys(("mlp", "projections"), LINEAR_KINDS),
    }
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                _suggest(command, files)
        elif action.dest in names:
            action.choices = names[action.dest]
        elif action.choices is None and action.type is None and action.nargs != 0:
            action.complete = files  # pyrefly: ignore[missing-attribute]  # where shtab looks
