"""Pictures of training and of what models confuse."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's palette, told apart by the colour-blind too.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9")


def plot_confusions(
    confusions: Mapping[str, Int[np.ndarray, "classes classes"]], class_names: Sequence[str], path: str | Path
) -> Figure:
    """One panel a model: how often each true class (row) was taken for each class (column); a PNG or SVG.

    Right answers are left out of the colour scale, which would else show them alone.
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
    figure.colorbar(image, ax=axes, label="images confused", shrink=0.6, ticks=MaxNLocator(integer=True))
    figure.savefig(path, dpi=120)
    return figure


def plot_history(histories: Mapping[str, Sequence[Mapping[str, float]]], path: str | Path) -> Figure:
    """Training loss and accuracy against steps, one line a run; a PNG or SVG."""
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
    figure.savefig(path, dpi=120)
    return figure


def plot_bench(report: Mapping[str, Any], path: str | Path) -> Figure:
    """A bar a contestant, from the report of `bench_model` or `bench_kernels`; a PNG or SVG.

    Models have milliseconds, with the 10th and 90th percentiles; kernels, whose times are far apart, their
    ratio to XLA's dense float32, drawn as a line. Dense models have a colour a runtime, kernels a contestant.
    """
    kernels = "model" not in report
    rows = [row for row in report["rows"] if "refused" not in row]
    if kernels:
        rows = [row for row in rows if row["reference"] != row["name"]]
    figure = Figure(figsize=(9, 1.2 + 0.3 * len(rows)), layout="constrained")
    panel = figure.subplots()
    tasks = [row["task"] for row in rows]
    groups = [task["contestant"] if kernels else ("attention" in task and task["runtime"]) for task in tasks]
    colors = dict(zip(dict.fromkeys(groups), itertools.cycle(COLORS), strict=False))
    values = [row["ratio"] if kernels else row["median_ms"] for row in rows]
    spread = [[row["median_ms"] - row["p10_ms"], row["p90_ms"] - row["median_ms"]] for row in rows]
    bars = panel.barh(
        range(len(rows)),
        values,
        xerr=None if kernels else np.transpose(spread),
        color=[colors[group] for group in groups],
        capsize=3,
    )
    panel.bar_label(bars, fmt="%.2f", padding=4)
    panel.set_yticks(range(len(rows)), [row["name"] for row in rows])
    panel.invert_yaxis()
    panel.margins(x=0.12, y=0.02)
    panel.grid(axis="x", alpha=0.3)
    threads = f"{report['machine']['threads']} threads, {report['machine']['cpu']}"
    if kernels:
        panel.axvline(1, color="black", linewidth=1)
        panel.set_xlabel("time over that of XLA's dense float32")
        panel.set_title(f"kernels on {threads}")
    else:
        size = report["model"]["image_size"]
        panel.set_xlabel("median time (ms), with the 10th and 90th percentiles")
        panel.set_title(f"{report['model']['name']}, {report['batch']} x {size} x {size}, on {threads}")
    figure.savefig(path, dpi=120)
    return figure
