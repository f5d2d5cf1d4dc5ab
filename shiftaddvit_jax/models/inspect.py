"""What the modules of any model take and return in a forward pass."""

import dataclasses
import math
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from shiftaddvit_jax.models.gnt import Samples
from shiftaddvit_jax.nn.moe import EXPERTS

Look = Callable[[nn.Module, str, tuple[Any, ...], Any], PyTree | None]
Images = Float[Array | np.ndarray, "batch height width 3"]
Examples = Images | Samples


def on_xla(model: nn.Module) -> nn.Module:
    """``model`` without kernels: a kernel computes a whole branch and calls no module in it."""
    return model.clone(primitives=dataclasses.replace(model.primitives, implementation="xla"))


def run(model: nn.Module, variables: PyTree, examples: Examples) -> Any:
    """What ``model`` makes of ``examples``: logits of images, colours of rays' samples."""
    return model.apply(variables, examples, method="render" if isinstance(examples, Samples) else None)


def outputs_of(
    model: nn.Module, variables: PyTree, examples: Examples, size: int
) -> Float[np.ndarray, "batch _"]:
    """What ``model`` makes of ``examples`` on XLA, in batches of one ``size``."""
    apply = jax.jit(partial(run, on_xla(model)))
    return in_batches(partial(apply, variables), examples, size)


def in_batches(
    apply: Callable[[Any], Float[Array, "rows _outputs"]], examples: Examples, size: int
) -> Float[np.ndarray, "batch _outputs"]:
    """What ``apply`` makes of examples, in batches of one size: the last example fills the last one up."""
    count, found = count_of(examples), []
    size = min(size, count)
    for first in range(0, count, size):
        at = np.minimum(np.arange(first, first + size), count - 1)
        found.append(np.asarray(apply(take(examples, at)))[: count - first])
    return np.concatenate(found)


def by_name(examples: PyTree) -> dict[str, Any]:
    """The arrays of examples, or their shapes, by name: ``images``, or the fields of `Samples`."""
    return examples._asdict() if isinstance(examples, Samples) else {"images": examples}


def count_of(examples: PyTree) -> int:
    """The number of rows of arrays."""
    return len(jax.tree.leaves(examples)[0])


def take(examples: PyTree, rows: slice | Int[np.ndarray, "rows"]) -> Any:
    """Some rows of arrays."""
    return jax.tree.map(lambda leaf: leaf[rows], examples)


def features(
    model: nn.Module, variables: PyTree, images: Images
) -> tuple[Float[Array, "batch _rows _columns _channels"], ...]:
    """Each stage's tokens as images, [batch, rows, columns, channels]; one entry a stage, and one for a ViT.

    They are ``model.apply(variables, images, method="features")``, for detection and segmentation: tokens
    after the stage's LayerNorm where it has one, without class and distillation tokens. The model's own
    method ``features`` says which they are in its family. ``variables`` may be packed, and images have any
    size that the model takes.

    Args:
      model: from `create_model` or `reparameterize`; it needs no head.
      variables: its variables, packed or not.
      images: float32 [batch, height, width, 3].

    Raises:
      ValueError: images that the model refuses.
    """
    tokens: Any = model.apply(variables, images, method="features")
    return tokens


def watch(model: nn.Module, look: Look) -> Any:
    """A jitted function of variables and images: the arrays that ``look`` keeps of one forward pass.

    They come as a list by the module's path, one entry a call.

    Args:
      model: from `create_model`, or one of your own.
      look: a function of a module, its method's name, arguments and result; it returns arrays to keep, or
        None.
    """

    @jax.jit
    def forward(variables, images):
        seen: dict[str, list[PyTree]] = {}

        def note(call, arguments, keywords, context):
            result = call(*arguments, **keywords)
            kept = look(context.module, context.method_name, arguments, result)
            if kept is not None:
                seen.setdefault("/".join(context.module.path), []).append(kept)
            return result

        with nn.intercept_methods(note):
            run(model, variables, images)
        return seen

    return forward


def capture(model: nn.Module, variables: PyTree, images: Images, look: Look) -> dict[str, list[PyTree]]:
    """The arrays that ``look`` keeps of a model's forward pass on ``images``, see `watch`."""
    return watch(model, look)(variables, images)


def watch_routers(model: nn.Module) -> Any:
    """A jitted function of variables and images: whether a token's most probable expert is the shift expert.

    It returns lists of one bool array [batch * tokens], by the router's path, as ``block1/mlp/fc1/router``.
    """

    def look(module, method, arguments, result):
        is_router = method == "__call__" and module.path[-1:] == ("router",)
        return jnp.argmax(result, axis=-1) == EXPERTS.index("shift") if is_router else None

    return watch(on_xla(model), look)


def module_variables(name: str, variables: PyTree) -> dict[str, PyTree]:
    """The variables of the module at a path such as ``stage1/block1``, by collection."""
    found = {}
    for collection, tree in variables.items():
        for part in name.split("/"):
            tree = tree.get(part, {}) if isinstance(tree, Mapping) else {}
        if tree:
            found[collection] = tree
    return found


def square_grid(tokens: int) -> tuple[int, int]:
    """The number of tokens before the grid, and the grid's side.

    ``tokens`` alone decides both: images are square, and at most two tokens (class, distillation) come before
    the grid.
    """
    side = math.isqrt(tokens)
    return tokens - side**2, side


def natural_order(name: str) -> list[int | str]:
    """A key that sorts the names of modules so that block 10 comes after block 2."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)]
