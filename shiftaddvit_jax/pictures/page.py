"""A page of HTML in a single file, with all tables and pictures of a model."""

import base64
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from shiftaddvit_jax.bench.latency import Latency
from shiftaddvit_jax.bench.rounds import available_threads, describe_machine
from shiftaddvit_jax.costs.counting import PRIMITIVES
from shiftaddvit_jax.costs.report import describe_shift_share, group_modules
from shiftaddvit_jax.files import whole_file
from shiftaddvit_jax.models.variables import count_parameters
from shiftaddvit_jax.pictures.costs import ENERGY_TITLES, plot_energy, plot_latency, plot_pareto
from shiftaddvit_jax.pictures.gallery import PICTURES, measured_latencies
from shiftaddvit_jax.pictures.style import render_figure
from shiftaddvit_jax.progress import track
from shiftaddvit_jax.subject import Pixels, Subject

# The pictures that need trained weights, with their headings on the page.
TRAINED = {
    "routing": "Routing",
    "attention": "Attention",
    "weights": "Weights",
    "training": "Training",
    "shares": "Routing over training",
}
STYLE = """
:root { color-scheme: light dark; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 0 auto; padding: 1rem 1.5rem 4rem; }
h1 { font-size: 1.7rem; margin-bottom: 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; }
p { max-width: 46rem; } .scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
th, td { padding: .25rem .9rem .25rem 0; border-bottom: 1px solid #8885; }
th, td { text-align: right; white-space: nowrap; }
th:first-child, td:first-child { text-align: left; } th { vertical-align: bottom; }
tr:last-child.total td { font-weight: 600; }
figure { margin: 1rem 0; } figure img { max-width: 100%; height: auto; background: #fff; border-radius: 6px; }
figcaption, .note { color: GrayText; font-size: .9rem; } summary { cursor: pointer; margin: .5rem 0; }
"""


def write_page(
    file: str | Path,
    subjects: Sequence[Subject],
    reports: Sequence[Mapping[str, Any]],
    pixels: Pixels | None = None,
) -> None:
    """Write a page about the last of ``subjects``, compared with the others, whole or not at all.

    The page needs no network and no other file. The models are timed on this device.

    Args:
      file: the page.
      subjects: models; the last is compared with the first.
      reports: the `cost_report` of each.
      pixels: images for the pictures that show images; without pixels these are left out.
    """
    page = render_page(subjects, reports, measured_latencies(subjects), pixels)
    with whole_file(file) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render_page(
    subjects: Sequence[Subject],
    reports: Sequence[Mapping[str, Any]],
    latencies: Mapping[str, Latency],
    pixels: Pixels | None,
) -> str:
    """The page that `write_page` writes."""
    subject, report = subjects[-1], reports[-1]
    named = dict(zip([each.name for each in subjects], reports, strict=True))
    machine = describe_machine(available_threads())
    model, side = report["model"], report["model"]["image_size"]
    kinds = ", ".join(
        f"{name} {'/'.join(dict.fromkeys(model[name]))}" for name in ("attention", "mlp", "projections")
    )
    assumed = ""
    if report["shift_share"] is not None:
        share = describe_shift_share(report["shift_share"])
        assumed = f" Costs are those with {share} of tokens on shift experts."
    energy = (
        "Arithmetic alone, and with data movement on an Eyeriss-like accelerator, by this project's model "
        "and by that of the paper's authors; 45 nm."
    )
    time = f"Medians on {machine['cpu']}, {machine['threads']} threads, one image, shift layers packed."
    sections = [
        f"<h1>{escape(subject.name)}</h1>",
        _paragraph(f"{model['name']}, {kinds}; images of {side} x {side} pixels.{assumed}"),
        _section("Summary", _summary(subjects, reports, latencies)),
        _section("Energy", _paragraph(energy), _figure(plot_energy(named), PICTURES["energy"].caption)),
        _section(
            "Latency",
            _paragraph(time),
            _figure(plot_latency(latencies), PICTURES["latency"].caption),
            _details("Each module alone", _latency_table(latencies[subject.name])),
        ),
    ]
    if len(subjects) > 1 and all(each.top1 is not None for each in subjects):
        points = [
            {
                "name": name,
                "top1": each.top1,
                "energy_mj": costs["energy_mj"]["accelerator"] / costs["batch"],
                "latency_ms": latencies[name].whole_ms,
            }
            for each, (name, costs) in zip(subjects, named.items(), strict=True)
        ]
        figure = plot_pareto(points)
        sections.append(_section("Accuracy and cost", _figure(figure, PICTURES["pareto"].caption)))
    trained = TRAINED if subject.is_trained else {}
    for kind, title in track(trained.items(), "drawing", len(trained)):
        sections.append(_section(title, _drawn(kind, subjects, pixels)))
    sections.append(
        _section(
            "Modules",
            _module_table(group_modules(report["modules"]), report),
            _details("Every module", _module_table(report["modules"], report)),
        )
    )
    head = (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{escape(subject.name)}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
    )
    return f"{head}\n<body>\n{chr(10).join(sections)}\n</body></html>\n"


