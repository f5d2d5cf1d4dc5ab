"""Pictures of what models cost: energy and latency by module, against accuracy, and against others."""

import itertools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from shiftaddvit_jax.bench.latency import Latency
from shiftaddvit_jax.bench.models import subject_of
from shiftaddvit_jax.costs.report import group_modules
from shiftaddvit_jax.nn.moe import EXPERTS
from shiftaddvit_jax.pictures.style import COLORS, EXPERT_COLORS, save_figure

SMALL = 0.01  # modules below this share of the largest model's total in every model share a bar
ENERGY_TITLES = {
    "compute": "arithmetic alone",
    "accelerator": "with data movement",
    "authors": "the authors' model of data movement",
}


def plot_energy(reports: Mapping[str, Mapping[str, Any]], path: str | Path | None = None) -> Figure:
    """Energy by module, model beside model, with a panel for each model of energy.

    Args:
      reports: those of `cost_report`, by the models' names; the others are compared with the first.
      path: see `shiftaddvit_jax.pictures`.
    """
    kinds = [kind for kind in ENERGY_TITLES if all(kind in each["energy_mj"] for each in reports.values())]
    panels = {
        ENERGY_TITLES[kind]: {
            name: {
                group: costs["energy_mj"][kind] for group, costs in group_modules(report["modules"]).items()
            }
            for name, report in reports.items()
        }
        for kind in kinds
    }
    images = {report["batch"] for report in reports.values()}
    return save_figure(_plot_breakdowns(panels, f"energy (mJ) of {_images(max(images))}", "mJ"), path)


def plot_latency(latencies: Mapping[str, Latency], path: str | Path | None = None) -> Figure:
    """Time on this device by module, model beside model.

    If a kernel computes a whole block of one model, the blocks of all models are drawn whole.

    Args:
      latencies: those of `profile_latency`, by the models' names; the others are compared with the first.
      path: see `shiftaddvit_jax.pictures`.
    """
    whole_blocks = any(_is_block(name) for latency in latencies.values() for name in latency.module_ms)
    panel = {}
    for model, latency in latencies.items():
        groups: dict[str, float] = {}
        for name, milliseconds in latency.module_ms.items():
            group = _latency_group(name, whole_blocks)
            groups[group] = groups.get(group, 0.0) + milliseconds
        # A bar has no negative length: if the parts alone are slower than the whole, nothing is unexplained.
        groups["between modules"] = max(0.0, latency.unexplained_ms)
        groups["call"] = latency.call_ms
        panel[model] = groups
    images = max(latency.batch for latency in latencies.values())
    totals = {model: latency.whole_ms for model, latency in latencies.items()}
    figure = _plot_breakdowns(
        {"on this device": panel}, f"median time (ms) of {_images(images)}", "ms", totals
    )
    return save_figure(figure, path)


def _images(batch):
    return "an image" if batch == 1 else f"{batch} images"


def _is_block(name):
    return name.split("/")[-1].removeprefix("block").isdigit()


def _latency_group(name, whole_blocks):
    parts = name.split("/")
    inside = [part for part in parts if not part.removeprefix("block").isdigit()]
    if whole_blocks and len(inside) < len(parts):
        stage = parts[: next(index for index, part in enumerate(parts) if _is_block(part))]
        return "/".join([*stage, "blocks"])
    return "/".join(inside[:2])


def _plot_breakdowns(panels, label, unit, totals=None):
    """Bars of ``panels``, which are ``{title: {model: {group: value}}}``."""
    prepared = {title: _merge_small(models) for title, models in panels.items()}
    rows = max(len(groups) for groups, _ in prepared.values())
    models = len(next(iter(panels.values())))
    size = (max(7, 5.2 * len(panels)), 1.6 + rows * (0.16 + 0.16 * models))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for panel, (title, (groups, values)) in zip(axes, prepared.items(), strict=True):
        known = totals or {model: sum(panels[title][model].values()) for model in values}
        _draw_bars(panel, groups, values, known, unit)
        panel.set_title(title)
        panel.set_xlabel(label)
    return figure


