"""Pictures of what two models say of the same images."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

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
    layout = ConstrainedLayoutEngine(h_pad=0.1)  # inches: captions stand apart from the next row's titles
    figure = Figure(figsize=(2.8 * columns, 3.6 * rows), layout=layout)
    axes = figure.subplots(rows, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []}).ravel()
    for panel, image, difference in zip(axes, images, differences, strict=False):
        answers = difference.answers
        differ = answers[0].index != answers[1].index
        lines = [
            f"{letter}: {_end(answer.label)} {answer.probability:.0%}"
            for letter, answer in zip("AB", answers, strict=True)
        ]
        if differ:
            lines[-1] += " ≠ A"
        if difference.label is not None:
            lines.append(f"is: {_end(difference.label)}")
        panel.imshow(image)
        panel.set_title(_end(difference.name), fontsize=9)
        panel.set_xlabel("\n".join(lines), color=COLORS[3] if differ else "k", fontsize=9)
    for panel in axes[len(images) :]:
        panel.set_axis_off()
    return save_figure(figure, path)


def _end(name):
    """The end of a name, which tells files of one folder apart; without signs of mathematics."""
    name = name.replace("$", r"\$")
    return name if len(name) <= LONGEST else f"…{name[1 - LONGEST :]}"
