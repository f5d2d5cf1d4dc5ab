"""Means of accuracy and loss over a distribution of perturbations, by QMCPy's points and stopping rules.

One evaluation is one perturbation of all images. All models see the same perturbations, so that their
difference needs fewer of them.
"""

import logging
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt8

from shiftaddvit_jax.classifier import Classifier
from shiftaddvit_jax.data import Examples
from shiftaddvit_jax.data.images import UnreadableImage, whole
from shiftaddvit_jax.data.preprocessing import crop
from shiftaddvit_jax.data.stream import map_ahead
from shiftaddvit_jax.models.preprocessing import Preprocessing
from shiftaddvit_jax.ops.perturb import (
    add_noise,
    adjust_brightness,
    adjust_contrast,
    gaussian_blur,
    rotate_hue,
    warp,
)
from shiftaddvit_jax.optional import require
from shiftaddvit_jax.progress import progress_bar
from shiftaddvit_jax.qmc import DigitalNet, Lattice
from shiftaddvit_jax.robustness.design import FEWEST, Design

logger = logging.getLogger(__name__)

BATCH = 128
REPLICATIONS = 16  # of points, whose means Student's t compares
CAUTION = 4  # times QMCPy's own bound of the cone rules; docs/robustness.md found that too small
UNBOUNDED = 1e6  # nats: the loss has no tolerance


class Estimate(NamedTuple):
    """A mean over perturbations.

    Attributes:
      mean: of an accuracy, a share of the images, or of a loss, in nats.
      half_width: how far it may be from the true mean, if the rule's condition holds.
    """

    mean: float
    half_width: float


class Means(NamedTuple):
    """Of a model, or of the first less the second.

    Attributes:
      accuracy: share of the images whose most probable class is theirs.
      loss: cross-entropy in nats.
    """

    accuracy: Estimate
    loss: Estimate


class Robustness(NamedTuple):
    """What `measure_robustness` finds.

    Attributes:
      design: what it was asked.
      images: how many were read.
      models: means of each model.
      difference: means of the first model less the second; None of a single one.
      unperturbed: accuracy and loss of each model on the images as they are.
      values: the parameters of each evaluation.
      scores: accuracy and loss of each model at each.
      sequence: where one kernel's matrix on the evaluations is fast, the points behind them; a lattice's are
        folded by the baker's transform.
    """

    design: Design
    images: int
    models: tuple[Means, ...]
    difference: Means | None
    unperturbed: Float[np.ndarray, "models 2"]
    values: Float[np.ndarray, "evaluations parameters"]
    scores: Float[np.ndarray, "evaluations models 2"]
    sequence: DigitalNet | Lattice | None


def measure_robustness(models: Sequence[Classifier], examples: Examples, design: Design) -> Robustness:
    """Mean accuracy and loss of one model or two over the perturbations of a design.

    Models run as they are: packed ones on kernels, others on XLA, in one program for every perturbation.
    Images are perturbed at the size that a model sees, before they are normalized. Images that cannot be read
    are named in the log and left out.

    Args:
      models: one, or two with the same classes.
      examples: images with labels of those classes.
      design: which perturbations, and to which tolerance.

    Raises:
      ValueError: QMCPy missing, no images, none that can be read, logits that are not finite, or a tolerance
        that is not met within the design's evaluations.
    """
    return mean_scores(Scorer(models, examples, [each.name for each in design.parameters]), design)


def mean_scores(scorer: "Scorer", design: Design) -> Robustness:
    """`measure_robustness` of models and images that a scorer has, so that several designs share its program.

    Raises:
      ValueError: QMCPy missing, logits that are not finite, or a tolerance that is not met.
    """
    require("qmc", "a mean over perturbations", "qmcpy")
    unperturbed = scorer(None)
    models = len(unperturbed)
    with progress_bar() as bar:
        task = bar.add_task("perturbing", total=FEWEST, note="")
        values, scores = [], []

        def evaluate(points: np.ndarray) -> np.ndarray:
            """Scores and their differences, [outputs, *batch], at points [*batch, parameters]."""
            rows = points.reshape(-1, points.shape[-1])
            bar.update(task, total=len(values) + len(rows))
            for row in rows:
                values.append(row)
                scores.append(scorer(row))
                bar.advance(task)
            found = np.stack(scores[-len(rows) :])
            return _with_difference(found).T.reshape(-1, *points.shape[:-1])

        def show(half_widths: np.ndarray) -> None:
            bar.update(task, note=f"± {100 * half_widths[::2].max():.2g} points")

        estimates, sampler = _integrate(design, 2 * (2 * models - 1), evaluate, show)
    means = [Means(*pair) for pair in zip(estimates[::2], estimates[1::2], strict=True)]
    return Robustness(
        design,
        scorer.images,
        tuple(means[:models]),
        means[-1] if models == 2 else None,
        unperturbed,
        np.stack(values),
        np.stack(scores),
        _sequence(design, sampler),
    )