def _draw_bars(panel: Axes, groups, values, totals, unit):
    height = 0.8 / len(values)
    first = next(iter(totals.values()))
    for index, (model, color) in enumerate(zip(values, itertools.cycle(COLORS), strict=False)):
        change = f", {100 * (totals[model] / first - 1):+.1f} %" if index and first else ""
        places = np.arange(len(groups)) + (index - (len(values) - 1) / 2) * height
        label = f"{model}: {_rounded(totals[model])} {unit}{change}"
        panel.barh(places, values[model], 0.9 * height, color=color, label=label)
    panel.set_yticks(range(len(groups)), groups)
    panel.invert_yaxis()
    panel.margins(y=0.01)
    panel.grid(axis="x", alpha=0.3)
    panel.legend(loc="lower center", bbox_to_anchor=(0.5, 1.06), frameon=False)


def _merge_small(models: Mapping[str, Mapping[str, float]]):
    """The groups, those small in every model merged into ``others``, and the values of each model."""
    names = list(dict.fromkeys(group for groups in models.values() for group in groups))
    least = SMALL * max(sum(groups.values()) for groups in models.values())
    large = [name for name in names if max(groups.get(name, 0.0) for groups in models.values()) > least]
    values = {model: [groups.get(name, 0.0) for name in large] for model, groups in models.items()}
    others = {model: sum(groups.values()) - sum(values[model]) for model, groups in models.items()}
    if max(others.values()) > 0:
        large.append("others")
        for model, rest in others.items():
            values[model].append(rest)
    return [name or "model" for name in large], values


def _rounded(value):
    """Three digits, without an exponent."""
    return f"{value:,.{max(0, 2 - math.floor(math.log10(value)))}f}" if value > 0 else "0"


