"""Pictures of rendered views beside photographs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from shiftaddvit_jax.files import whole_file
from shiftaddvit_jax.pictures.html import document, figure, paragraph, section, table
from shiftaddvit_jax.pictures.style import save_figure

LARGEST_ERROR = 0.3  # of a colour from 0 to 1, where error maps end

View = Float[np.ndarray, "height width 3"]
Depth = Float[np.ndarray, "height width"]


def plot_views(
    true: View,
    rendered: Mapping[str, tuple[View, Depth]],
    bounds: tuple[float, float],
    depth: Depth | None = None,
    path: str | Path | None = None,
) -> Figure:
    """A held-out photograph and what models render: colours, their errors, and depths, a column a model.

    Args:
      true: the photograph, colours from 0 to 1.
      rendered: colours and depths by the model's name.
      bounds: the scene's depths, where the scale of depths ends.
      depth: the true depth, if it is known.
      path: see `shiftaddvit_jax.pictures`.
    """
    columns = 1 + len(rendered)
    drawn = Figure(figsize=(2.1 * columns + 0.9, 6.6), layout="constrained")
    axes = drawn.subplots(3, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    near, far = bounds
    axes[0, 0].imshow(true)
    axes[0, 0].set_title("photograph", fontsize=10)
    axes[1, 0].set_axis_off()
    if depth is None:
        axes[2, 0].set_axis_off()
    else:
        axes[2, 0].imshow(1 / depth, cmap="viridis", vmin=1 / far, vmax=1 / near)
        axes[2, 0].set_xlabel("true", fontsize=9)
    for column, (name, (colours, found)) in enumerate(rendered.items(), 1):
        top, middle, bottom = axes[:, column]
        top.imshow(np.clip(colours, 0, 1))
        top.set_title(name, fontsize=10)
        errors = middle.imshow(
            np.abs(colours - true).mean(axis=2), cmap="cividis", vmin=0, vmax=LARGEST_ERROR
        )
        depths = bottom.imshow(1 / found, cmap="viridis", vmin=1 / far, vmax=1 / near)
        if column == len(rendered):
            drawn.colorbar(errors, ax=middle, label="mean error of colours, 0 to 1")
            drawn.colorbar(depths, ax=bottom, label="1 / depth, 1 / unit of length")
    return save_figure(drawn, path)


def write_views_page(
    file: str | Path,
    title: str,
    about: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    views: Mapping[str, Mapping[str, Any]],
) -> None:
    """A page with a table, and with `plot_views` of each held-out view; whole or not at all.

    Args:
      file: the page.
      title: its heading.
      about: the paragraph below.
      head: the table's columns.
      rows: its rows.
      views: the arguments of `plot_views` by the view's name.
    """
    caption = (
        "Above: the photograph, and what each model renders of the view without having seen it. In the "
        "middle: errors. Below: depths, weighed as the last ray transformer attends; near is bright."
    )
    sections = [
        paragraph(about),
        section("Scores", table(head, rows)),
        *(
            section(f"View {name}", figure(plot_views(**arguments), caption))
            for name, arguments in views.items()
        ),
    ]
    with whole_file(file) as temporary:
        temporary.write_text(document(title, sections), encoding="utf-8")