def _with_difference(scores):
    """Scores [n, models, 2] in rows, with the first model's less the second's behind them."""
    rows = scores.reshape(len(scores), -1)
    return rows if scores.shape[1] == 1 else np.concatenate([rows, scores[:, 0] - scores[:, 1]], axis=1)


class Scorer:
    """A function of a perturbation, None for none, to accuracy and loss of each model, by one program.

    Attributes:
      images: how many there are.
    """

    def __init__(self, models: Sequence[Classifier], examples: Examples, names: Sequence[str]) -> None:
        different = list(dict.fromkeys(model.preprocessing for model in models))
        pixels, labels, places = _read(examples, different)
        self.images, self._models, self._names = len(labels), models, names
        batch = min(BATCH, len(labels))
        padding = -len(labels) % batch
        labels = np.pad(labels, (0, padding), constant_values=-1)  # no class: what fills up does not count
        places = np.pad(places, (0, padding))
        pixels = [np.pad(each, [(0, padding), (0, 0), (0, 0), (0, 0)]) for each in pixels]
        parts = [slice(start, start + batch) for start in range(0, len(labels), batch)]
        self._batches = jax.device_put(
            [(tuple(each[part] for each in pixels), labels[part], places[part]) for part in parts]
        )
        self._variables = jax.device_put(tuple(model.variables for model in models))

        @jax.jit
        def sums(variables, pixels, labels, places, values):
            """Hits and the sum of losses of each model."""
            seen = {
                each: _normalize(perturb(x.astype(jnp.float32) / 255, values, places), each)
                for each, x in zip(different, pixels, strict=True)
            }
            found = []
            for model, own in zip(models, variables, strict=True):
                logits = jnp.asarray(model.model.apply(own, seen[model.preprocessing]), jnp.float32)
                likely = jax.nn.log_softmax(logits)
                own_class = jnp.take_along_axis(likely, jnp.maximum(labels, 0)[:, None], axis=-1)[:, 0]
                hits = jnp.argmax(logits, axis=-1) == labels
                found.append(jnp.stack([jnp.sum(hits), -jnp.sum(jnp.where(labels >= 0, own_class, 0))]))
            return jnp.stack(found)

        self._sums = sums

    def __call__(self, values: Float[np.ndarray, "parameters"] | None) -> Float[np.ndarray, "models 2"]:
        """Accuracy and loss of each model.

        Raises:
          ValueError: logits that are not finite.
        """
        given = None
        if values is not None:
            given = dict(zip(self._names, np.asarray(values, np.float32), strict=True))
        parts = [self._sums(self._variables, *batch, given) for batch in self._batches]
        found = np.sum([np.asarray(part, np.float64) for part in parts], axis=0)
        for model, finite in zip(self._models, np.isfinite(found).all(axis=1), strict=True):
            if not finite:
                raise ValueError(f"{model.source.name} has logits that are not finite; expected numbers")
        return found / self.images


def perturb(
    images: Float[Array, "batch height width 3"],
    values: dict[str, Float[Array, ""]] | None,
    places: Int[Array, "batch"],
) -> Float[Array, "batch height width 3"]:
    """Images in [0, 1], all perturbed alike: warped, blurred, recolored, then noisy.

    Args:
      images: what is perturbed.
      values: a design's parameters by their names, those that there are; None for no perturbation.
      places: each image's place among all, from which its noise is drawn.
    """
    given = values or {}
    geometry = {name: given[name] for name in ("rotation", "scale", "shift_x", "shift_y") if name in given}
    if geometry:
        images = warp(images, **geometry)
    for name, operation in (
        ("blur", gaussian_blur),
        ("brightness", adjust_brightness),
        ("contrast", adjust_contrast),
        ("hue", rotate_hue),
    ):
        if name in given:
            images = operation(images, given[name])
    if "noise" in given:
        keys = jax.vmap(jax.random.fold_in, (None, 0))(jax.random.key(0), places)
        noise = jax.vmap(lambda key: jax.random.normal(key, images.shape[1:], images.dtype))(keys)
        images = add_noise(images, noise, given["noise"])
    return images


def _normalize(images, preprocessing: Preprocessing):
    """Images in [0, 1] as the model takes them; `normalize_as` does it to whole numbers."""
    if preprocessing.channels == "bgr":
        images = images[..., ::-1]
    mean, deviation = (
        np.asarray(color, np.float32) for color in (preprocessing.mean, preprocessing.deviation)
    )
    return (images * (255 * preprocessing.rescale) - mean) / deviation


