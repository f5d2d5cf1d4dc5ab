"""Packages that come with extras, and what is said where they are missing: below every floor."""

import importlib.util


class MissingExtra(ImportError, ValueError):
    """A package that an extra brings is not installed."""


def how_to_install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'shiftaddvit-jax[{extra}]'"


def require(extra: str, what: str, *packages: str) -> None:
    """Raise a `MissingExtra` unless ``packages``, of an extra, can be imported; ``what`` needs them."""
    missing = [package for package in packages if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingExtra(f"{what} needs {' and '.join(missing)}: {how_to_install(extra)}")
