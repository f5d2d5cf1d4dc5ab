"""How good a model is on examples it was not trained on."""

from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

from shiftaddvit_jax.data import evaluation_batches
from shiftaddvit_jax.data.sources import Examples
from shiftaddvit_jax.models import Preprocessing, model_preprocessing
from shiftaddvit_jax.nn.moe import routing_layers
from shiftaddvit_jax.progress import track
from shiftaddvit_jax.train.devices import place_batch
from shiftaddvit_jax.validation import check_head

BEST = 5  # guesses that top-5 counts


def evaluate(
    model: nn.Module,
    variables: PyTree,
    examples: Examples,
    batch_size: int = 64,
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
    check_head(model)
    if not len(examples):
        raise ValueError("there is nothing to evaluate: expected at least one image, got none")
    preprocessing = preprocessing or model_preprocessing(model)
    devices = mesh.size if mesh else 1
    batch_size = -(-min(batch_size, len(examples)) // devices) * devices
    hosts = {"host": jax.process_index(), "hosts": jax.process_count()} if mesh else {}
    batches = evaluation_batches(examples, preprocessing=preprocessing, batch_size=batch_size, **hosts)
    sums: dict[str, Any] = {}
    for batch in track(batches, "evaluating", -(-len(examples) // batch_size)):
        found = _sums(model, variables, batch, batch_size, mesh)
        sums = jax.tree.map(np.add, sums, found) if sums else found
    images = int(sums["confusion"].sum())
    if not images:
        raise ValueError(f"none of the {len(examples)} images can be read")
    return {
        "top1": float(np.trace(sums["confusion"]) / images),
        "top5": float(sums["among_best"] / images),
        "loss": float(sums["loss"] / images),
        "confusion": sums["confusion"],
        "images": images,
        "shift_share": {name: float(value[1] / value.sum()) for name, value in sums["tokens"].items()},
    }


def _sums(model, variables, batch, batch_size, mesh):
    """A batch's sums over its real images, float64 or int64."""
    real = batch["real"]
    if mesh is None and not real.all() and model.primitives.threshold == "tensor":
        # Blank images would change the others' threshold.
        batch, batch_size = {name: part[real] for name, part in batch.items()}, int(real.sum())
        if not batch_size:
            batch = {name: np.zeros((1, *part.shape[1:]), part.dtype) for name, part in batch.items()}
            batch_size = 1
    placed = place_batch(mesh, batch) if mesh else batch
    step = partial(evaluation_step, model, mesh, variables)
    found = jax.device_get(step(placed["image"], placed["label"], placed["real"]))
    blank = batch_size - int(found["confusion"].sum())
    if blank and found["tokens"]:  # their tokens are taken off again
        of_blank = step(jnp.zeros_like(placed["image"]), placed["label"], placed["real"])["tokens"]
        found["tokens"] = {
            name: value - np.round(np.asarray(of_blank[name]) * (blank / batch_size))
            for name, value in found["tokens"].items()
        }
    return jax.tree.map(lambda x: np.asarray(x, np.int64 if x.dtype.kind in "iu" else np.float64), found)


@partial(jax.jit, static_argnames=("model", "mesh"))
def evaluation_step(model, mesh, variables, images, labels, real):
    """Sums over the real images, and the tokens of each expert by MoE layer over all."""
    logits, state = model.apply(variables, images, mutable=["routing"])
    logits = logits.astype(jnp.float32)
    _, best = jax.lax.top_k(logits, min(BEST, logits.shape[-1]))
    losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)[:, 0]
    counted = real.astype(jnp.int32)
    layers = routing_layers(state.get("routing", {}))
    sums = {
        "confusion": jnp.zeros((model.num_classes,) * 2, jnp.int32).at[labels, best[:, 0]].add(counted),
        "among_best": jnp.sum(jnp.any(best == labels[:, None], axis=1) * counted),
        "loss": jnp.sum(jnp.where(real, losses, 0.0)),
        "tokens": {name: layer["tokens"] for name, layer in layers.items()},
    }
    return jax.lax.with_sharding_constraint(sums, NamedSharding(mesh, PartitionSpec())) if mesh else sums
