"""How good a model is on examples it was not trained on."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from shiftaddvit_jax.data import Examples, evaluation_batches
from shiftaddvit_jax.models import Preprocessing, model_preprocessing
from shiftaddvit_jax.nn.moe import routing_layers
from shiftaddvit_jax.progress import track
from shiftaddvit_jax.train.devices import place_batch
from shiftaddvit_jax.validation import check_head

BATCH = 64
BEST = 5  # guesses that top-5 counts


class Evaluated(NamedTuple):
    """What a model said of the images of a batch that could be read, as values of JSON.

    Attributes:
      labels: the images' classes.
      predicted: the classes that the model takes them for.
      among_best: how many have their class among the model's five best guesses.
      loss: the sum of their cross-entropies, in nats.
      tokens: by MoE layer, how many tokens went to each expert.
    """

    labels: list[int]
    predicted: list[int]
    among_best: int
    loss: float
    tokens: dict[str, list[float]]


def evaluate(
    model: nn.Module,
    variables: PyTree,
    examples: Examples,
    batch_size: int = BATCH,
    preprocessing: Preprocessing | None = None,
    mesh: Mesh | None = None,
) -> dict[str, Any]:
    """Accuracy over all ``examples``, in inference mode; by default, with the pixels of the model's variant.

    Images that cannot be read are named in the log and left out.

    Args:
      model: with a head.
      variables: its variables, packed or not.
      examples: what to evaluate on.
      batch_size: images at a time, of all devices together.
      preprocessing: the pixels that the model expects.
      mesh: the devices that share a batch; by default one alone.

    Returns:
      ``top1`` and ``top5`` (shares from 0 to 1; of fewer than five classes, all), ``loss`` (mean
      cross-entropy in nats), ``confusion`` (int array, rows are true classes), ``images`` (how many were
      read) and ``shift_share`` (by MoE layer, the share of tokens on its shift expert).

    Raises:
      ValueError: no examples, none that can be read, or a model without a head.
    """
    count = count_batches(len(examples), batch_size)
    batches = evaluate_batches(model, variables, examples, range(count), batch_size, preprocessing, mesh)
    return summarize(track(batches, "evaluating", count), model.num_classes)


def count_batches(images: int, batch_size: int = BATCH) -> int:
    """The number of batches of so many images; a ``ValueError`` without any."""
    if not images:
        raise ValueError("there is nothing to evaluate: expected at least one image, got none")
    return -(-images // min(batch_size, images))


def evaluate_batches(
    model: nn.Module,
    variables: PyTree,
    examples: Examples,
    numbers: range,
    batch_size: int = BATCH,
    preprocessing: Preprocessing | None = None,
    mesh: Mesh | None = None,
) -> Iterator[Evaluated]:
    """Those batches of `evaluate`, by their numbers from 0; `summarize` makes the result of all of them.

    Raises:
      ValueError: a model without a head.
    """
    check_head(model)
    preprocessing = preprocessing or model_preprocessing(model)
    batch_size = min(batch_size, len(examples))
    chosen = examples.part(range(numbers.start * batch_size, min(numbers.stop * batch_size, len(examples))))
    hosts = {"host": jax.process_index(), "hosts": jax.process_count()} if mesh else {}
    size = -(-batch_size // mesh.size) * mesh.size if mesh else batch_size
    for batch in evaluation_batches(chosen, preprocessing=preprocessing, batch_size=size, **hosts):
        yield _evaluated(model, variables, batch, mesh)


def summarize(batches: Iterable[Evaluated], num_classes: int) -> dict[str, Any]:
    """The result of `evaluate`, from its batches in their order; a ``ValueError`` if they have no images."""
    confusion = np.zeros((num_classes, num_classes), np.int64)
    loss, among_best, tokens = 0.0, 0, {}
    for batch in batches:
        np.add.at(confusion, (batch.labels, batch.predicted), 1)
        loss += batch.loss
        among_best += batch.among_best
        tokens = {name: tokens.get(name, 0) + np.asarray(value) for name, value in batch.tokens.items()}
    images = int(confusion.sum())
    if not images:
        raise ValueError("there is nothing to evaluate: none of the images can be read")
    return {
        "top1": float(np.trace(confusion) / images),
        "top5": among_best / images,
        "loss": loss / images,
        "confusion": confusion,
        "images": images,
        "shift_share": {name: float(value[1] / value.sum()) for name, value in tokens.items()},
    }


def _evaluated(model, variables, batch, mesh):
    if mesh is None and not batch["real"].all() and model.primitives.threshold == "tensor":
        # Blank images would change the others' threshold.
        batch = {name: part[batch["real"]] for name, part in batch.items()}
        if not len(batch["real"]):
            return Evaluated([], [], 0, 0.0, {})
    placed = place_batch(mesh, batch) if mesh else batch
    step = partial(evaluation_step, model, mesh, variables)
    found = jax.device_get(step(placed["image"], placed["label"], placed["real"]))
    real = found["real"]
    blank = int(len(real) - real.sum())
    tokens = {name: np.asarray(value, np.float64) for name, value in found["tokens"].items()}
    if blank and tokens:  # their tokens are taken off again
        of_blank = step(jnp.zeros_like(placed["image"]), placed["label"], placed["real"])["tokens"]
        tokens = {
            name: value - np.round(np.asarray(of_blank[name]) * (blank / len(real)))
            for name, value in tokens.items()
        }
    return Evaluated(
        labels=found["labels"][real].tolist(),
        predicted=found["best"][real, 0].tolist(),
        among_best=int((found["best"] == found["labels"][:, None]).any(1)[real].sum()),
        loss=float(found["losses"][real].sum(dtype=np.float64)),
        tokens={name: value.tolist() for name, value in tokens.items()},
    )


@partial(jax.jit, static_argnames=("model", "mesh"))
def evaluation_step(model, mesh, variables, images, labels, real):
    """Of each image its best guesses and loss, and by MoE layer the tokens of each expert."""
    logits, state = model.apply(variables, images, mutable=["routing"])
    logits = logits.astype(jnp.float32)
    _, best = jax.lax.top_k(logits, min(BEST, logits.shape[-1]))
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    layers = routing_layers(state.get("routing", {}))
    found = {
        "best": best,
        "losses": losses,
        "labels": labels,
        "real": real,
        "tokens": {name: layer["tokens"] for name, layer in layers.items()},
    }
    return jax.lax.with_sharding_constraint(found, NamedSharding(mesh, PartitionSpec())) if mesh else found
