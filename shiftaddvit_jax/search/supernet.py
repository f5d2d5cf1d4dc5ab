"""All configurations of a model in one program: each linear layer branches to one of its choices."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from shiftaddvit_jax.models.inspect import Images, on_xla
from shiftaddvit_jax.nn.linear import make_linear

Fits = Mapping[str, Mapping[str, Mapping[str, Any]]]  # parameters by layer and choice


def make_supernet(
    model: nn.Module, fits: Fits, choices: Sequence[str]
) -> Callable[[PyTree, Fits, Int[Array | np.ndarray, "layers"], Images], Float[Array, "batch classes"]]:
    """A function of the dense model's variables, fitted choices, picked choices and images: the logits.

    One compiled program serves every configuration, and computes only what is picked. Picks have for each
    layer, in the order of ``fits``, the place of its choice in ``choices``.

    Args:
      model: the dense model.
      fits: from `fit_choices`.
      choices: the names of the choices.
    """
    model = on_xla(model)
    modules = {
        path: {
            choice: make_linear(
                "dense",
                _outputs(fits[path][choice]),
                model.primitives.choosing({"layer": choice}),
                name="layer",
            ).clone(parent=None, name=None)
            for choice in choices
        }
        for path in fits
    }
    places = {path: place for place, path in enumerate(fits)}

    @jax.jit
    def logits(variables, fits, picks, images):
        def branch(call, arguments, keywords, context):
            path = "/".join(context.module.path)
            if context.method_name != "__call__" or path not in places:
                return call(*arguments, **keywords)
            branches = [
                lambda x, module=module, params=fits[path][choice]: module.apply({"params": params}, x)
                for choice, module in modules[path].items()
            ]
            return jax.lax.switch(picks[places[path]], branches, arguments[0])

        with nn.intercept_methods(branch):
            return model.apply(variables, images)

    return logits


def _outputs(params):
    return params.get("dense", params)["kernel"].shape[-1]
