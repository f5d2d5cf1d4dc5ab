"""A model's variables: their shapes, their number, how they are drawn, and the stage that they belong to."""

from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, PRNGKeyArray, PyTree

from shiftaddvit_jax.models.inspect import on_xla
from shiftaddvit_jax.nn import ShiftDense

# The linear layers, by the module of a block that has them.
_MLP = ("fc1", "fc2")
LINEAR_LAYERS = {"attn": ("qkv", "q", "kv", "qk", "k", "v", "proj"), "mlp": _MLP}
# GNT's MLPs in its view attention and between its blocks.
LINEAR_LAYERS |= {"position": _MLP, "score": _MLP, "embed": _MLP, "mix": _MLP}
# The parameters of a model's heads, by the names of their modules.
HEADS = ("head", "head_dist")
# These programs run once, so their compile time matters more than their run time.
COMPILE_QUICKLY = {"xla_backend_optimization_level": 0}


def example_inputs(model: nn.Module, batch: int = 1) -> tuple[PyTree, ...]:
    """The shapes and dtypes of the arguments of one call: ``batch`` images of the model's own size.

    A model that takes something else has a method of this name that says so.
    """
    if hasattr(model, "example_inputs"):
        return model.example_inputs(batch)
    return (jax.ShapeDtypeStruct((batch, model.image_size, model.image_size, 3), jnp.float32),)


def example_batch(model: nn.Module, batch: int = 1) -> Any:
    """The shapes and dtypes of ``batch`` examples: images, or what `look_up` finds of rays."""
    inputs = example_inputs(model, batch)
    if not hasattr(model, "look_up"):
        return inputs[0]
    return jax.eval_shape(partial(model.apply, {}, method="look_up"), *inputs)


def init_function(model: nn.Module) -> Callable[[PRNGKeyArray], PyTree]:
    """The function from a random key to ``model``'s variables, at the model's own image size."""

    def init(key):
        zeros = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), example_inputs(model))
        return model.init(key, *zeros)

    return init


def variable_shapes(model: nn.Module) -> PyTree:
    """The shapes and dtypes of ``model``'s variables, the same for every implementation.

    Raises:
      ValueError: an image size that does not fit the model.
    """
    with nn.intercept_methods(_skip_shift_products):
        return jax.eval_shape(init_function(on_xla(model)), jax.eval_shape(jax.random.key, 0))


def _skip_shift_products(call, arguments, keywords, context):
    # Rounding and packing weights takes a third of the tracing time and changes no shape.
    if isinstance(context.module, ShiftDense):
        if context.method_name == "weight":
            return None
        if context.method_name == "project":
            return jnp.zeros((*arguments[0].shape[:-1], context.module.features), context.module.dtype)
    return call(*arguments, **keywords)


def init_variables(model: nn.Module, key: PRNGKeyArray) -> PyTree:
    """``model``'s variables, drawn from ``key``."""
    # Under jit the forward pass is dead code.
    return jax.jit(init_function(model), compiler_options=COMPILE_QUICKLY)(key)


def init_named(model: nn.Module, names: Collection[str], key: PRNGKeyArray) -> dict[str, Array]:
    """The variables ``names`` of ``model``, such as ``params/head/bias``, drawn from ``key``."""

    # As in `init_variables`, what the names do not need is dead code.
    @partial(jax.jit, compiler_options=COMPILE_QUICKLY)
    def make(key):
        flat = flatten_dict(init_function(model)(key), sep="/")
        return {name: flat[name] for name in names}

    return make(key)


def count_parameters(model: nn.Module) -> int:
    """The number of trained numbers in ``model``."""
    return sum(leaf.size for leaf in jax.tree.leaves(variable_shapes(model)["params"]))


def linear_layers(model: nn.Module) -> list[str]:
    """The paths of the linear layers in ``model``'s blocks, such as ``stage1/block1/mlp/fc1``."""
    paths: dict[tuple[str, ...], Any] = flatten_dict(variable_shapes(model)["params"])
    found = {
        path[: at + 2]
        for path in paths
        for at, module in enumerate(path[:-1])
        if path[at + 1] in LINEAR_LAYERS.get(module, ())
    }
    return ["/".join(path) for path in sorted(found)]


def stage_of(path: Sequence[str]) -> int:
    """The index of the stage to which the variable at ``path`` (collection first) belongs; 0 in a ViT."""
    stage = path[1].removeprefix("stage")
    return int(stage) - 1 if stage.isdigit() else 0
