"""The MLP of a block, with or without a depthwise convolution between its linear layers."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from shiftaddvit_jax.nn.linear import make_linear
from shiftaddvit_jax.nn.primitives import Primitives
from shiftaddvit_jax.ops import depthwise_conv_gelu


class DepthwiseConv(nn.Module):
    """A 3x3 depthwise convolution over the grid of tokens, with a bias and a GELU.

    Attributes:
      primitives: how the convolution is computed.
    """

    primitives: Primitives = Primitives()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens channels"], grid: tuple[int, int], train: bool = False
    ) -> Float[Array, "batch tokens channels"]:
        channels = x.shape[-1]
        # He initialisation for the fan-out of one kernel, as in PVTv2.
        kernel = self.param("kernel", nn.initializers.normal((2 / 9) ** 0.5), (3, 3, channels), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros, (channels,), jnp.float32)
        (x,) = promote_dtype(x, dtype=self.primitives.dtype)
        image = x.reshape(x.shape[0], *grid, channels)
        implementation = self.primitives.implementation_of_ops(train)
        return depthwise_conv_gelu(image, kernel, bias, implementation).reshape(x.shape)


class Mlp(nn.Module):
    """Linear layer, optional ReLU, optional depthwise convolution, GELU, linear layer.

    Attributes:
      ratio: hidden width divided by the channels.
      kind: kind of both linear layers, see `make_linear`.
      depthwise: whether a 3x3 depthwise convolution over the grid of tokens comes before the GELU (PVTv2).
      relu: whether a ReLU comes right after the first linear layer (PVTv2-B2-Li).
      dropout: rate after the GELU and after the last layer.
      primitives: how shifts are computed.
    """

    ratio: float = 4
    kind: str = "dense"
    depthwise: bool = False
    relu: bool = False
    dropout: float = 0.0
    primitives: Primitives = Primitives()

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens channels"], grid: tuple[int, int], train: bool = False
    ) -> Float[Array, "batch tokens channels"]:
        """Apply the MLP to the tokens of ``grid``, in rows; ``train`` turns on dropout and routers' noise."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        channels = x.shape[-1]
        x = make_linear(self.kind, int(channels * self.ratio), self.primitives, name="fc1")(x, train)
        if self.relu:
            x = jax.nn.relu(x)
        if self.depthwise:
            x = DepthwiseConv(self.primitives, name="dwconv")(x, grid, train)
        else:
            x = jax.nn.gelu(x, approximate=False)
        x = drop(x)
        x = make_linear(self.kind, channels, self.primitives, name="fc2")(x, train)
        return drop(x)


class ReluMlp(nn.Module):
    """Linear layer, ReLU, linear layer.

    Attributes:
      hidden: width between the two.
      features: number of outputs.
      kind: kind of both linear layers, see `make_linear`.
      dropout: rate after the ReLU and after the last layer.
      primitives: how shifts are computed.
    """

    hidden: int
    features: int
    kind: str = "dense"
    dropout: float = 0.0
    primitives: Primitives = Primitives()

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch inputs"], train: bool = False
    ) -> Float[Array, "*batch outputs"]:
        """Apply the MLP; ``train`` turns on dropout and routers' noise."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        x = make_linear(self.kind, self.hidden, self.primitives, name="fc1")(x, train)
        x = drop(jax.nn.relu(x))
        x = make_linear(self.kind, self.features, self.primitives, name="fc2")(x, train)
        return drop(x)
