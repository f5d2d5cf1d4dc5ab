"""Where each mixture of experts sends an image's tokens."""

from collections.abc import Sequence
from functools import cached_property
from threading import Lock
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Bool, Float, PyTree

from shiftaddvit_jax.models.inspect import natural_order, square_grid, watch_routers
from shiftaddvit_jax.models.registry import linear_kinds
from shiftaddvit_jax.models.variables import COMPILE_QUICKLY

Maps = dict[str, Bool[np.ndarray, "_tokens"]]


class RoutingMaps:
    """A function of preprocessed images: whether each token goes to the shift expert, by the MoE layer.

    It computes on XLA, image by image. `prepare` compiles, once, in the thread that calls it.
    """

    def __init__(self, model: nn.Module, variables: PyTree) -> None:
        self._model, self._variables = model, variables
        self._lock = Lock()

    def prepare(self) -> None:
        """Compile what a call computes."""
        with self._lock:
            _ = self._program

    def __call__(self, images: Sequence[Float[np.ndarray, "size size 3"]]) -> list[Maps]:
        """The maps of each image, the layers in the order of their blocks."""
        return [self._maps(image) for image in images]

    def _maps(self, image):
        found = self._program(self._variables, image[None])
        return {
            name.removesuffix("/router"): np.asarray(found[name][0])
            for name in sorted(found, key=natural_order)
        }

    @cached_property
    def _program(self) -> Any:
        side = self._model.image_size
        image = jax.ShapeDtypeStruct((1, side, side, 3), np.float32)
        return watch_routers(self._model).lower(self._variables, image).compile(COMPILE_QUICKLY)


def has_mixtures(model: nn.Module) -> bool:
    """Whether a model has mixtures of experts."""
    return "moe" in linear_kinds(model)


def describe_maps(maps: Maps) -> list[dict[str, Any]]:
    """Maps as JSON has them.

    Of each layer its name; the ``side`` of its square grid of tokens; ``shift``, a character for each token
    of the grid, row by row, 1 for the shift expert and 0 for the dense one; ``shift_share``, of all tokens.
    """
    layers = []
    for name, shifted in maps.items():
        before, side = square_grid(len(shifted))
        characters = "".join("01"[int(token)] for token in shifted[before:])
        layers.append({"name": name, "side": side, "shift_share": float(shifted.mean()), "shift": characters})
    return layers
