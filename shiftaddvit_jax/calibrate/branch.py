"""The branches of a block: what their linear layers are, take and put out, batch by batch."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from shiftaddvit_jax.models.variables import LINEAR_LAYERS
from shiftaddvit_jax.nn import Block, MoEDense, ShiftDense
from shiftaddvit_jax.nn.linear import precision_of

BATCH = 16  # images at a time
# The methods of a block that are ``x`` plus a branch, and the last layer of each.
SUMS = {"add_attention": "proj", "add_mlp": "fc2"}

Path = tuple[str, ...]
Tokens = Float[Array | np.ndarray, "batch tokens channels"]


class Sum(NamedTuple):
    """``x`` plus a branch of a block, on a grid of tokens."""

    block: Block
    method: str
    grid: tuple[int, int]

    def apply(self, variables: PyTree, x: Tokens) -> Any:
        """The sum."""
        return self.block.apply(variables, x, self.grid, method=self.method)

    def run(self, variables: PyTree, x: Tokens) -> Float[np.ndarray, "batch tokens channels"]:
        """The sum, batch by batch."""
        return np.concatenate([_apply(self, variables, x[batch]) for batch in batches(len(x))])


def visiting_sums(visit: Callable[[str, Sum, np.ndarray], np.ndarray]) -> Callable:
    """An interceptor of methods, by which a block's sums are what ``visit`` makes of them.

    ``visit`` takes the block's path, the sum without dropout and stochastic depth, and its tokens.
    """

    def intercept(call, arguments, keywords, context):
        block = context.module
        if context.method_name not in SUMS or not isinstance(block, Block) or not block.path:
            return call(*arguments, **keywords)
        tokens, grid = arguments
        alone = block.clone(parent=None, name=None, dropout=0.0, drop_path=0.0)
        return visit("/".join(block.path), Sum(alone, context.method_name, grid), np.asarray(tokens))

    return intercept


@partial(jax.jit, static_argnums=0)
def _apply(sum_, variables, x):
    return sum_.apply(variables, x)


def batches(count: int) -> list[slice]:
    """Slices of at most `BATCH` images."""
    return [slice(first, first + BATCH) for first in range(0, count, BATCH)]


def _calls(sum_, variables, x, look: Callable[[nn.Module, Array, Array], Any]) -> list:
    """What ``look`` says, unless None, of each call of a module in a sum: of the module, input and output."""
    seen = []

    def note(call, arguments, keywords, context):
        y = call(*arguments, **keywords)
        if context.method_name == "__call__" and (found := look(context.module, arguments[0], y)) is not None:
            seen.append(found)
        return y

    with nn.intercept_methods(note):
        sum_.apply(variables, x)
    return seen


def linear_modules(sum_: Sum, variables: PyTree, x: Tokens) -> dict[Path, nn.Module]:
    """A sum's linear layers by their paths in the block, in the order of their calls."""
    found = {}

    def look(module, x, y):
        *_, parent, name = ("", "", *module.path)
        if name in LINEAR_LAYERS.get(parent, ()):
            found[module.path] = module.clone(parent=None)

    jax.eval_shape(lambda: _calls(sum_, variables, x, look))
    return found


def choice_of(module: nn.Module) -> str:
    """What a linear layer is, one of `shiftaddvit_jax.names.LAYER_CHOICES`."""
    if isinstance(module, ShiftDense):
        return "shift" if module.weight_terms == 1 else "shift_two_terms"
    if isinstance(module, MoEDense):
        return "moe"
    return "dense_int8" if precision_of(module) == "int8" else "dense"


class Place(NamedTuple):
    """A layer in a dense model's sum and in that of the model that it becomes.

    Attributes:
      teacher: the dense model's sum.
      learner: the new model's sum.
      path: the layer's path in the block.
    """

    teacher: Sum
    learner: Sum
    path: Path

    @property
    def is_last(self) -> bool:
        """Whether the layer's output is added to the new model's tokens."""
        return self.path[-1] == SUMS[self.learner.method]

    def pairs(
        self, variables: tuple[PyTree, PyTree], tokens: tuple[Tokens, Tokens]
    ) -> Iterator[tuple[Float[Array, "tokens inputs"], Float[Array, "tokens outputs"]]]:
        """What goes into the new layer, and what should come out, batch by batch, in float32.

        That is what the dense layer puts out; for the last layer of a branch, also what the new model's
        tokens lack.
        """
        for batch in batches(len(tokens[0])):
            yield _signals(self, variables, (tokens[0][batch], tokens[1][batch]))[:2]

    def noise(
        self, variables: tuple[PyTree, PyTree], tokens: tuple[Tokens, Tokens]
    ) -> Float[np.ndarray, "outputs"]:
        """The mean square of what is missing from each output of the new layer, as it computes it."""
        sums: Any = 0.0
        count = 0
        for batch in batches(len(tokens[0])):
            _, wanted, found = _signals(self, variables, (tokens[0][batch], tokens[1][batch]))
            sums = sums + np.asarray(jnp.sum(jnp.square(wanted - found), axis=0), np.float64)
            count += len(wanted)
        return sums / count


@partial(jax.jit, static_argnums=0)
def _signals(place, variables, tokens):
    def look(module, x, y):
        return tuple(z.reshape(-1, z.shape[-1]) for z in (x, y)) if module.path == place.path else None

    ((_, outputs),) = _calls(place.teacher, variables[0], tokens[0], look)
    ((inputs, found),) = _calls(place.learner, variables[1], tokens[1], look)
    inputs, outputs, found = (z.astype(jnp.float32) for z in (inputs, outputs, found))
    if place.is_last:
        outputs += (tokens[0] - tokens[1]).astype(jnp.float32).reshape(outputs.shape)
    return inputs, outputs, found
