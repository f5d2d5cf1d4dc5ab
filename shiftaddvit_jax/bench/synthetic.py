"""Weights, images and router biases that stand in for those of training and of real data."""

import math
from collections.abc import Mapping, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PyTree

from shiftaddvit_jax.costs.counting import ShiftShare, layer_shift_share
from shiftaddvit_jax.models.variables import variable_shapes
from shiftaddvit_jax.nn.moe import EXPERTS
from shiftaddvit_jax.progress import progress_bar

SHIFT = EXPERTS.index("shift")
CLEARLY = 1.0  # how far above the other expert's logit the logit of an expert is that gets all tokens


def random_images(shape: Sequence[int]) -> Float[np.ndarray, "batch height width 3"]:
    """The normally distributed images that every contestant sees."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def random_variables(model: nn.Module) -> PyTree:
    """Random weights that keep activations near 1, always the same.

    NumPy draws them at once, where `init_variables` would compile a program for seconds. No array is uniform,
    as none is after training: XLA would make a uniform constant anew in every call of a program.
    """
    weights, around = np.random.default_rng(0), np.random.default_rng(1)

    def draw(path, leaf):
        if leaf.ndim == 1:
            mean = np.float32(path[-1].key == "scale")
            return mean + np.float32(0.02) * around.standard_normal(leaf.shape, np.float32)
        return weights.standard_normal(leaf.shape, np.float32) / math.sqrt(math.prod(leaf.shape[:-1]))

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(model))


def balance_routers(
    model: nn.Module,
    variables: PyTree,
    images: Float[Array | np.ndarray, "batch height width 3"],
    shift_share: ShiftShare,
) -> dict[str, float]:
    """What to add to each router's bias for the shift expert, so that it gets ``shift_share`` of the tokens.

    An untrained router's share is chance, while the balancing loss aims at the share for which both experts
    take the same time. A share counts a layer's tokens over all ``images`` and is met to the nearest token.

    Returns:
      Biases by the router's name, as in ``"stage1/block1/mlp/fc1/router"``; none without MoE layers.

    Raises:
      ValueError: a layer without a share, or a share outside 0 to 1.
    """
    if not isinstance(shift_share, Mapping):
        layer_shift_share(shift_share, "all layers")  # refuses a wrong number without MoE layers too
    routers = sorted({"/".join(path[:-1]) for path in flatten_dict(variables["params"]) if "router" in path})
    shares = {name: layer_shift_share(shift_share, name.removesuffix("/router")) for name in routers}
    if not shares:
        return {}

    def biases(variables, images):
        found = {}

        def balance(call, arguments, keywords, context):
            logits = call(*arguments, **keywords)
            name = "/".join(context.module.path)
            if name not in shares:
                return logits
            behind = jnp.sort(logits[:, 1 - SHIFT] - logits[:, SHIFT])
            # The bias lies between the last token that goes to the shift expert and the first that does not.
            bounds = jnp.concatenate([behind[:1] - 2 * CLEARLY, behind, behind[-1:] + 2 * CLEARLY])
            count = round(shares[name] * behind.size)
            bias = (bounds[count] + bounds[count + 1]) / 2
            found[name] = bias
            return logits.at[:, SHIFT].add(bias)

        with nn.intercept_methods(balance):
            model.apply(variables, images)
        return found

    with progress_bar() as bar:  # XLA compiles for some seconds
        task = bar.add_task("balancing routers", total=1, note="")
        found = jax.device_get(jax.jit(biases)(variables, images))
        bar.advance(task)
    return {name: float(bias) for name, bias in found.items()}


def with_router_biases(variables: PyTree, biases: Mapping[str, float]) -> PyTree:
    """The variables with the biases of `balance_routers` added."""
    params = flatten_dict(variables["params"], sep="/")
    for name, bias in biases.items():
        params[f"{name}/bias"] = params[f"{name}/bias"] + bias * np.eye(len(EXPERTS), dtype=np.float32)[SHIFT]
    return variables | {"params": unflatten_dict(params, sep="/")}
