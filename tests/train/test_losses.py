"""Compared with torch's own losses, and with the formulas of timm.loss.BinaryCrossEntropy (timm 1.0.31)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from shiftaddvit_jax.train.losses import LOSSES, classification_loss

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(0, 4, (6, 5)).astype(np.float32)
TARGETS = RNG.dirichlet(np.full(5, 0.3), 6).astype(np.float32)


def torch_loss(kind, sum_classes=False, threshold=None):
    """The loss and its gradient by the logits."""
    logits, targets = torch.tensor(LOGITS, requires_grad=True), torch.tensor(TARGETS)
    if kind == "cross_entropy":
        loss = torch.nn.functional.cross_entropy(logits, targets)
    else:
        if threshold is not None:
            targets = targets.gt(threshold).to(targets.dtype)
        reduction = "none" if sum_classes else "mean"
        loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets, reduction=reduction)
        loss = loss.sum(-1).mean() if sum_classes else loss
    loss.backward()
    return loss.item(), logits.grad.numpy()


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("cross_entropy", {}),
        ("binary_cross_entropy", {}),
        ("binary_cross_entropy", {"sum_classes": True}),
        ("binary_cross_entropy", {"threshold": 0.2}),
        ("binary_cross_entropy", {"sum_classes": True, "threshold": 0.0}),
    ],
)
def test_losses_and_gradients_are_torchs(kind, options):
    found = jax.value_and_grad(lambda logits: classification_loss(kind, logits, TARGETS, **options))(LOGITS)
    for mine, other in zip(found, torch_loss(kind, **options), strict=True):
        np.testing.assert_allclose(mine, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("kind", LOSSES)
def test_logits_of_bfloat16_are_computed_in_float32(kind):
    rounded = jnp.asarray(LOGITS, jnp.bfloat16)
    loss = classification_loss(kind, rounded, jnp.asarray(TARGETS))
    assert loss.dtype == jnp.float32
    np.testing.assert_array_equal(loss, classification_loss(kind, rounded.astype(jnp.float32), TARGETS))


@pytest.mark.parametrize("kind", LOSSES)
def test_large_logits_of_the_right_class_cost_nothing(kind):
    right = np.eye(3, dtype=np.float32)
    assert float(classification_loss(kind, 1e4 * (2 * right - 1), right)) == 0


@pytest.mark.parametrize(
    ("kind", "targets", "options", "message"),
    [
        ("crossentropy", TARGETS, {}, "did you mean 'cross_entropy'"),
        ("cross_entropy", TARGETS[:, :1], {}, r"must have one shape, got \(6, 5\) and \(6, 1\)"),
        ("cross_entropy", TARGETS, {"sum_classes": True}, "are for binary_cross_entropy"),
        ("cross_entropy", TARGETS, {"threshold": 0.0}, "are for binary_cross_entropy"),
    ],
)
def test_what_has_no_loss_is_refused(kind, targets, options, message):
    with pytest.raises(ValueError, match=message):
        classification_loss(kind, LOGITS, targets, **options)
