"""How good a model is on examples it was not trained on."""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from shiftaddvit_jax.data import evaluation_batches
from shiftaddvit_jax.data.sources import Examples
from shiftaddvit_jax.models import Preprocessing, model_preprocessing
from shiftaddvit_jax.nn.moe import routing_layers
from shiftaddvit_jax.progress import track
from shiftaddvit_jax.validation import check_head

BATCH = 64


class Evaluated(NamedTuple):
    """What a model said of the images of a batch, as values of JSON.

    Attributes:
      labels: the images' classes.
      predicted: the classes that the model takes them for.
      loss: the sum of their cross-entropies, in nats.
      tokens: by MoE layer, how many tokens went to each expert.
    """

    labels: list[int]
    predicted: list[int]
    loss: float
    tokens: dict[str, list[float]]


def evaluate(
    model: nn.Module,
    variables: PyTree,
    examples: Examples,
    batch_size: int = BATCH,
    preprocessing: Preprocessing | None = None,
) -> dict[str, Any]:
    """Accuracy over all ``examples``, in inference mode; by default, with the pixels of the model's variant.

    Returns:
      ``top1`` (a share from 0 to 1), ``loss`` (mean cross-entropy in nats), ``confusion`` (int array, rows
      are true classes) and ``shift_share`` (by MoE layer, the share of tokens on its shift expert).

    Raises:
      ValueError: no examples, or a model without a head.
    """
    count = count_batches(len(examples), batch_size)
    batches = evaluate_batches(model, variables, examples, range(count), batch_size, preprocessing)
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
) -> Iterator[Evaluated]:
    """Those batches of `evaluate`, by their numbers from 0; `summarize` makes the result of all of them.

    Raises:
      ValueError: a model without a head.
    """
    check_head(model)
    preprocessing = preprocessing or model_preprocessing(model)
    batch_size = min(batch_size, len(examples))
    chosen = slice(numbers.start * batch_size, numbers.stop * batch_size)
    part = Examples(examples.images[chosen], examples.labels[chosen], examples.decode)
    for batch, real in evaluation_batches(part, preprocessing=preprocessing, batch_size=batch_size):
        images, labels = batch["image"], batch["label"]
        if real < batch_size and model.primitives.threshold == "tensor":  # padding would change the others
            images, labels = images[:real], labels[:real]
        logits, losses, routed = evaluation_step(model, variables, images, labels)
        padding = len(images) - real
        if padding > 0 and routed:  # its tokens, those of blank images, are taken off again
            *_, blank = evaluation_step(model, variables, np.zeros_like(images), labels)
            routed = {
                name: value - np.round(np.asarray(blank[name]) * (padding / batch_size))
                for name, value in routed.items()
            }
        yield Evaluated(
            labels=batch["label"][:real].tolist(),
            predicted=np.asarray(logits).argmax(-1)[:real].tolist(),
            loss=float(np.sum(losses[:real])),
            tokens={name: np.asarray(value).tolist() for name, value in routed.items()},
        )


def summarize(batches: Iterable[Evaluated], num_classes: int) -> dict[str, Any]:
    """The result of `evaluate`, from its batches in their order."""
    confusion = np.zeros((num_classes, num_classes), np.int64)
    loss, tokens = 0.0, {}
    for batch in batches:
        np.add.at(confusion, (batch.labels, batch.predicted), 1)
        loss += batch.loss
        tokens = {name: tokens.get(name, 0) + np.asarray(value) for name, value in batch.tokens.items()}
    return {
        "top1": float(np.trace(confusion) / confusion.sum()),
        "loss": loss / int(confusion.sum()),
        "confusion": confusion,
        "shift_share": {name: float(value[1] / value.sum()) for name, value in tokens.items()},
    }


@partial(jax.jit, static_argnames="model")
def evaluation_step(model, variables, images, labels):
    """Logits, losses, and the tokens of each expert by MoE layer."""
    logits, state = model.apply(variables, images, mutable=["routing"])
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    layers = routing_layers(state.get("routing", {}))
    return logits, losses, {name: layer["tokens"] for name, layer in layers.items()}
