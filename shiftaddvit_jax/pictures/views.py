"""Pictures of rendered views beside photographs."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float
from matplotlib.figure import Figure

from shiftaddvit_jax.files import whole_file
from shiftaddvit_jax.novel_views import Rendered
from shiftaddvit_jax.pictures.html import document, figure, paragraph, section, table
from shiftaddvit_jax.pictures.style import save_figure

LARGEST_ERROR = 0.3  # of a colour from 0 to 1, where error maps end

View = Float[np.ndarray, "height width 3"]
Depth = Float[np.ndarray, "height width"]


def plot_views(
    true: View,
    rendered: Mapping[str, Rendered],
    bounds: tuple[float, float],
    depth: Depth | None = None,
    path: str | Path | None = None,
) -> Figure:
    """A held-out photograph and what models render, a column a model: colours, their errors, and depths.

    Where a view counted tokens, a row below shows which share of each ray's went to shift experts.

    Args:
      true: the photograph, colours from 0 to 1.
      rendered: views by the model's name.
      bounds: the scene's depths, where the scale of depths ends.
      depth: the true depth, if it is known.
      path: see `shiftaddvit_jax.pictures`.
    """
    columns = 1 + len(rendered)
    routed = any(view.shift_share is not None for view in rendered.values())
    rows = 4 if routed else 3
    drawn = Figure(figsize=(2.1 * columns + 0.9, 2.2 * rows), layout="constrained")
    axes = drawn.subplots(rows, columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    near, far = bounds
    depths = {"cmap": "viridis", "vmin": 1 / far, "vmax": 1 / near}
    axes[0, 0].imshow(true)
    axes[0, 0].set_title("photograph", fontsize=10)
    for below in axes[1:, 0]:
        below.set_axis_off()
    if depth is not None:
        axes[2, 0].set_axis_on()
        axes[2, 0].imshow(1 / depth, **depths)
        axes[2, 0].set_xlabel("true", fontsize=9)
    for column, (name, view) in enumerate(rendered.items(), 1):
        axes[0, column].imshow(np.clip(view.colours, 0, 1))
        axes[0, column].set_title(name, fontsize=10)
        error = np.abs(view.colours - true).mean(axis=2)
        scales = [
            (axes[1, column].imshow(error, cmap="cividis", vmin=0, vmax=LARGEST_ERROR), "mean error, 0 to 1"),
            (axes[2, column].imshow(1 / view.depth, **depths), "1 / depth, 1 / unit"),
        ]
        if view.shift_share is not None:
            shown = axes[3, column].imshow(view.shift_share, cmap="magma", vmin=0, vmax=1)
            scales.append((shown, "tokens on shift, share"))
        elif routed:
            axes[3, column].set_axis_off()
        if column == len(rendered):
            for row, (shown, label) in enumerate(scales, 1):
                drawn.colorbar(shown, ax=axes[row, column], label=label)
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
        "middle: errors. Below: depths, weighed as the last ray transformer attends, near is bright; and "
        "which share of each ray's tokens went to shift experts."
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
