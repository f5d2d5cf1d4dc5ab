"""How good a model is on examples it was not trained on."""

from functools import partial
from typing import Any

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


def evaluate(
    model: nn.Module,
    variables: PyTree,
    examples: Examples,
    batch_size: int = 64,
    preprocessing: Preprocessing | None = None,
) -> dict[str, Any]:
    """Accuracy over all ``examples`` that can be read, in inference mode.

    Pixels are by default those of the model's variant.

    Returns:
      ``top1`` (a share from 0 to 1), ``loss`` (mean cross-entropy in nats), ``confusion`` (int array, rows
      are true classes) and ``shift_share`` (by MoE layer, the share of tokens on its shift expert).

    Raises:
      ValueError: no examples, none that can be read, or a model without a head.
    """
    check_head(model)
    if not len(examples):
        raise ValueError("there is nothing to evaluate: expected at least one image, got none")
    confusion = np.zeros((model.num_classes, model.num_classes), np.int64)
    loss, tokens = 0.0, {}
    batch_size = min(batch_size, len(examples))
    count = -(-len(examples) // batch_size)
    preprocessing = preprocessing or model_preprocessing(model)
    batches = evaluation_batches(examples, preprocessing=preprocessing, batch_size=batch_size)
    for batch in track(batches, "evaluating", count):
        images, labels, real = batch["image"], batch["label"], batch["real"]
        if not real.all() and model.primitives.threshold == "tensor":  # padding would change the others
            images, labels, real = images[real], labels[real], real[real]
        logits, losses, routed = evaluation_step(model, variables, images, labels)
        np.add.at(confusion, (labels[real], np.asarray(logits).argmax(-1)[real]), 1)
        loss += float(np.sum(np.asarray(losses)[real]))
        padding = len(images) - int(real.sum())
        if padding > 0 and routed:  # its tokens, those of blank images, are taken off again
            *_, blank = evaluation_step(model, variables, np.zeros_like(images), labels)
            routed = {
                name: value - np.round(np.asarray(blank[name]) * (padding / len(images)))
                for name, value in routed.items()
            }
        tokens = {name: tokens.get(name, 0) + np.asarray(value) for name, value in routed.items()}
    if not confusion.sum():
        raise ValueError(f"none of the {len(examples)} images to evaluate can be read")
    return {
        "top1": float(np.trace(confusion) / confusion.sum()),
        "loss": loss / float(confusion.sum()),
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
