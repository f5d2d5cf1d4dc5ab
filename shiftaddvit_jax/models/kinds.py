"""The kinds of a model's layers, stage by stage, from the names that a person gives."""

from collections.abc import Sequence

from shiftaddvit_jax.nn import ATTENTION_KINDS
from shiftaddvit_jax.validation import check_choice


def parse_kinds(text: str) -> str | tuple[str, ...]:
    """One kind, or several separated by commas."""
    kinds = tuple(text.replace(" ", "").split(","))
    return kinds[0] if len(kinds) == 1 else kinds


def stage_kinds(what: str, kinds: str | Sequence[str], known: Sequence[str], stages: int) -> tuple[str, ...]:
    """``kinds`` for each stage: one for all, or as many as there are stages.

    Raises:
      ValueError: unknown kinds, or a wrong number of them.
    """
    kinds = (kinds,) * stages if isinstance(kinds, str) else tuple(kinds)
    if len(kinds) != stages:
        raise ValueError(f"{what} must be one kind or {stages}, one a stage; got {len(kinds)}: {kinds}")
    for kind in kinds:
        check_choice(f"kind of {what}", kind, known)
    return kinds


def stage_attention(
    variant: str, attention: str | Sequence[str], known: Sequence[str], stages: int
) -> tuple[str, ...]:
    """The kind of attention of each stage, as `create_model` reads it.

    One kind is for all stages, but leaves ``"msa"`` in the last stage of a pyramid. ``"sra"`` and
    ``"linear_sra"`` are for the last stage too.

    Args:
      variant: the variant's name, for messages.
      attention: one kind, or one for each stage.
      known: the kinds that the variant's family has.
      stages: the number of stages that the variant has.

    Raises:
      ValueError: an unknown kind, a kind that the family does not have, or a wrong number of kinds.
    """
    if isinstance(attention, str) and attention not in ("sra", "linear_sra") and stages > 1:
        attention = (attention,) * (stages - 1) + ("msa",)
    kinds = stage_kinds("attention", attention, ATTENTION_KINDS, stages)
    for kind in kinds:
        if kind not in known:
            raise ValueError(f"{variant} has no attention {kind!r}; choose among {', '.join(known)}")
    return kinds
