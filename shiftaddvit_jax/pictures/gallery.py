"""The table of all pictures of trained models: by name, how models and images become a figure."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.figure import Figure

from shiftaddvit_jax.bench.latency import Latency, compare_latencies, whole_latencies
from shiftaddvit_jax.costs.report import cost_report
from shiftaddvit_jax.models.registry import check_classifier
from shiftaddvit_jax.names import SHIFT_SHARE
from shiftaddvit_jax.ops.implementation.custom_call import unavailable
from shiftaddvit_jax.pictures.capture import attention_maps, routed_tokens, shift_weights
from shiftaddvit_jax.pictures.costs import plot_energy, plot_latency, plot_pareto
from shiftaddvit_jax.pictures.inside import plot_attention, plot_routing, plot_weights
from shiftaddvit_jax.pictures.style import check_picture, save_figure
from shiftaddvit_jax.pictures.training import plot_history, plot_routing_history
from shiftaddvit_jax.subject import Pixels, Subject, as_inputs


class Picture(NamedTuple):
    """How a picture is made.

    Attributes:
      draw: from subjects and pixels to a figure; it raises a ``ValueError`` if they have nothing to show.
      caption: what it shows, in a sentence.
      least: how many subjects it needs.
      most: how many subjects it takes; None for any number.
      sees_images: whether it needs pixels.
    """

    draw: Callable[[Sequence[Subject], Pixels | None], Figure]
    caption: str
    least: int = 1
    most: int | None = None
    sees_images: bool = False


def draw_picture(kind: str, subjects: Sequence[Subject], pixels: Pixels | None, path: str | Path) -> Figure:
    """Draw one of `PICTURES` and write it to ``path``, a PNG or SVG.

    Raises:
      ValueError: a path without such an ending, another number of subjects than the picture takes, or
        subjects that have nothing to show in it.
    """
    picture = PICTURES[kind]
    check_picture(path)
    if len(subjects) < picture.least or (picture.most is not None and len(subjects) > picture.most):
        most = f"to {picture.most}" if picture.most is not None else "or more"
        raise ValueError(f"{kind} shows {picture.least} {most} models, got {len(subjects)}")
    return save_figure(picture.draw(subjects, pixels), path)


def measured_shares(subject: Subject, pixels: Pixels) -> dict[str, float]:
    """The share of the images' tokens on each shift expert, by the MoE layer's name."""
    routed = routed_tokens(subject.model, subject.variables, as_inputs(subject, pixels))
    return {name: float(shifted.mean()) for name, shifted in routed.items()}


def measured_latencies(subjects: Sequence[Subject]) -> dict[str, Latency]:
    """The latency of one image by the subject's name; what can be packed is packed."""
    return compare_latencies({each.name: (*each.for_inference(), _image(each)) for each in subjects})


def kernel_and_xla_ms(subjects: Sequence[Subject]) -> dict[str, tuple[float | None, float]]:
    """Milliseconds of one image by the subject's name: as it is shipped, on the kernels, and on XLA.

    The first is None where no kernels run.
    """
    models = {(each.name, "xla"): (*each.on_xla(), _image(each)) for each in subjects}
    if unavailable() is None:
        models |= {(each.name, "kernels"): (*each.for_inference(), _image(each)) for each in subjects}
    times = whole_latencies(models)
    return {each.name: (times.get((each.name, "kernels")), times[each.name, "xla"]) for each in subjects}


def _image(subject):
    """One image of the subject's size."""
    check_classifier(subject.model, "a time of one image")
    side = subject.model.image_size
    return np.random.default_rng(0).standard_normal((1, side, side, 3), np.float32)


def _reports(subjects, pixels):
    shares = [measured_shares(subject, pixels) or SHIFT_SHARE for subject in subjects]
    return {
        subject.name: cost_report(subject.model, subject.variables, shift_share=share)
        for subject, share in zip(subjects, shares, strict=True)
    }


def _energy(subjects, pixels):
    return plot_energy(_reports(subjects, pixels))


def _latency(subjects, pixels):
    return plot_latency(measured_latencies(subjects))


def _pareto(subjects, pixels):
    unknown = [subject.name for subject in subjects if subject.top1 is None]
    if unknown:
        raise ValueError(f"{unknown[0]} has no accuracy: it was not trained here; take models that were")
    reports, latencies = _reports(subjects, pixels), measured_latencies(subjects)
    points = [
        {
            "name": subject.name,
            "top1": subject.top1,
            "energy_mj": reports[subject.name]["energy_mj"]["accelerator"],
            "latency_ms": latencies[subject.name].whole_ms,
        }
        for subject in subjects
    ]
    return plot_pareto(points)


def _routing(subjects, pixels):
    (subject,) = subjects
    routed = routed_tokens(subject.model, subject.variables, as_inputs(subject, pixels[:2]))
    return plot_routing(pixels[:2], routed)


def _attention(subjects, pixels):
    maps = {}
    for subject in subjects:
        found = attention_maps(subject.model, subject.variables, as_inputs(subject, pixels[:1]))
        kinds = "/".join(dict.fromkeys(subject.model.attention))
        maps[f"{subject.name}\n({kinds})"] = {name: weights[0] for name, weights in found.items()}
    return plot_attention(pixels[0], maps)


def _weights(subjects, pixels):
    (subject,) = subjects
    return plot_weights(shift_weights(subject.model, subject.variables))


def _training(subjects, pixels):
    histories = {subject.name: subject.history for subject in subjects if subject.history}
    if not histories:
        raise ValueError("there is no metrics.jsonl beside the model: it was not trained here")
    return plot_history(histories)


def _shares(subjects, pixels):
    (subject,) = subjects
    if not subject.history:
        raise ValueError("there is no metrics.jsonl beside the model: it was not trained here")
    return plot_routing_history(subject.history)


PICTURES = {
    "energy": Picture(
        _energy, "Energy of the products of each part of the model, by three models of it.", sees_images=True
    ),
    "latency": Picture(_latency, "Milliseconds of each part of the model on this device, for one image."),
    "pareto": Picture(_pareto, "Accuracy against energy and against latency.", 2, sees_images=True),
    "routing": Picture(
        _routing, "Which tokens each mixture sends to which expert.", most=1, sees_images=True
    ),
    "attention": Picture(
        _attention, "What the marked token attends to, the mean over heads.", sees_images=True
    ),
    "weights": Picture(_weights, "Weights before and after rounding to powers of two.", most=1),
    "training": Picture(_training, "Loss and accuracy over training."),
    "shares": Picture(_shares, "Tokens on each layer's shift expert over training.", most=1),
}
