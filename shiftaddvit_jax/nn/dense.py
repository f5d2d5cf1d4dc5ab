"""Flax's layers that multiply, whose weights may be packed."""

import math
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from shiftaddvit_jax.ops.implementation import Implementation
from shiftaddvit_jax.ops.int8 import packed_int8_product, unblock_int8
from shiftaddvit_jax.ops.packing import unblock_weight


def promote_factors(
    x: Array, kernel: Array, bias: Array | None, *, dtype: Any = None, inexact: bool = True
) -> tuple[Array, Array, Array | None]:
    """``x`` and ``kernel`` in ``dtype``, by default their common one; the bias in float32 at least.

    A bias's gradient is a sum over all tokens, for which bfloat16 has too few digits: with 1,024 tokens it
    was off by a quarter.
    """
    x, kernel = promote_dtype(x, kernel, dtype=dtype, inexact=inexact)
    return x, kernel, bias if bias is None else bias.astype(jnp.promote_types(x.dtype, jnp.float32))


class _Packable(nn.Module):
    """A layer whose parameter ``kernel`` [..., outputs] is ``blocks`` once packed.

    They are what `block_weight` makes, or with a ``scale`` beside them `block_int8`.
    """

    promote_dtype: Any = promote_factors

    @nn.nowrap
    def param(self, name, init, shape, *args, **settings) -> Any:
        """The parameter ``name``, as from `flax.linen.Module.param`; a packed kernel comes unpacked."""
        if name == "kernel" and self.has_variable("params", "blocks"):
            blocks, outputs = self.get_variable("params", "blocks"), shape[-1]
            if not self.has_variable("params", "scale"):
                return unblock_weight(blocks, outputs).reshape(shape)
            scale, inputs = self.get_variable("params", "scale"), math.prod(shape[:-1])
            return unblock_int8(blocks, scale, inputs, outputs).reshape(shape)
        return super().param(name, init, shape, *args, **settings)


class Dense(_Packable, nn.Dense):
    """A dense layer, called like every kind of linear layer.

    Attributes:
      implementation: of a product with a weight packed in int8, see `shiftaddvit_jax.ops`.
    """

    implementation: Implementation = None

    @nn.nowrap  # else an interceptor of methods would see two calls
    def __call__(
        self, x: Float[Array, "*batch inputs"], train: bool = False
    ) -> Float[Array, "*batch outputs"]:
        if self.has_variable("params", "scale"):
            tiles, scale, bias = (self.get_variable("params", name) for name in ("blocks", "scale", "bias"))
            x, bias = promote_dtype(x, bias, dtype=self.dtype)
            y = packed_int8_product(x, tiles, scale, self.features, self.implementation)
            return y if bias is None else y + bias
        return _in_dtype(super().__call__(x), self.dtype)


class Conv(_Packable, nn.Conv):
    """A convolution."""

    @nn.nowrap
    def __call__(
        self, x: Float[Array, "batch height width channels"]
    ) -> Float[Array, "batch rows columns features"]:
        return _in_dtype(super().__call__(x), self.dtype)


def _in_dtype(y, dtype):
    return y if dtype is None else y.astype(dtype)
