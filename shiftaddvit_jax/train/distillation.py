"""What a student's outputs cost where they differ from those of its teacher, such as a dense model."""

from typing import Literal

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from shiftaddvit_jax.models.outputs import Outputs
from shiftaddvit_jax.validation import check_choice

Distillation = Literal["soft", "hard", "token", "features"]
DISTILLATIONS: tuple[Distillation, ...] = ("soft", "hard", "token", "features")


def distillation_loss(
    kind: Distillation, student: Outputs, teacher: Outputs, *, temperature: float = 1.0
) -> Float[Array, ""]:
    """The batch's mean distillation loss, computed in float32; the teacher has no gradient.

    Both outputs are ``model.apply(variables, images, train, method="outputs")``. The loss of the labels is
    added by the caller, from `label_logits`.

    Args:
      kind: one of `DISTILLATIONS`.

        - ``"soft"``: the divergence of Kullback and Leibler from the teacher's probabilities to the
          student's, both at ``temperature``, times its square (Hinton et al., 2015; equation 2 of DeiT, whose
          code also divides by the number of classes).
        - ``"hard"``: cross-entropy with the teacher's most probable class (equation 3 of DeiT, Touvron et
          al., 2021).
        - ``"token"``: the same of the distillation head alone, while the class head learns the labels
          (distilled DeiT).
        - ``"features"``: the mean squared difference of each stage's tokens (Romero et al., "FitNets", 2015),
          meaned over stages. The student is a reparameterization of the teacher, so that shapes agree.
      student: of the model that learns.
      teacher: of the model that it learns from.
      temperature: by which ``"soft"`` divides logits.

    Raises:
      ValueError: an unknown kind, a temperature that is not positive, other shapes, or ``"token"`` for a
        student without a distillation head.
    """
    check_choice("distillation", kind, DISTILLATIONS)
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
    teacher = jax.lax.stop_gradient(teacher)
    if kind == "features":
        _check_same("features", [x.shape for x in student.features], [x.shape for x in teacher.features])
        differences = [
            jnp.mean(jnp.square(mine.astype(jnp.float32) - its.astype(jnp.float32)))
            for mine, its in zip(student.features, teacher.features, strict=True)
        ]
        return jnp.mean(jnp.stack(differences))
    _check_same("logits", student.logits.shape, teacher.logits.shape)
    if kind == "soft":
        mine, its = (
            jax.nn.log_softmax(outputs.logits.astype(jnp.float32) / temperature)
            for outputs in (student, teacher)
        )
        return jnp.mean(jnp.sum(jnp.exp(its) * (its - mine), axis=-1)) * temperature**2
    logits = student.logits if kind == "hard" else _two_heads(student)[1]
    labels = jnp.argmax(teacher.logits, axis=-1)
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels))


def label_logits(kind: Distillation, student: Outputs) -> Float[Array, "batch classes"]:
    """The student's logits that learn the labels: with ``"token"`` the class head's, else those of its call.

    Raises:
      ValueError: ``"token"`` for a student without a distillation head.
    """
    return _two_heads(student)[0] if kind == "token" else student.logits


def _two_heads(student):
    if len(student.heads) != 2:
        raise ValueError(
            "distillation by a token needs a student with a distillation head, such as deit_tiny_distilled; "
            "choose 'hard' for others"
        )
    return student.heads


def _check_same(what, mine, its):
    if mine != its:
        raise ValueError(
            f"student and teacher must have the same shapes of {what}, got {mine} and {its}; distil from the "
            "model that the student was made from"
        )