def plot_pareto(points: Sequence[Mapping[str, Any]], path: str | Path | None = None) -> Figure:
    """Accuracy against energy and against latency, a point a model, with the Pareto front.

    Args:
      points: ``name``, ``top1`` (a share), and ``energy_mj`` and ``latency_ms`` of one image, for each model.
      path: see `shiftaddvit_jax.pictures`.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    axes = {"energy_mj": "energy (mJ an image)", "latency_ms": "median latency (ms an image)"}
    for panel, (key, label) in zip(figure.subplots(1, 2), axes.items(), strict=True):
        front = pareto_front([(point[key], point["top1"]) for point in points])
        costs, accuracies = zip(*front, strict=True)
        accuracies = [100 * accuracy for accuracy in accuracies]
        panel.step(costs, accuracies, where="post", color="0.6", linewidth=1, label="Pareto front", zorder=1)
        for point, color in zip(points, itertools.cycle(COLORS), strict=False):
            panel.scatter(
                point[key], 100 * point["top1"], color=color, s=60, zorder=2, edgecolors="k", linewidths=0.5
            )
            panel.annotate(
                point["name"], (point[key], 100 * point["top1"]), (7, 5), textcoords="offset points"
            )
        panel.set_xlabel(label)
        panel.set_ylabel("top-1 accuracy (%)")
        panel.set_xlim(0, 1.3 * max(point[key] for point in points))  # with room for names
        panel.xaxis.set_major_locator(MaxNLocator(6))
        panel.margins(y=0.2)
        panel.grid(alpha=0.3)
        panel.legend(loc="lower right", frameon=False)
    return save_figure(figure, path)


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """The points (cost, accuracy) that no other point betters in both, cheapest first."""
    front: list[tuple[float, float]] = []
    for cost, accuracy in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or accuracy > front[-1][1]:
            front.append((cost, accuracy))
    return front


def plot_expert_latency(report: Mapping[str, Any], path: str | Path | None = None) -> Figure:
    """Both experts' times against tokens, with the lines through them; a panel for each shape of layer.

    Args:
      report: that of `measure_latency`.
      path: see `shiftaddvit_jax.pictures`.
    """
    shapes: dict[tuple[int, ...], Mapping[str, Any]] = {}
    for layer in report["layers"]:
        shapes.setdefault((layer["tokens"], layer["inputs"], layer["outputs"]), layer)
    columns = min(4, len(shapes))
    rows = math.ceil(len(shapes) / columns)
    figure = Figure(figsize=(max(4.5, 2.9 * columns), 0.6 + 2.3 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False).ravel()
    for panel, ((tokens, inputs, outputs), layer) in zip(axes, shapes.items(), strict=False):
        ends = np.array([0, max(layer["counts"])])
        for expert in EXPERTS:
            measured, color = layer[expert], EXPERT_COLORS[expert]
            line = 1e3 * measured["base_ms"] + measured["us_per_token"] * ends
            panel.plot(ends, line, color=color, linewidth=1)
            times = 1e3 * np.array(measured["median_ms"])
            marker = "o" if expert == "dense" else "s"
            panel.plot(layer["counts"], times, marker, color=color, label=f"{expert} expert")
        panel.axvline(tokens, color="0.5", linewidth=1, linestyle=":", label="the layer's own tokens")
        panel.set_title(f"{inputs} to {outputs} channels", fontsize=10)
        highest = max(max(layer[expert]["median_ms"]) for expert in EXPERTS)
        panel.set_ylim(0, 1.2 * 1e3 * highest)
        panel.grid(alpha=0.3)
    for panel in axes[len(shapes) :]:
        panel.set_axis_off()
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=3, frameon=False)
    figure.supxlabel("tokens")
    figure.supylabel("median time (µs)")
    return save_figure(figure, path)


def plot_bench(report: Mapping[str, Any], path: str | Path | None = None) -> Figure:
    """A bar for each contestant in a report of `bench_model` or `bench_kernels`.

    A model's bar is its milliseconds, with the 10th and 90th percentiles. Kernels' times are far apart, so a
    kernel's bar is its ratio to XLA's dense float32, which is drawn as a line. Colors tell dense models'
    runtimes apart, and kernels' contestants.
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
        panel.set_xlabel("median time (ms), with the 10th and 90th percentiles")
        panel.set_title(f"{subject_of(report)}, on {threads}")
    return save_figure(figure, path)


def plot_front(report: Mapping[str, Any], path: str | Path | None = None) -> Figure:
    """The front of a search, beside the models whose layers are all the same and the baselines.

    Args:
      report: what ``shiftaddvit search --json`` writes.
      path: see `shiftaddvit_jax.pictures`.
    """
    figure = Figure(figsize=(6.5, 4), layout="constrained")
    axes = figure.add_subplot()
    front = report["front"]
    axes.step(
        [point["cost"] for point in front],
        [point["measured"] for point in front],
        where="post",
        marker="o",
        color=COLORS[0],
        label="search",
    )
    for color, style, name in zip(COLORS[1:], ("--", "-."), ("random", "greedy"), strict=False):
        points = [(point["budget"], point[name]) for point in front if point[name] is not None]
        if points:
            axes.step(*zip(*points, strict=True), style, where="post", color=color, label=name)
    for choice, same in report["uniform"].items():
        axes.plot(same["cost"], same["measured"], "k^")
        axes.annotate(
            f"all {choice}", (same["cost"], same["measured"]), xytext=(4, 4), textcoords="offset points"
        )
    axes.axvline(report["budget"], color="0.7", linestyle=":", label="budget")
    axes.margins(x=0.15, y=0.12)
    positive = [point["measured"] for point in front if point["measured"] > 0]
    if report["loss"] == "error" and positive:
        # Errors span decades, and that of the dense model is 0.
        axes.set_yscale("symlog", linthresh=min(positive))
    axes.set_xlabel(f"cost ({report['unit']})")
    axes.set_ylabel(
        "error (% of the logits' variance)" if report["loss"] == "error" else "cross-entropy (nats)"
    )
    axes.legend()
    return save_figure(figure, path)
