"""The branches of a model: what their linear layers are, take and put out, batch by batch."""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree, Shaped

from shiftaddvit_jax.models.inspect import Examples, count_of, module_variables, on_xla, run, take
from shiftaddvit_jax.models.variables import LINEAR_LAYERS
from shiftaddvit_jax.nn import Block, MoEDense, ReluBlock, ShiftDense
from shiftaddvit_jax.nn.linear import precision_of

BATCH = 16  # images or rays at a time
# The methods of a block that are ``x`` plus a branch, and the last layer of each.
SUMS = {"add_attention": "proj", "add_mlp": "fc2"}
MLPS = ("embed", "mix")  # GNT's, before and between its blocks

Path = tuple[str, ...]
Tokens = tuple[Shaped[Array | np.ndarray, "batch ..."], ...]


class Branch(NamedTuple):
    """A method of a module that puts tokens through linear layers: ``x`` plus a block's branch, or an MLP.

    Attributes:
      module: without dropout and stochastic depth.
      method: the method's name.
      rest: what the method takes after tokens and other arrays, such as the grid.
    """

    module: nn.Module
    method: str
    rest: tuple[Any, ...]

    def apply(self, variables: PyTree, tokens: Tokens) -> Any:
        """What comes out."""
        return self.module.apply(variables, *tokens, *self.rest, method=self.method)

    def run(self, variables: PyTree, tokens: Tokens) -> Float[np.ndarray, "batch ..."]:
        """The same, batch by batch."""
        parts = [_apply(self, variables, take(tokens, batch)) for batch in batches(tokens)]
        return np.concatenate(parts)


def visiting_branches(visit: Callable[[str, Branch, Tokens], Any]) -> Callable:
    """An interceptor of methods, by which a branch's output is what ``visit`` makes of it.

    ``visit`` takes the module's path, the branch and its arrays.
    """

    def intercept(call, arguments, keywords, context):
        module, method = context.module, context.method_name
        is_sum = method in SUMS and isinstance(module, Block | ReluBlock)
        is_mlp = method == "__call__" and module.path[-1:] in [(name,) for name in MLPS]
        if not module.path or not (is_sum or is_mlp):
            return call(*arguments, **keywords)
        still: dict[str, Any] = {name: 0.0 for name in ("dropout", "drop_path") if hasattr(module, name)}
        arrays = tuple(argument for argument in arguments if hasattr(argument, "shape"))
        rest = tuple(argument for argument in arguments if not hasattr(argument, "shape"))
        branch = Branch(module.clone(parent=None, name=None, **still), method, rest)
        return visit("/".join(module.path), branch, arrays)

    return intercept


def find_branches(model: nn.Module, variables: PyTree, examples: Examples) -> dict[tuple[str, str], Branch]:
    """The branches of ``model`` by their modules' paths and their methods."""
    found = {}

    def visit(name, branch, tokens):
        found[name, branch.method] = branch
        # A sum has the shape of its tokens.
        return tokens[0] if branch.method in SUMS else branch.apply(module_variables(name, variables), tokens)

    with nn.intercept_methods(visiting_branches(visit)):
        jax.eval_shape(partial(run, on_xla(model)), variables, take(examples, slice(1)))
    return found


@partial(jax.jit, static_argnums=0)
def _apply(branch, variables, tokens):
    return branch.apply(variables, tokens)


def batches(examples: PyTree) -> list[slice]:
    """Slices of at most `BATCH` of the examples."""
    return [slice(first, first + BATCH) for first in range(0, count_of(examples), BATCH)]


def _calls(branch, variables, tokens, look: Callable[[nn.Module, Array, Array], Any]) -> list:
    """What ``look`` says, unless None, of each call of a module in a branch: of module, input and output."""
    seen = []

    def note(call, arguments, keywords, context):
        y = call(*arguments, **keywords)
        if context.method_name == "__call__" and (found := look(context.module, arguments[0], y)) is not None:
            seen.append(found)
        return y

    with nn.intercept_methods(note):
        branch.apply(variables, tokens)
    return seen


def linear_modules(branch: Branch, variables: PyTree, tokens: Tokens) -> dict[Path, nn.Module]:
    """A branch's linear layers by their paths in its module, in the order of their calls."""
    found = {}

    def look(module, x, y):
        *_, parent, name = ("", "", *module.path)
        if name in LINEAR_LAYERS.get(parent or "mlp", ()):  # an MLP's own layers have no parent here
            found[module.path] = module.clone(parent=None)

    jax.eval_shape(lambda: _calls(branch, variables, take(tokens, slice(1)), look))
    return found


def choice_of(module: nn.Module) -> str:
    """What a linear layer is, one of `shiftaddvit_jax.names.LAYER_CHOICES`."""
    if isinstance(module, ShiftDense):
        return "shift" if module.weight_terms == 1 else "shift_two_terms"
    if isinstance(module, MoEDense):
        return "moe"
    return "dense_int8" if precision_of(module) == "int8" else "dense"


class Place(NamedTuple):
    """A layer in a dense model's branch and in that of the model that it becomes.

    Attributes:
      teacher: the dense model's branch.
      learner: the new model's.
      path: the layer's path in the branch's module.
    """

    teacher: Branch
    learner: Branch
    path: Path

    @property
    def is_last(self) -> bool:
        """Whether the layer's output is added to the new model's tokens."""
        return self.path[-1] == SUMS.get(self.learner.method)

    def pairs(
        self, variables: tuple[PyTree, PyTree], tokens: tuple[Tokens, Tokens]
    ) -> Iterator[tuple[Float[Array, "tokens inputs"], Float[Array, "tokens outputs"]]]:
        """What goes into the new layer, and what should come out, batch by batch, in float32.

        That is what the dense layer puts out; for the last layer of a branch, also what the new model's
        tokens lack.
        """
        for batch in batches(tokens):
            yield _signals(self, variables, take(tokens, batch))[:2]

    def noise(
        self, variables: tuple[PyTree, PyTree], tokens: tuple[Tokens, Tokens]
    ) -> Float[np.ndarray, "outputs"]:
        """The mean square of what is missing from each output of the new layer, as it computes it."""
        sums: Any = 0.0
        count = 0
        for batch in batches(tokens):
            _, wanted, found = _signals(self, variables, take(tokens, batch))
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
        outputs += (tokens[0][0] - tokens[1][0]).astype(jnp.float32).reshape(outputs.shape)
    return inputs, outputs, found
