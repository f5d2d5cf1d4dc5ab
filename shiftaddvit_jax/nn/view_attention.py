"""GNT's transformers (arXiv 2207.13298): one over the views of a point, one over the points of a ray."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from shiftaddvit_jax.nn.attention import make_attention
from shiftaddvit_jax.nn.linear import make_linear
from shiftaddvit_jax.nn.mlp import ReluMlp
from shiftaddvit_jax.nn.norm import make_layer_norm
from shiftaddvit_jax.nn.primitives import Primitives


class ViewAttention(nn.Module):
    """Each point's sum over views, weighed channel by channel.

    With keys k = W_k f and values v = W_v k of a view's features f, and an embedding p of how differently the
    view's camera looks at the point, the weights are softmax(MLP(k - q + p)) over the views that see the
    point, and what they weigh is v + p. Both MLPs have an eighth of the channels inside. GNT's own q, k and v
    have no biases; here all linear layers do, and GNT's weights come with zeros.

    Attributes:
      mlp: kind of the MLPs' linear layers, see `make_linear`.
      projections: kind of the other linear layers.
      dropout: rate of the weights and of the output.
      primitives: how shifts are computed.
    """

    mlp: str = "dense"
    projections: str = "dense"
    dropout: float = 0.0
    primitives: Primitives = Primitives()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "rays points channels"],
        features: Float[Array, "rays points views channels"],
        differences: Float[Array, "rays points views 4"],
        visible: Bool[Array, "rays points views"],
        train: bool = False,
    ) -> Float[Array, "rays points channels"]:
        """The sums, projected; ``train`` turns on dropout and the routers' noise."""
        drop = nn.Dropout(self.dropout, deterministic=not train)
        channels = x.shape[-1]

        def linear(name):
            return make_linear(self.projections, channels, self.primitives, name=name)

        def mlp(name):
            inside = self.primitives.inside(name)
            return ReluMlp(channels // 8, channels, self.mlp, primitives=inside, name=name)

        query = linear("q")(x, train)
        keys = linear("k")(features, train)
        values = linear("v")(keys, train)
        position = mlp("position")(differences, train)
        scores = mlp("score")(keys - query[:, :, None] + position, train)
        # A point that no view sees weighs all views alike, as in GNT's code.
        scores = jnp.where(visible[..., None], scores.astype(jnp.float32), -1e9)
        weights = drop(jax.nn.softmax(scores, axis=2)).astype(values.dtype)
        return drop(linear("proj")(jnp.sum((values + position) * weights, axis=2), train))


class ReluBlock(nn.Module):
    """``x + attention(norm(x))``, then ``x + mlp(norm(x))``, with a ReLU in an MLP four times as wide inside.

    Attributes:
      channels: of ``x``.
      mlp: kind of the MLPs' linear layers.
      projections: kind of the attention's linear layers.
      dropout: rate in attention and MLP.
      layer_norm_eps: epsilon of every LayerNorm; by default 1e-6.
      primitives: how shifts and additions are computed.
    """

    channels: int
    mlp: str = "dense"
    projections: str = "dense"
    dropout: float = 0.0
    layer_norm_eps: float | None = None
    primitives: Primitives = Primitives()

    def setup(self) -> None:
        """The layers by their names."""
        self.norm1 = make_layer_norm(self.layer_norm_eps, self.primitives)
        self.attn = self.make_attention(self.primitives.inside("attn"))
        self.norm2 = make_layer_norm(self.layer_norm_eps, self.primitives)
        inside, wide = self.primitives.inside("mlp"), 4 * self.channels
        self.ffn = ReluMlp(wide, self.channels, self.mlp, self.dropout, inside, name="mlp")

    @nn.nowrap
    def make_attention(self, primitives: Primitives) -> nn.Module:
        """The block's attention."""
        raise NotImplementedError

    def __call__(
        self, x: Float[Array, "rays points channels"], *context: Any, train: bool = False
    ) -> Float[Array, "rays points channels"]:
        """Both sums; attention takes ``context``, and ``train`` turns on dropout and the routers' noise."""
        return self.add_mlp(self.add_attention(x, *context, train=train), train=train)

    def add_attention(
        self, x: Float[Array, "rays points channels"], *context: Any, train: bool = False
    ) -> Float[Array, "rays points channels"]:
        """``x + attention(norm(x))``."""
        return x + self.attn(self.norm1(x), *context, train)

    def add_mlp(
        self, x: Float[Array, "rays points channels"], train: bool = False
    ) -> Float[Array, "rays points channels"]:
        """``x + mlp(norm(x))``."""
        return x + self.ffn(self.norm2(x), train)


class ViewBlock(ReluBlock):
    """A block of `ViewAttention`, whose context is the points' features, differences and visibility."""

    @nn.nowrap
    def make_attention(self, primitives: Primitives) -> nn.Module:
        """The sum over views."""
        return ViewAttention(self.mlp, self.projections, self.dropout, primitives)


class RayBlock(ReluBlock):
    """A block whose points attend to each other along each ray; its context is their grid.

    Attributes:
      num_heads: attention heads.
      attention: kind of attention, see `make_attention`.
    """

    num_heads: int = 4
    attention: str = "msa"

    @nn.nowrap
    def make_attention(self, primitives: Primitives) -> nn.Module:
        """Attention along a ray."""
        return make_attention(
            self.attention,
            num_heads=self.num_heads,
            projections=self.projections,
            dropout=self.dropout,
            primitives=primitives,
        )


class ViewRayBlock(nn.Module):
    """A view transformer, an MLP that mixes in where the points are, and a ray transformer.

    Attributes:
      num_heads: heads of the ray transformer.
      attention: kind of the ray transformer's attention, see `make_attention`.
      mlp: kind of the MLPs' linear layers.
      projections: kind of the attentions' linear layers.
      mixes: whether there is the MLP between the two.
      dropout: rate in attentions and MLPs.
      layer_norm_eps: epsilon of every LayerNorm; by default 1e-6.
      primitives: how shifts and additions are computed.
    """

    num_heads: int
    attention: str = "msa"
    mlp: str = "dense"
    projections: str = "dense"
    mixes: bool = True
    dropout: float = 0.0
    layer_norm_eps: float | None = None
    primitives: Primitives = Primitives()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "rays points channels"],
        features: Float[Array, "rays points views channels"],
        differences: Float[Array, "rays points views 4"],
        visible: Bool[Array, "rays points views"],
        encodings: Float[Array, "rays points encodings"],
        train: bool = False,
    ) -> Float[Array, "rays points channels"]:
        """The points' channels from their ``features`` in each view and their own ``encodings``."""

        def settings(name):
            return {
                "channels": x.shape[-1],
                "mlp": self.mlp,
                "projections": self.projections,
                "dropout": self.dropout,
                "layer_norm_eps": self.layer_norm_eps,
                "primitives": self.primitives.inside(name),
                "name": name,
            }

        x = ViewBlock(**settings("view"))(x, features, differences, visible, train=train)
        if self.mixes:
            inside, channels = self.primitives.inside("mix"), x.shape[-1]
            mix = ReluMlp(channels, channels, self.mlp, primitives=inside, name="mix")
            x = mix(jnp.concatenate([x, encodings], axis=-1), train)
        along = RayBlock(num_heads=self.num_heads, attention=self.attention, **settings("ray"))
        return along(x, (1, x.shape[1]), train=train)
