"""A page of HTML in a single file, with all tables and pictures of a model."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shiftaddvit_jax.bench.latency import Latency
from shiftaddvit_jax.bench.rounds import available_threads, describe_machine
from shiftaddvit_jax.costs.counting import PRIMITIVES
from shiftaddvit_jax.costs.report import describe_shift_share, group_modules
from shiftaddvit_jax.files import whole_file
from shiftaddvit_jax.models.variables import count_parameters
from shiftaddvit_jax.pictures.costs import ENERGY_TITLES, plot_energy, plot_latency, plot_pareto
from shiftaddvit_jax.pictures.gallery import PICTURES, kernel_and_xla_ms, measured_latencies
from shiftaddvit_jax.pictures.html import details, document, figure, note, paragraph, section, table
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
    times = kernel_and_xla_ms(subjects)
    page = render_page(subjects, reports, measured_latencies(subjects), times, pixels)
    with whole_file(file) as temporary:
        temporary.write_text(page, encoding="utf-8")


def render_page(
    subjects: Sequence[Subject],
    reports: Sequence[Mapping[str, Any]],
    latencies: Mapping[str, Latency],
    times: Mapping[str, tuple[float | None, float]],
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
        paragraph(f"{model['name']}, {kinds}; images of {side} x {side} pixels.{assumed}"),
        section("Summary", _summary(subjects, reports, times)),
        section("Energy", paragraph(energy), figure(plot_energy(named), PICTURES["energy"].caption)),
        section(
            "Latency",
            paragraph(time),
            figure(plot_latency(latencies), PICTURES["latency"].caption),
            details("Each module alone", _latency_table(latencies[subject.name])),
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
        drawn = figure(plot_pareto(points), PICTURES["pareto"].caption)
        sections.append(section("Accuracy and cost", drawn))
    trained = TRAINED if subject.is_trained else {}
    for kind, title in track(trained.items(), "drawing", len(trained)):
        sections.append(section(title, _drawn(kind, subjects, pixels)))
    sections.append(
        section(
            "Modules",
            _module_table(group_modules(report["modules"]), report),
            details("Every module", _module_table(report["modules"], report)),
        )
    )
    return document(subject.name, sections)


def _drawn(kind, subjects, pixels):
    """A picture of `PICTURES`, or a line that says why there is none."""
    picture = PICTURES[kind]
    if picture.sees_images and pixels is None:
        return note("Not drawn: there are no images to show it on; give some with --images.")
    shown = subjects[-1:] if picture.most == 1 else [each for each in subjects if each.is_trained]
    try:
        return figure(picture.draw(shown, pixels), picture.caption)
    except ValueError as error:
        return note(f"Not drawn: {error}.")


def _summary(subjects, reports, times):
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
        ("latency here, on the kernels (ms)", [times[each.name][0] for each in subjects]),
        ("latency here, on XLA (ms)", [times[each.name][1] for each in subjects]),
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
    return table(head, body)


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
    return table(["module", *heads, "weights (kB)", "activations (kB)"], rows, has_total=True)


def _latency_table(latency):
    rows = [[name, _number(1e3 * value)] for name, value in latency.module_ms.items()]
    rows += [["call of a program", _number(1e3 * latency.call_ms)]]
    rows += [
        ["not explained", _number(1e3 * latency.unexplained_ms)],
        ["whole", _number(1e3 * latency.whole_ms)],
    ]
    return table(["module", "median (µs)"], rows, has_total=True)


def _change(before, after):
    return f"{100 * (after / before - 1):+.1f} %" if before and after is not None else ""


def _number(value):
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}" if value else "0"
