"""The pictures of the study."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from shiftaddvit_jax.data import load_dataset
from shiftaddvit_jax.data.images import whole
from shiftaddvit_jax.data.preprocessing import crop
from shiftaddvit_jax.pictures.capture import routed_tokens
from shiftaddvit_jax.pictures.costs import pareto_front
from shiftaddvit_jax.pictures.inside import plot_routing
from shiftaddvit_jax.pictures.style import COLORS, save_figure
from shiftaddvit_jax.subject import as_inputs, load_subject
from studies.fashion_mnist.rows import BY_NAME

GROUP_COLORS = dict(zip(("main", "attention", "shift", "mixture", "convert", "int8"), COLORS, strict=True))
GROUP_LABELS = {
    "main": "dense",
    "attention": "other attentions",
    "shift": "shift MLPs",
    "mixture": "mixture MLPs",
    "convert": "fitted without training",
    "int8": "int8 activations",
}
# Where names stand from their points, in typographic points: above or below the crowd.
NAMED = {
    "dense": (10, -105),
    "hamming_linear": (5, 60),
    "shift": (0, 75),
    "shift_3_bits": (65, 0),
    "shift_everywhere": (0, -50),
    "moe": (40, -90),
}
RATIOS = ("moe_none", "moe_1_3", "moe_1_1", "moe", "moe_measured")
SHOWN_CLASSES = (0, 5, 8, 9)  # a shirt, a sandal, a bag, an ankle boot
Rows = Mapping[str, Mapping[str, Any]]


def plot_tradeoffs(rows: Rows, path: Path) -> Figure:
    """Accuracy against energy and against milliseconds, a point a model, with the Pareto front."""
    axes = {"energy_uj": "energy on the accelerator (µJ an image)", "ms": "median latency (ms an image)"}
    axes = {key: label for key, label in axes.items() if any(row[key] is not None for row in rows.values())}
    figure = Figure(figsize=(10, 4.6), layout="constrained")
    panels = figure.subplots(1, len(axes), sharey=True, squeeze=False)[0]
    for panel, (key, label) in zip(panels, axes.items(), strict=True):
        shown = {name: row for name, row in rows.items() if row[key] is not None}
        for name, row in shown.items():
            mean, deviation = row["top1"]
            color = GROUP_COLORS[row["group"]]
            panel.errorbar(row[key], mean, deviation or 0, fmt="none", color=color, capsize=2, alpha=0.35)
            panel.scatter(row[key], mean, color=color, zorder=2.5)
            if name in NAMED:
                panel.annotate(
                    row["label"], (row[key], mean), NAMED[name], textcoords="offset points", ha="center",
                    fontsize=8, zorder=3, arrowprops={"arrowstyle": "-", "linewidth": 0.5},
                    bbox={"facecolor": "white", "edgecolor": "none", "pad": 1},
                )  # fmt: skip
        if front := pareto_front([(row[key], row["top1"][0]) for row in shown.values()]):
            panel.step(*zip(*front, strict=True), where="post", color="0.6", linewidth=1, zorder=0)
        panel.set_xlabel(label)
        panel.margins(0.2, 0.15)  # with room for names
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("top-1 on the test images (%)")
    for group in dict.fromkeys(row["group"] for row in rows.values()):
        panels[0].scatter([], [], color=GROUP_COLORS[group], label=GROUP_LABELS[group])
    figure.legend(loc="outside upper center", ncols=6, frameon=False)
    return save_figure(figure, path)


def plot_mixtures(rows: Rows, path: Path) -> Figure:
    """What the loss wants against what routers do, and accuracy by the share of tokens on shift experts."""
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    wanted, accuracy = figure.subplots(1, 2)
    wanted.plot([0, 100], [0, 100], color="0.7", linewidth=1)
    for name in filter(rows.__contains__, RATIOS):
        row = rows[name]
        label = row["label"].removeprefix("mixture MLPs, ")
        if row["aim"] is not None:
            wanted.scatter(row["aim"], row["share"], color=COLORS[0])
            wanted.annotate(label, (row["aim"], row["share"]), (6, -10), textcoords="offset points")
        accuracy.errorbar(
            row["share"], row["top1"][0], row["top1"][1] or 0, fmt="o", color=COLORS[0], capsize=2
        )
        place = (-8 if row["aim"] is not None else 8, 0)  # along its bar: bars stand close together
        accuracy.annotate(
            label, (row["share"], row["top1"][0]), place, textcoords="offset points",
            rotation=90, ha="center", va="center",
        )  # fmt: skip
    for name, share, label in (("hamming_linear", 0, "multiplications"), ("shift", 100, "shifts alone")):
        if name in rows:
            mean, deviation = rows[name]["top1"]
            accuracy.errorbar(share, mean, deviation or 0, fmt="s", color=COLORS[3], capsize=2)
            place = (6, 5) if share == 0 else (-70, 5)
            accuracy.annotate(label, (share, mean), place, textcoords="offset points")
    wanted.set(xlabel="share that the loss aims at (%)", ylabel="share on shift experts (%)")
    wanted.set(xlim=(0, 100), ylim=(0, 100))
    accuracy.set(xlabel="tokens on shift experts (%)", ylabel="top-1 on the test images (%)")
    accuracy.margins(y=0.2)
    for panel in (wanted, accuracy):
        panel.grid(alpha=0.3)
    return save_figure(figure, path)


def draw_routing(workdir: Path, data: Path, path: Path) -> Figure:
    """Which tokens of four test images the mixture's routers send to which expert."""
    subject = load_subject(BY_NAME["moe"].folder(workdir, 0))
    examples = load_dataset("idx", str(data)).test
    labels = list(examples.labels)
    chosen = [whole(examples.open(labels.index(label))) for label in SHOWN_CLASSES]
    pixels = [crop(image, subject.preprocessing) for image in chosen]
    routed = routed_tokens(subject.model, subject.variables, as_inputs(subject, np.stack(pixels)))
    return plot_routing(pixels, routed, path)