def _read(
    examples: Examples, different: Sequence[Preprocessing]
) -> tuple[list[UInt8[np.ndarray, "images size size 3"]], np.ndarray, np.ndarray]:
    """Pixels of all images as each preprocessing cuts them, their labels and their places."""

    def read(index):
        try:
            pixels = whole(examples.open(index))
            return [crop(pixels, each) for each in different]
        except UnreadableImage as error:
            logger.warning("left out: %s", error)
            return None

    if not len(examples):
        raise ValueError("there is nothing to perturb: expected at least one image, got none")
    found = list(map_ahead(read, range(len(examples)), ahead=2 * BATCH))
    places = np.array([place for place, pixels in enumerate(found) if pixels is not None], np.int32)
    if not len(places):
        raise ValueError("there is nothing to perturb: none of the images can be read")
    pixels = [np.stack(each) for each in zip(*filter(None, found), strict=True)]
    return pixels, np.asarray(examples.labels, np.int32)[places], places


def _integrate(
    design: Design,
    outputs: int,
    evaluate: Callable[[np.ndarray], np.ndarray],
    show: Callable[[np.ndarray], None],
) -> tuple[list[Estimate], Any]:
    """Means of what ``evaluate`` returns, accuracies at even places to the tolerance; and QMCPy's points."""
    import qmcpy

    class Scores(qmcpy.CustomFun):
        """Outputs that share all points, and say how well they are known after each doubling."""

        def bound_fun(self, low, high):
            show((high - low) / 2)
            return low, high

        def dependency(self, flags):
            return np.full(self.d_indv, flags.all())

    replications = REPLICATIONS if design.rule == "student" else None
    sampler = _sampler(design, replications)
    distributions = [as_scipy(parameter.distribution) for parameter in design.parameters]
    scores = Scores(qmcpy.SciPyWrapper(sampler, distributions), evaluate, dimension_indv=(outputs,))
    by_points = {
        "digital_net": qmcpy.CubQMCNetG,
        "lattice": qmcpy.CubQMCLatticeG,
        "iid": qmcpy.CubMCCLTVec,
    }
    rule = qmcpy.CubQMCRepStudentT if design.rule == "student" else by_points[design.points]
    settings = {"fudge": lambda m: CAUTION * 5 * 2.0**-m} if design.rule == "cone" else {}
    tolerances = np.where(np.arange(outputs) % 2 == 0, design.tolerance / 100, UNBOUNDED)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", qmcpy.util.MaxSamplesWarning)  # said below
        start = FEWEST // (replications or 1)
        limits = {"n_init": start, "n_limit": design.most}
        _, found = rule(scores, abs_tol=tolerances, rel_tol=0, **limits, **settings).integrate()
    half_widths = (found.comb_bound_high - found.comb_bound_low) / 2
    if not found.comb_flags.all():
        reached = 100 * half_widths[::2].max()
        raise ValueError(
            f"after {int(found.n_total):,} evaluations accuracy is known to {reached:.3g} points, not to "
            f"{design.tolerance:g}; allow more evaluations (most) or a larger tolerance"
        )
    means = (found.comb_bound_high + found.comb_bound_low) / 2
    return [
        Estimate(float(mean), float(width)) for mean, width in zip(means, half_widths, strict=True)
    ], sampler


# QMCPy's names of randomizations.
_RANDOMIZE = {
    "lms_shift": "LMS DS",
    "shift": "DS",
    "nested": "NUS",
    "lms_permutation": "LMS DP",
    "permutation": "DP",
}


def _sampler(design, replications):
    """QMCPy's points."""
    import qmcpy

    settings = {"dimension": len(design.parameters), "seed": design.seed, "replications": replications}
    if design.points == "iid":
        return qmcpy.IIDStdUniform(**settings)
    if design.points == "lattice":
        return qmcpy.Lattice(randomize="SHIFT", **settings)
    kind = qmcpy.DigitalNetB2 if design.points == "digital_net" else qmcpy.Halton
    return kind(randomize=_RANDOMIZE[design.randomization], alpha=design.alpha, **settings)


def as_scipy(distribution):
    """The distribution, of which QMCPy makes a true measure."""
    from scipy import stats

    first, second = distribution.parameters
    return {
        "uniform": lambda: stats.uniform(first, second - first),
        "loguniform": lambda: stats.loguniform(first, second),
        "normal": lambda: stats.norm(first, second),
        "lognormal": lambda: stats.lognorm(second, scale=np.exp(first)),
    }[distribution.kind]()


def _sequence(design, sampler):
    """QMCPy's points as ours, where these are the same and a kernel is fast on them."""
    if design.rule != "cone" or design.randomization == "nested":
        return None
    if design.points == "lattice":
        shift = np.floor(sampler.shift[0] * 2.0**32).astype(np.uint32)
        return Lattice(jnp.asarray(sampler.gen_vec[0].astype(np.uint32)), jnp.asarray(shift))
    drop = np.uint64(sampler.t - 32)  # QMCPy's integers have more bits, ours the first 32
    matrices, shift = ((bits[0] >> drop).astype(np.uint32) for bits in (sampler.gen_mats, sampler.rshift))
    return DigitalNet(jnp.asarray(matrices), jnp.asarray(shift))
