"""The factors of a search: layers that become the same together."""

from collections.abc import Sequence

from shiftaddvit_jax.models.inspect import natural_order
from shiftaddvit_jax.names import GROUPS
from shiftaddvit_jax.validation import check_choice

WHOLE = "model"  # the one stage of a ViT


def group_layers(paths: Sequence[str], by: str) -> dict[str, list[str]]:
    """The layers at ``paths`` by the name of their group, in the order of the model.

    Args:
      paths: such as ``stage1/block1/mlp/fc1``.
      by: ``"layer"``; ``"branch"``, an attention or an MLP, as in ``stage1/block1/mlp``; ``"block"``; or
        ``"stage"``.

    Raises:
      ValueError: another kind of group.
    """
    check_choice("kind of group", by, GROUPS)
    groups: dict[str, list[str]] = {}
    for path in sorted(paths, key=natural_order):
        *outer, branch, layer = path.split("/")
        stage = outer[:1] if outer[0].startswith("stage") else [WHOLE]
        names = {"layer": [*outer, branch, layer], "branch": [*outer, branch], "block": outer, "stage": stage}
        groups.setdefault("/".join(names[by]), []).append(path)
    return groups
