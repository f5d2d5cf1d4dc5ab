"""Compared with torch's functions in the formulas of DeiT's ``losses.py`` (facebookresearch/deit)."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from shiftaddvit_jax.models import Outputs
from shiftaddvit_jax.train.distillation import distillation_loss, label_logits

RNG = np.random.default_rng(0)
CLASSES = 5


def outputs(heads=1, classes=CLASSES, sides=(4, 2)):
    logits = [RNG.normal(0, 3, (6, classes)).astype(np.float32) for _ in range(heads)]
    features = [RNG.normal(size=(6, side, side, 3)).astype(np.float32) for side in sides]
    return Outputs(sum(logits) / heads, tuple(logits), tuple(features))


STUDENT, TEACHER, DISTILLED = outputs(), outputs(), outputs(heads=2)


def torch_loss(kind, student, teacher, temperature):
    student, teacher = torch.tensor(student), torch.tensor(teacher)
    if kind == "hard":
        return torch.nn.functional.cross_entropy(student, teacher.argmax(dim=1)).item()
    mine, its = (torch.log_softmax(logits / temperature, dim=1) for logits in (student, teacher))
    total = torch.nn.functional.kl_div(mine, its, reduction="sum", log_target=True)
    # Theirs divides by the number of logits, which leaves out the sum over classes of the paper's equation.
    return (total * temperature**2 / student.numel()).item() * CLASSES


@pytest.mark.parametrize(("kind", "temperature"), [("soft", 1.0), ("soft", 3.0), ("hard", 1.0)])
def test_losses_of_logits_are_deits(kind, temperature):
    found = distillation_loss(kind, STUDENT, TEACHER, temperature=temperature)
    expected = torch_loss(kind, STUDENT.logits, TEACHER.logits, temperature)
    np.testing.assert_allclose(found, expected, rtol=1e-5)


def test_with_a_token_the_second_head_learns_the_teacher_and_the_first_the_labels():
    found = distillation_loss("token", DISTILLED, TEACHER)
    np.testing.assert_allclose(found, torch_loss("hard", DISTILLED.heads[1], TEACHER.logits, 1), rtol=1e-5)
    np.testing.assert_array_equal(label_logits("token", DISTILLED), DISTILLED.heads[0])
    np.testing.assert_array_equal(label_logits("hard", DISTILLED), DISTILLED.logits)


def test_every_stages_features_count_alike():
    found = distillation_loss("features", STUDENT, TEACHER)
    pairs = zip(STUDENT.features, TEACHER.features, strict=True)
    np.testing.assert_allclose(found, np.mean([np.mean((a - b) ** 2) for a, b in pairs]), rtol=1e-5)


@pytest.mark.parametrize("kind", ["soft", "features"])
def test_a_student_like_its_teacher_costs_nothing(kind):
    assert abs(float(distillation_loss(kind, TEACHER, TEACHER, temperature=2.0))) < 1e-6


@pytest.mark.parametrize("kind", ["soft", "hard", "token", "features"])
def test_the_student_has_a_gradient_and_the_teacher_none(kind):
    both = DISTILLED, outputs(heads=2)
    mine, its = jax.grad(lambda both: distillation_loss(kind, *both))(both)
    assert any(np.any(leaf) for leaf in jax.tree.leaves(mine))
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(its))


@pytest.mark.parametrize("kind", ["soft", "hard", "token", "features"])
def test_outputs_of_bfloat16_are_compared_in_float32(kind):
    half = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.bfloat16), (DISTILLED, TEACHER))
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), half)
    found = distillation_loss(kind, *half)
    assert found.dtype == jnp.float32
    np.testing.assert_array_equal(found, distillation_loss(kind, *exact))


@pytest.mark.parametrize(
    ("kind", "teacher", "temperature", "message"),
    [
        ("softs", TEACHER, 1.0, "did you mean 'soft'"),
        ("soft", TEACHER, 0.0, "temperature must be positive, got 0.0"),
        ("token", TEACHER, 1.0, "such as deit_tiny_distilled"),
        ("hard", outputs(classes=3), 1.0, r"same shapes of logits, got \(6, 5\) and \(6, 3\)"),
        ("features", outputs(sides=(4,)), 1.0, "same shapes of features"),
    ],
)
def test_what_cannot_be_distilled_is_refused(kind, teacher, temperature, message):
    with pytest.raises(ValueError, match=message):
        distillation_loss(kind, STUDENT, teacher, temperature=temperature)
