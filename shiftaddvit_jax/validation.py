"""One-line errors for what a person got wrong: below every floor, importing none of them."""

import difflib
from collections.abc import Iterable


def check_choice(what: str, value: object, choices: Iterable[str]) -> None:
    """Raise a ``ValueError`` that names the nearest known choice unless ``value`` is one of ``choices``."""
    known = list(choices)
    if value in known:
        return
    near = difflib.get_close_matches(str(value), known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(known)}"
    raise ValueError(f"unknown {what} {value!r}; {hint}")
