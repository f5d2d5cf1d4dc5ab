"""Pictures of what two models say of the same images."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure

from shiftaddvit_jax.compare import ImageDifference
from shiftaddvit_jax.pictures.style import COLORS, save_figure

COLUMNS, LONGEST = 4, 28  # panels in a row; letters of a name that fit over one


def plot_worst(
    images: Sequence[UInt8[np.ndarray, "_height _width 3"]],
    differences: Sequence[ImageDifference],
    path: str | Path | None = None,
) -> Figure:
    """Images with both models' answers below them, in another colour and with a sign where they differ.

    Args:
      images: pixels of the images.
      differences: what `shiftaddvit_jax.compare` says of them.
      path: see `shiftaddvit_jax.pictures`.
    """
    columns = min(COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(2.8 * columns, 3.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel in axes:
        panel.set_axis_off()
    for panel, image, difference in zip(axes, images, differences, strict=False):
        panel.imshow(image)
        panel.set_title(_end(difference.name), fontsize=9)
        first, second = (answer.index for answer in difference.answers)
        lines = [
            f"{letter}: {_end(answer.label)} {answer.probability:.0%}"
            for letter, answer in zip("AB", difference.answers, strict=True)
        ]
        if difference.label is not None:
            lines.insert(0, f"is: {_end(difference.label)}")
        if first != second:
            lines[-1] += "  ≠ A"
        color = COLORS[3] if first != second else "k"
        panel.text(
            0.5,
            -0.04,
            "\n".join(lines),
            color=color,
            fontsize=9,
            transform=panel.transAxes,
            ha="center",
            va="top",
        )
    return save_figure(figure, path)


def _end(name):
    """The end of a name, which tells files of one folder apart; without signs of mathematics."""
    name = name.replace("$", r"\$")
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"
