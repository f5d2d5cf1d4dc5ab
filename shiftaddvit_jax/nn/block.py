"""A transformer block: attention and MLP, each behind a LayerNorm and beside a residual."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from shiftaddvit_jax.nn.attention import make_attention
from shiftaddvit_jax.nn.mlp import Mlp
from shiftaddvit_jax.nn.norm import make_layer_norm
from shiftaddvit_jax.nn.plan import attention_sum, in_one_kernel, mlp_sum
from shiftaddvit_jax.nn.primitives import Primitives


class DropPath(nn.Module):
    """Stochastic depth: in training, drops a whole residual branch of some images and scales the rest up.

    Attributes:
      rate: probability of dropping.
    """

    rate: float = 0.0

    @nn.compact
    def __call__(self, x: Float[Array, "batch *shape"], train: bool = False) -> Float[Array, "batch *shape"]:
        """``x``; in training some images are 0 and the others scaled up, by the stream ``"dropout"``."""
        if not train or self.rate == 0.0:
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
      mlp_ratio: the MLP's hidden width divided by the channels.
      sr_ratio: spatial reduction of keys and values, for attention ``"sra"``.
      depthwise: whether the MLP has a depthwise convolution.
      relu: whether the MLP has a ReLU before the depthwise convolution.
      dropout: rate in attention's output and MLP.
      drop_path: rate of stochastic depth.
      layer_norm_eps: epsilon of every LayerNorm; by default the originals', see `shiftaddvit_jax.nn.norm`.
      trained_grid: height and width of the grid that attention ``"binary_softmax"`` learns its biases for; by
        default that of its tokens.
      primitives: how shifts and additions are computed.
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
    trained_grid: tuple[int, int] | None = None
    primitives: Primitives = Primitives()

    def setup(self) -> None:
        """The layers by their names."""
        self.norm1 = make_layer_norm(self.layer_norm_eps, self.primitives)
        self.attn = make_attention(
            self.attention,
            num_heads=self.num_heads,
            projections=self.projections,
            sr_ratio=self.sr_ratio,
            layer_norm_eps=self.layer_norm_eps,
            dropout=self.dropout,
            trained_grid=self.trained_grid,
            primitives=self.primitives.inside("attn"),
        )
        self.norm2 = make_layer_norm(self.layer_norm_eps, self.primitives)
        self.ffn = Mlp(
            self.mlp_ratio,
            self.mlp,
            self.depthwise,
            self.relu,
            self.dropout,
            self.primitives.inside("mlp"),
            name="mlp",
        )
        self.stochastic_depth = DropPath(self.drop_path)

    def __call__(
        self, x: Float[Array, "batch tokens channels"], grid: tuple[int, int], train: bool = False
    ) -> Float[Array, "batch tokens channels"]:
        """Both sums; ``train`` turns on dropout, stochastic depth and the routers' noise."""
        both = Block._add_both
        if train and self.primitives.remat:
            both = nn.remat(both, static_argnums=(2, 3))
        return both(self, x, grid, train)

    @nn.nowrap
    def _add_both(self, x, grid, train):
        x = self.add_attention(x, grid, train=train)
        return self.add_mlp(x, grid, train=train)

    @in_one_kernel(attention_sum)
    def add_attention(
        self, x: Float[Array, "batch tokens channels"], grid: tuple[int, int], train: bool = False
    ) -> Float[Array, "batch tokens channels"]:
        """``x + attention(norm(x))``."""
        return x + self.stochastic_depth(self.attn(self.norm1(x), grid, train), train)

    @in_one_kernel(mlp_sum)
    def add_mlp(
        self, x: Float[Array, "batch tokens channels"], grid: tuple[int, int], train: bool = False
    ) -> Float[Array, "batch tokens channels"]:
        """``x + mlp(norm(x))``."""
        return x + self.stochastic_depth(self.ffn(self.norm2(x), grid, train), train)
