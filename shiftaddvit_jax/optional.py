"""Packages that come with extras, and what is said where they are missing: below every floor."""

import importlib.util

# All that an extra brings, by the names of imports.
PACKAGES = {
    "train": ("absl", "grain", "ml_collections", "optax", "sklearn", "tensorboardX"),
    "plot": ("matplotlib",),
    "datasets": ("pyarrow",),
    "serve": ("starlette", "uvicorn", "python_multipart"),
    "wandb": ("wandb",),
    "trackio": ("trackio",),
    "ray": ("ray", "pyarrow"),
    "qmc": ("qmcpy", "fastgps"),
    "completion": ("shtab",),
    "views": ("skimage", "flip_evaluator", "imageio_ffmpeg"),
}


class MissingExtra(ImportError, ValueError):
    """A package that an extra brings is not installed."""


def how_to_install(extra: str) -> str:
    """The command that installs an extra."""
    return f"pip install 'shiftaddvit-jax[{extra}]'"


def require(extra: str, what: str, *packages: str) -> None:
    """Raise a `MissingExtra` unless what is needed can be imported.

    Args:
      extra: its name, or several with commas between them.
      what: needs them.
      packages: those of the extra that it needs; by default all.
    """
    needed = packages or tuple(package for name in extra.split(",") for package in PACKAGES[name])
    missing = [package for package in needed if importlib.util.find_spec(package) is None]
    if missing:
        raise MissingExtra(f"{what} needs {' and '.join(missing)}: {how_to_install(extra)}")