def _drawn(kind, subjects, pixels):
    """A picture of `PICTURES`, or a line that says why there is none."""
    picture = PICTURES[kind]
    if picture.sees_images and pixels is None:
        return _note("Not drawn: there are no images to show it on; give some with --images.")
    shown = subjects[-1:] if picture.most == 1 else [each for each in subjects if each.is_trained]
    try:
        return _figure(picture.draw(shown, pixels), picture.caption)
    except ValueError as error:
        return _note(f"Not drawn: {error}.")


def _summary(subjects, reports, latencies):
    """A table of each model's totals, a column a model."""
    rows = [
        ("top-1 accuracy (%)", [each.top1 and 100 * each.top1 for each in subjects]),
        ("parameters (M)", [count_parameters(each.model) / 1e6 for each in subjects]),
        *((f"{name} (M)", [each[name] / 1e6 for each in reports]) for name in PRIMITIVES),
        *(
            (f"energy, {name} (mJ)", [each["energy_mj"].get(name) for each in reports])
            for name in ENERGY_TITLES
        ),
        ("accelerator latency (ms)", [each["latency_ms"] for each in reports]),
        ("latency here (ms)", [latencies[each.name].whole_ms for each in subjects]),
        ("weights, packed (kB)", [each["weight_bytes"] / 1e3 for each in reports]),
        ("activations (kB)", [each["activation_bytes"] / 1e3 for each in reports]),
    ]
    compared = len(subjects) > 1
    body = []
    for name, values in rows:
        if any(values):
            change = [_change(values[0], values[-1])] if compared else []
            body.append([name, *map(_number, values), *change])
    head = ["", *(each.name for each in subjects), *(["change"] if compared else [])]
    return _table(head, body)


def _module_table(modules, total):
    operations = [name for name in PRIMITIVES if total[name]]
    energies = [name for name in ENERGY_TITLES if name in total["energy_mj"]]
    rows = [
        [
            name or "the model itself",
            *(_number(costs[operation] / 1e6) for operation in operations),
            *(_number(costs["energy_mj"][model]) for model in energies),
            _number(costs["weight_bytes"] / 1e3),
            _number(costs["activation_bytes"] / 1e3),
        ]
        for name, costs in [*modules.items(), ("total", total)]
    ]
    heads = [*(f"{name} (M)" for name in operations), *(f"{name} (mJ)" for name in energies)]
    return _table(["module", *heads, "weights (kB)", "activations (kB)"], rows, has_total=True)


def _latency_table(latency):
    rows = [[name, _number(1e3 * value)] for name, value in latency.module_ms.items()]
    rows += [["call of a program", _number(1e3 * latency.call_ms)]]
    rows += [
        ["not explained", _number(1e3 * latency.unexplained_ms)],
        ["whole", _number(1e3 * latency.whole_ms)],
    ]
    return _table(["module", "median (µs)"], rows, has_total=True)


def _change(before, after):
    return f"{100 * (after / before - 1):+.1f} %" if before and after is not None else ""


def _number(value):
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if value else "0"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]], has_total: bool = False) -> str:
    def row(cells, tag, kind=""):
        return f"<tr{kind}>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    kind = ' class="total"' if has_total else ""
    body = "\n".join(row(cells, "td", kind) for cells in rows)
    return f'<div class="scroll"><table><thead>{row(head, "th")}</thead>\n<tbody>{body}</tbody></table></div>'


def _figure(figure: Figure, caption: str) -> str:
    """A figure as an SVG in an image of its own, so that no two figures' names can clash."""
    source = "data:image/svg+xml;base64," + base64.b64encode(render_figure(figure, "svg")).decode()
    text = escape(caption)
    return f'<figure><img src="{source}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def _section(title, *parts):
    return f"<h2>{escape(title)}</h2>\n" + "\n".join(parts)


def _details(title, body):
    return f"<details><summary>{escape(title)}</summary>{body}</details>"


def _paragraph(text):
    return f"<p>{escape(text)}</p>"


def _note(text):
    return f'<p class="note">{escape(text)}</p>'
