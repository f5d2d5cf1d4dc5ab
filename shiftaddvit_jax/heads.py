"""Another head for a model, or none; all else stays as it is."""

import flax.linen as nn
import jax
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PRNGKeyArray, PyTree

from shiftaddvit_jax.models.variables import HEADS, init_named, variable_shapes
from shiftaddvit_jax.nn.kernels import is_packed
from shiftaddvit_jax.pack import pack_dense, packed_shapes
from shiftaddvit_jax.reparameterize import check_variables


def replace_head(
    model: nn.Module, variables: PyTree, num_classes: int, key: PRNGKeyArray | None = None
) -> tuple[nn.Module, PyTree]:
    """``model`` for ``num_classes`` classes, with a head drawn anew, and its variables.

    All other variables are the same arrays, in every collection. The head of packed variables is packed too.
    Without classes there is no head, see `create_model`. ``variables`` is never changed.

    Args:
      model: from `create_model` or `reparameterize`.
      variables: its variables, packed or not.
      num_classes: the number of logits, or 0 for no head.
      key: random key for the head; by default ``jax.random.key(0)``.

    Raises:
      ValueError: a negative number, or variables that are not the model's (with the names that differ).
    """
    if num_classes < 0:
        raise ValueError(f"num_classes must be at least 0, got {num_classes}")
    packed = is_packed(variables["params"])
    check_variables(model, variables, packed_shapes(model) if packed else None)
    replaced = model.clone(num_classes=num_classes)
    params = {name: value for name, value in variables["params"].items() if name not in HEADS}
    if num_classes:
        names = flatten_dict(variable_shapes(replaced)["params"], sep="/")
        heads = [f"params/{name}" for name in names if name.partition("/")[0] in HEADS]
        drawn = init_named(replaced, heads, jax.random.key(0) if key is None else key)
        head = unflatten_dict(drawn, sep="/")["params"]
        params |= pack_dense(replaced, head) if packed else head
    return replaced, {**variables, "params": params}
