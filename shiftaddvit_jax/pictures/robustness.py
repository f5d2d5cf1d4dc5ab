"""Pictures of how accuracy depends on perturbations."""

import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from shiftaddvit_jax.pictures.style import COLORS, save_figure
from shiftaddvit_jax.robustness import Robustness, Surrogate

COLUMNS = 3  # panels in a row


def plot_robustness(
    found: Robustness, surrogates: Sequence[Surrogate], names: Sequence[str], path: str | Path | None = None
) -> Figure:
    """Accuracy along each parameter, a mean over all others, with bands of two standard deviations.

    Args:
      found: a study.
      surrogates: of each model's accuracy, by `shiftaddvit_jax.robustness.fit_surrogate`.
      names: of the models.
      path: see `shiftaddvit_jax.pictures`.
    """
    parameters = found.design.parameters
    columns = min(COLUMNS, len(parameters))
    rows = math.ceil(len(parameters) / columns)
    figure = Figure(figsize=(3.4 * columns, 2.7 * rows + 0.9), layout="constrained")
    panels = figure.subplots(rows, columns, squeeze=False, sharey=True).ravel()
    for index, (panel, parameter) in enumerate(zip(panels, parameters, strict=False)):
        for model, (surrogate, color, name) in enumerate(zip(surrogates, COLORS, names, strict=False)):
            x, mean = surrogate.positions[index], surrogate.mean[index]
            band = 2 * surrogate.deviation[index]
            panel.plot(x, mean, color=color, label=name, linestyle=("-", "--")[model])
            panel.fill_between(x, mean - band, mean + band, color=color, alpha=0.25, linewidth=0)
            panel.axhline(found.unperturbed[model, 0], color=color, linewidth=0.8, linestyle=":")
        panel.set_xlabel(f"{parameter.name.replace('_', ' ')}, {parameter.unit}")
        panel.grid(alpha=0.3)
        panel.yaxis.set_major_formatter(PercentFormatter(1))
    for panel in panels[::columns]:
        panel.set_ylabel("top-1")
    for panel in panels[len(parameters) :]:
        panel.set_axis_off()
    handles, labels = panels[0].get_legend_handles_labels()
    labels = [label.replace("$", r"\$") for label in labels]
    figure.legend(handles, labels, loc="outside upper center", ncols=len(labels), frameon=False, fontsize=9)
    caption = f"{surrogates[0].evaluations:,} evaluations; dotted: images as they are"
    figure.supxlabel(caption, fontsize=9, color="0.35")
    return save_figure(figure, path)
