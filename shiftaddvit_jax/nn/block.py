"""A transformer block: attention and MLP, each behind a LayerNorm and beside a residual."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from shiftaddvit_jax.nn.attention import make_attention
from shiftaddvit_jax.nn.linear import Primitives
from shiftaddvit_jax.nn.mlp import Mlp


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a whole residual branch of some images and scales the rest up.

    Attributes:
      rate: probability of dropping.
      train: whether to drop, from the stream ``"dropout"``.
    """

    rate: float = 0.0
    train: bool = False

    @nn.compact
    def __call__(self, x: Float[Array, "batch *shape"]) -> Float[Array, "batch *shape"]:
        if not self.train or self.rate == 0.0:
            return x
        shape = (x.shape[0],) + (1,) * (x.ndim - 1)
        keep = jax.random.bernoulli(self.make_rng("dropout"), 1 - self.rate, shape)
        return jnp.where(keep, x / (1 - self.rate), 0)


class Block(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``.

    Attributes:
      num_heads: attention heads.
      attention: kind of attention, see `make_attention`.
      mlp: kind of the MLP's linear layers.
      projections: kind of the attention's linear layers.
      mlp_ratio: the MLP's hidden width over the channels.
      sr_ratio: spatial reduction of keys and values, for attention ``"sra"``.
      depthwise: whether the MLP has a depthwise convolution.
      relu: whether the MLP has a ReLU before it.
      dropout: rate in attention's output and MLP.
      drop_path: rate of stochastic depth.
      layer_norm_eps: epsilon of every LayerNorm; by default the originals': 1e-6, and 1e-5 in a spatial
        reduction.
      primitives: how shifts and additions are computed.
      train: whether dropout, stochastic depth and the routers' noise are on.
    """

    num_heads: int
    attention: str = "msa"
    mlp: str = "dense"
    projections: str = "dense"
    mlp_ratio: float = 4
    sr_ratio: int = 1
    depthwise: bool = False
    relu: bool = False
    dropout: float = 0.0
    drop_path: float = 0.0
    layer_norm_eps: float | None = None
    primitives: Primitives = Primitives()
    train: bool = False

    @nn.compact
    def __call__(
        self, x: Float[Array, "batch tokens channels"], grid: tuple[int, int]
    ) -> Float[Array, "batch tokens channels"]:
        def norm(name):
            return nn.LayerNorm(self.layer_norm_eps or 1e-6, dtype=self.primitives.dtype, name=name)

        drop_path = DropPath(self.drop_path, self.train)
        attention = make_attention(
            self.attention,
            num_heads=self.num_heads,
            projections=self.projections,
            sr_ratio=self.sr_ratio,
            layer_norm_eps=self.layer_norm_eps or 1e-5,
            dropout=self.dropout,
            primitives=self.primitives,
            train=self.train,
            name="attn",
        )
        x = x + drop_path(attention(norm("norm1")(x), grid))
        hidden = int(x.shape[-1] * self.mlp_ratio)
        mlp = Mlp(
            hidden,
            self.mlp,
            self.depthwise,
            self.relu,
            self.dropout,
            self.primitives,
            self.train,
            name="mlp",
        )
        return x + drop_path(mlp(norm("norm2")(x), grid))
