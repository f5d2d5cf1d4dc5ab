"""Two models side by side on the same images: answers, logits, layers, time and size."""

import re
from collections.abc import Iterator, Sequence
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from shiftaddvit_jax.bench.latency import compiled_run
from shiftaddvit_jax.bench.rounds import ratio, summarize, time_runs
from shiftaddvit_jax.checkpoints.source import is_named, stored_bytes
from shiftaddvit_jax.classifier import Answer, Classifier, softmax
from shiftaddvit_jax.data import Examples, evaluation_batches
from shiftaddvit_jax.data.identity import class_difference
from shiftaddvit_jax.models.inspect import natural_order, on_xla, watch
from shiftaddvit_jax.models.variables import count_parameters
from shiftaddvit_jax.progress import track

BATCH = 64
WORST = 12  # images that a picture shows
ROUNDS, SECONDS_A_TURN = 7, 0.2
LAYER = re.compile(r"(stage\d+/)?(block\d+|norm)")  # blocks, and the LayerNorms behind the last of them


class LogitError(NamedTuple):
    """How far the second model's logits are from the first's.

    Attributes:
      decibels: the variance of each logit of the first over the images, by the mean squared difference;
        infinite without a difference, NaN or -infinite where the first model's logits do not vary.
      mean: of the absolute differences.
      percentile_99: the same.
      largest: the same.
    """

    decibels: float
    mean: float
    percentile_99: float
    largest: float


class ImageDifference(NamedTuple):
    """What two models say of an image.

    Attributes:
      index: the image's place among the examples.
      name: what it is known by: its path below the data set's folder, or its place there.
      error: root of the mean squared difference of its logits.
      answers: the most probable class by each model.
      label: the class that it has; None if unknown.
    """

    index: int
    name: str
    error: float
    answers: tuple[Answer, Answer]
    label: str | None


class Size(NamedTuple):
    """What a model takes to store.

    Attributes:
      parameters: trained numbers.
      parameter_bytes: of the parameters in memory, packed if they are.
      stored_bytes: of the files that it came from; None if it came from none.
    """

    parameters: int
    parameter_bytes: int
    stored_bytes: int | None


class Times(NamedTuple):
    """Milliseconds of one image.

    Attributes:
      medians: of each model.
      ratio: the second's over the first's: the median over the rounds.
    """

    medians: tuple[float, float]
    ratio: float


class Comparison(NamedTuple):
    """What `compare` finds; pairs are of the first and the second model.

    Attributes:
      images: how many were read.
      top1: shares of images whose most probable class is theirs; None without labels.
      agreement: the share of images with the same most probable class in both.
      logits: how far apart they are.
      layers: decibels of signal to noise of the outputs of each block, and of each LayerNorm behind blocks,
        in the order of the forward pass; of those that both models have in the same shape.
      worst: the images whose logits differ most, at most `WORST`.
      sizes: of each model.
      times: of each model; None if they were not measured.
    """

    images: int
    top1: tuple[float, float] | None
    agreement: float
    logits: LogitError
    layers: dict[str, float]
    worst: tuple[ImageDifference, ...]
    sizes: tuple[Size, Size]
    times: Times | None


def compare(
    first: Classifier,
    second: Classifier,
    examples: Examples,
    *,
    labelled: bool = True,
    layers: bool = True,
    rounds: int = ROUNDS,
) -> Comparison:
    """How the ``second`` model differs from the ``first`` on the same images.

    Each model gets its own pixels of an image. Both run as they are: packed ones on kernels, others on XLA;
    for the outputs of layers, both on XLA. Images that cannot be read are named in the log and left out.
    Signal is the first model's variance, channel by channel over images and tokens, and noise the mean
    squared difference.

    Args:
      first: what is compared with.
      second: what is compared.
      examples: the images.
      labelled: whether the examples' labels are the models' classes.
      layers: whether layers are compared.
      rounds: turns of each model in which one image is timed; 0 without times.

    Raises:
      ValueError: models with other classes, no images, none that can be read, logits that are not finite, or
        a negative number of rounds.
    """
    check_classes(first, second)
    if rounds < 0:
        raise ValueError(f"rounds must be at least 0, got {rounds}")
    pair = (first, second)
    applies = [jax.jit(model.model.apply) for model in pair]
    measure = _measure_layers(pair) if layers else None
    places, labels, logits, moments, images = [], [], [], [], None
    for indices, classes, images in _batches(pair, examples):
        places += indices.tolist()
        labels += classes.tolist()
        found = (apply(model.variables, x) for apply, model, x in zip(applies, pair, images, strict=True))
        logits.append(np.stack([np.asarray(each) for each in found]))
        if measure is not None:
            moments.append(jax.device_get(measure(tuple(model.variables for model in pair), images)))
    if images is None:
        raise ValueError("there is nothing to compare: none of the images can be read")
    both = np.concatenate(logits, axis=1)
    for which, model, each in zip(("first", "second"), pair, both, strict=True):
        if bad := np.flatnonzero(~np.isfinite(each).all(axis=1)).tolist():
            raise ValueError(
                f"the {which} model, {model.source.name}, has logits that are not finite for "
                f"{_name(examples, places[bad[0]])}; expected numbers"
            )
    best = both.argmax(axis=-1)
    truth = np.asarray(labels)
    return Comparison(
        images=len(places),
        top1=(float((best[0] == truth).mean()), float((best[1] == truth).mean())) if labelled else None,
        agreement=float((best[0] == best[1]).mean()),
        logits=logit_error(*both),
        layers=_layer_decibels(moments),
        worst=_worst(pair, examples, places, labels if labelled else None, both),
        sizes=(_size(first), _size(second)),
        times=_times(pair, [x[:1] for x in images], rounds) if rounds else None,
    )


