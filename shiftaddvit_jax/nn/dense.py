"""Flax's layers that multiply, whose weights may be packed."""

from typing import Any

import flax.linen as nn
from jaxtyping import Array, Float

from shiftaddvit_jax.ops.packing import unblock_weight


class _Packable(nn.Module):
    """A layer whose parameter ``kernel`` [..., outputs] is ``blocks`` once packed, see `block_weight`."""

    @nn.nowrap
    def param(self, name, init, shape, *args, **settings) -> Any:
        """The parameter ``name``, as from `flax.linen.Module.param`; a packed kernel comes unpacked."""
        if name == "kernel" and self.has_variable("params", "blocks"):
            return unblock_weight(self.get_variable("params", "blocks"), shape[-1]).reshape(shape)
        return super().param(name, init, shape, *args, **settings)


class Dense(_Packable, nn.Dense):
    """A dense layer, called like every kind of linear layer."""

    @nn.nowrap  # else an interceptor of methods would see two calls
    def __call__(
        self, x: Float[Array, "*batch inputs"], train: bool = False
    ) -> Float[Array, "*batch outputs"]:
        return super().__call__(x)


class Conv(_Packable, nn.Conv):
    """A convolution."""
