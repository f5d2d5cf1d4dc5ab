"""Pictures of training, and of what models confuse."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shiftaddvit_jax.pictures.style import COLORS, save_figure


def plot_confusions(
    confusions: Mapping[str, Int[np.ndarray, "classes classes"]],
    class_names: Sequence[str],
    path: str | Path | None = None,
) -> Figure:
    """How often each true class (row) was taken for each class (column); a panel for each model.

    The color scale leaves out right answers, since it would show nothing else.
    """
    columns = min(2, len(confusions))
    rows = math.ceil(len(confusions) / columns)
    figure = Figure(figsize=(5 * columns, 4.6 * rows), layout="constrained")
    mistakes = {name: counts * (1 - np.eye(len(counts), dtype=int)) for name, counts in confusions.items()}
    top = max(1, max(int(counts.max()) for counts in mistakes.values()))
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, (name, counts) in zip(axes, confusions.items(), strict=False):
        image = panel.imshow(mistakes[name], cmap="Blues", vmin=0, vmax=top)
        accuracy = np.trace(counts) / counts.sum()
        panel.set_title(f"{name}: {accuracy:.2%} right, {mistakes[name].sum()} of {counts.sum()} wrong")
        panel.set_xlabel("predicted class")
        panel.set_ylabel("true class")
        panel.set_xticks(range(len(class_names)), class_names)
        panel.set_yticks(range(len(class_names)), class_names)
        for row, column in np.argwhere(mistakes[name]):
            dark = mistakes[name][row, column] > top / 2
            panel.text(
                column, row, mistakes[name][row, column], ha="center", va="center", color="w" if dark else "k"
            )
    for panel in axes[len(confusions) :]:
        panel.set_axis_off()
    # pyrefly: ignore[unbound-name]  # there is a model
    figure.colorbar(image, ax=axes, label="images confused", shrink=0.6, ticks=MaxNLocator(integer=True))
    return save_figure(figure, path)


def plot_history(
    histories: Mapping[str, Sequence[Mapping[str, float]]], path: str | Path | None = None
) -> Figure:
    """Training loss and accuracy against steps; a line for each run."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    loss, accuracy = figure.subplots(1, 2)
    for color, (name, history) in zip(COLORS, histories.items(), strict=False):
        steps = [entry["step"] for entry in history]
        loss.plot(steps, [entry["task_loss"] for entry in history], color=color, label=name)
        accuracy.plot(steps, [100 * entry["accuracy"] for entry in history], color=color, label=name)
    loss.set_xlabel("step")
    loss.set_ylabel("training loss (nats, smoothed labels)")
    accuracy.set_xlabel("step")
    accuracy.set_ylabel("training accuracy (%)")
    accuracy.legend()
    for panel in (loss, accuracy):
        panel.grid(alpha=0.3)
    return save_figure(figure, path)


def plot_routing_history(history: Sequence[Mapping[str, float]], path: str | Path | None = None) -> Figure:
    """The share of tokens on each MoE layer's shift expert against steps; a panel for each stage.

    Args:
      history: what a run logged, see `train_and_evaluate`.
      path: see `shiftaddvit_jax.pictures`.

    Raises:
      ValueError: a history without such shares.
    """
    prefix = "shift_share/"
    layers = [name.removeprefix(prefix) for name in history[-1] if name.startswith(prefix)] if history else []
    if not layers:
        raise ValueError("the history has no shares of tokens: the model that was trained has no MoE layers")
    stages: dict[str, list[str]] = {}
    for layer in layers:
        stages.setdefault(layer.partition("/")[0], []).append(layer)
    columns = min(4, len(stages))
    rows = math.ceil(len(stages) / columns)
    figure = Figure(figsize=(max(5, 3.2 * columns), 0.8 + 3.2 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).ravel()
    steps = [entry["step"] for entry in history]
    for panel, (stage, names) in zip(axes, stages.items(), strict=False):
        for index, name in enumerate(names):
            # With many layers, several share a color, and the lines' styles tell them apart.
            style = ("-", "--", ":")[index // len(COLORS) % 3]
            shares = [100 * entry[prefix + name] for entry in history]
            label = name.removeprefix(f"{stage}/")
            panel.plot(steps, shares, style, color=COLORS[index % len(COLORS)], label=label)
        panel.set_title(stage)
        panel.set_xlabel("step")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    for panel in axes[len(stages) :]:
        panel.set_axis_off()
    axes[0].set_ylim(0, 100)
    figure.supylabel("tokens on the shift expert (%)")
    return save_figure(figure, path)
