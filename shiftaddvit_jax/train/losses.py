"""What a classifier's logits cost, given labels that may be soft."""

from typing import Literal

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from shiftaddvit_jax.validation import check_choice

Loss = Literal["cross_entropy", "binary_cross_entropy"]
LOSSES: tuple[Loss, ...] = ("cross_entropy", "binary_cross_entropy")


def classification_loss(
    kind: Loss,
    logits: Float[Array, "batch classes"],
    targets: Float[Array, "batch classes"],
    *,
    sum_classes: bool = False,
    threshold: float | None = None,
) -> Float[Array, ""]:
    """The batch's mean loss in nats, computed in float32.

    ``"binary_cross_entropy"`` is that of each class by itself (Wightman et al., "ResNet strikes back", 2021),
    as in ``timm.loss.BinaryCrossEntropy`` (timm 1.0.31).

    Args:
      kind: one of `LOSSES`.
      logits: of the images, in any floating dtype.
      targets: the classes' parts of each image; smoothed and mixed labels are such.
      sum_classes: of binary cross-entropy, whether an image's loss is the sum over its classes, not the mean.
      threshold: of binary cross-entropy, targets above it become 1 and the others 0; by default they stay.

    Raises:
      ValueError: an unknown kind, shapes that differ, or an option that the kind does not have.
    """
    check_choice("loss", kind, LOSSES)
    if logits.shape != targets.shape:
        raise ValueError(
            f"logits and targets must have one shape, got {logits.shape} and {targets.shape}; "
            "make targets of labels by jax.nn.one_hot(labels, classes)"
        )
    if kind == "cross_entropy" and (sum_classes or threshold is not None):
        raise ValueError("sum_classes and threshold are for binary_cross_entropy; leave them out")
    logits, targets = logits.astype(jnp.float32), targets.astype(jnp.float32)
    if kind == "cross_entropy":
        return jnp.mean(optax.softmax_cross_entropy(logits, targets))
    if threshold is not None:
        targets = (targets > threshold).astype(jnp.float32)
    losses = optax.sigmoid_binary_cross_entropy(logits, targets)
    return jnp.mean(jnp.sum(losses, axis=-1) if sum_classes else losses)