def check_classes(first: Classifier, second: Classifier) -> None:
    """Raise a ``ValueError`` unless both models have the same classes; unnamed ones are known by number."""
    if len(first.class_names) != len(second.class_names):
        counts = f"{len(first.class_names)} and {len(second.class_names)}"
        raise ValueError(f"the models have {counts} classes; expected the same ones")
    if not (is_named(first.source) and is_named(second.source)):
        return
    if difference := class_difference(first.class_names, second.class_names):
        raise ValueError(f"the models have other classes: {difference}; expected the same ones")


def logit_error(
    first: Float[Array | np.ndarray, "images classes"], second: Float[Array | np.ndarray, "images classes"]
) -> LogitError:
    """How far the ``second`` logits are from the ``first``."""
    signal, other = (np.asarray(logits, np.float64) for logits in (first, second))
    error = np.abs(other - signal)
    return LogitError(
        decibels=_decibels(np.square(signal - signal.mean(axis=0)).sum(), np.square(error).sum()),
        mean=float(error.mean()),
        percentile_99=float(np.percentile(error, 99)),
        largest=float(error.max()),
    )


def _batches(
    pair: Sequence[Classifier], examples: Examples
) -> Iterator[tuple[np.ndarray, np.ndarray, tuple[np.ndarray, ...]]]:
    """Places and labels of the images that can be read, and each model's inputs."""
    if not len(examples):
        raise ValueError("there is nothing to compare: expected at least one image, got none")
    size = min(BATCH, len(examples))
    pixels = [model.preprocessing for model in pair]
    made = {  # once for both, where they agree
        each: evaluation_batches(examples, preprocessing=each, batch_size=size) for each in pixels
    }
    numbers = track(range(-(-len(examples) // size)), "comparing", -(-len(examples) // size))
    for number in numbers:
        batches = {each: next(batch) for each, batch in made.items()}
        one, other = (batches[each] for each in pixels)
        real = one["real"] & other["real"]
        if real.any():
            places = number * size + np.flatnonzero(real)
            yield places, one["label"][real], (one["image"][real], other["image"][real])


def _measure_layers(pair):
    """A jitted function of both models' variables and images: by layer, moments of signal and noise."""

    def look(module, method, arguments, result):
        is_layer = method == "__call__" and LAYER.fullmatch("/".join(module.path))
        return result if is_layer else None

    forwards = [watch(on_xla(model.model), look) for model in pair]

    @jax.jit
    def measure(variables, images):
        first, second = (
            forward(*inputs) for forward, *inputs in zip(forwards, variables, images, strict=True)
        )
        return {
            name: _moments(x, second[name][-1])
            for name, (*_, x) in first.items()
            if name in second and x.shape == second[name][-1].shape
        }

    return measure


def _moments(signal: Float[Array, "*batch channels"], other: Float[Array, "*batch channels"]):
    """Number of tokens, mean and sum of squares about it by channel, and the sum of squared differences."""
    signal, other = (x.reshape(-1, x.shape[-1]).astype(jnp.float32) for x in (signal, other))
    mean = jnp.mean(signal, axis=0)
    squares = jnp.sum(jnp.square(signal - mean), axis=0)
    return jnp.float32(len(signal)), mean, squares, jnp.sum(jnp.square(other - signal))


def _layer_decibels(batches):
    """Decibels by layer, from the `_moments` of all batches."""
    found = {}
    for name in sorted(batches[0] if batches else (), key=natural_order):
        counts, means, squares, noises = (
            np.asarray(part, np.float64) for part in zip(*(batch[name] for batch in batches), strict=True)
        )
        mean = counts @ means / counts.sum()
        signal = squares.sum() + (counts @ np.square(means - mean)).sum()
        found[name] = _decibels(signal, noises.sum())
    return found


def _decibels(signal, noise):
    with np.errstate(divide="ignore", invalid="ignore"):
        return float(10 * np.log10(np.float64(signal) / np.float64(noise)))


def _worst(pair, examples, places, labels, logits):
    """The images whose logits differ most, the worst first; ties in the order of the examples."""
    errors = np.sqrt(np.square(logits[1].astype(np.float64) - logits[0]).mean(axis=-1))
    rows = np.argsort(-errors, kind="stable")[:WORST].tolist()
    ranked = [model.rank(softmax(each[rows]), top_k=1) for model, each in zip(pair, logits, strict=True)]
    names = next((model.class_names for model in pair if is_named(model.source)), pair[0].class_names)
    return tuple(
        ImageDifference(
            places[row],
            _name(examples, places[row]),
            float(errors[row]),
            (one[0]._replace(label=names[one[0].index]), other[0]._replace(label=names[other[0].index])),
            None if labels is None else names[labels[row]],
        )
        for row, one, other in zip(rows, *ranked, strict=True)
    )


def _name(examples, place):
    """What the image at a place is known by."""
    return str(place) if examples.names is None else examples.names[place].decode(errors="replace")


def _size(model):
    bytes_ = sum(leaf.nbytes for leaf in jax.tree.leaves(model.variables["params"]))
    return Size(count_parameters(model.model), bytes_, stored_bytes(model.source))


def _times(pair, images, rounds):
    """Times of an image each, in turns, so that a slow machine is slow for both."""
    runs = [
        compiled_run(partial(model.model.apply, model.variables), jnp.asarray(x))
        for model, x in zip(pair, images, strict=True)
    ]
    turns = [[time_runs(run, SECONDS_A_TURN) for run in runs] for _ in track(range(rounds), "timing", rounds)]
    first, second = zip(*turns, strict=True)
    medians = (summarize(first)["median_ms"], summarize(second)["median_ms"])
    return Times(medians, ratio(second, first))
