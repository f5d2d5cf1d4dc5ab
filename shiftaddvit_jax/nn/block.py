"""A transformer block: attention and MLP, each behind a LayerNorm and beside a residual."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_tvm.descriptions import HammingLinearDescription, SoftmaxAttentionDescription
from shiftaddvit_jax.nn.attention import make_attention
from shiftaddvit_jax.nn.kernels import (
    attention_arrays,
    describe_linear,
    describe_mlp,
    mlp_arrays,
    runs_on_kernels,
    why_no_kernel,
)
from shiftaddvit_jax.nn.linear import Primitives
from shiftaddvit_jax.nn.mlp import Mlp
from shiftaddvit_jax.ops.custom_call import with_xla_gradient
from shiftaddvit_jax.ops.fused import fused_attention, fused_mlp

MOST_SOFTMAX_TOKENS = 64  # for which softmax attention has a kernel


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
        norm1, norm2 = (
            nn.LayerNorm(self.layer_norm_eps or 1e-6, dtype=self.primitives.dtype, name=name)
            for name in ("norm1", "norm2")
        )
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
        if self._has_kernel(x, self.projections) and self._is_fused_attention(x):
            x = self._fused_attention(x, norm1, attention, grid)
        else:
            x = x + drop_path(attention(norm1(x), grid))
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
        if self._has_kernel(x, self.mlp) and x.shape[-1] % 16 == 0 and hidden % 16 == 0:
            return self._fused_mlp(x, norm2, mlp, grid)
        return x + drop_path(mlp(norm2(x), grid))

    def _has_kernel(self, x, kind):
        """Whether a whole branch of this block, with linear layers of a kind, is left to one TVM kernel."""
        watched = self.is_mutable_collection("routing")
        primitives = self.primitives
        reason = why_no_kernel(x, (kind,), primitives.weight_bits, primitives.activations)
        return runs_on_kernels(self, x, primitives.implementation, self.train or watched, reason)

    def _is_fused_attention(self, x):
        channels = x.shape[-1]
        binary = self.attention == "hamming_linear" and self.primitives.threshold in ("zero", "sample")
        # For many tokens XLA's products of whole matrices are the faster ones.
        few = self.attention == "msa" and x.shape[1] <= MOST_SOFTMAX_TOKENS
        return (
            (binary or few)
            and channels % 16 == 0
            and channels % self.num_heads == 0
            and channels // self.num_heads % 8 == 0
        )

    def _fused_attention(self, x, norm, attention, grid):
        params = {name: self.variables["params"][name] for name in ("norm1", "attn")}
        primitives, channels = self.primitives, x.shape[-1]
        qkv, proj = (
            describe_linear(
                self.projections,
                params["attn"][name],
                channels,
                outputs,
                primitives.activations,
                primitives.implementation,
                primitives.precision,
            )
            for name, outputs in (("qkv", 3 * channels), ("proj", channels))
        )
        if self.attention == "msa":
            kernel = SoftmaxAttentionDescription(qkv, proj, self.num_heads, x.shape[1], norm.epsilon)
        else:
            sample = primitives.threshold == "sample"
            kernel = HammingLinearDescription(qkv, proj, self.num_heads, x.shape[1], sample, norm.epsilon)

        def forward(x, params):
            arrays = attention_arrays(kernel, params["norm1"], params["attn"], primitives.weight_bits)
            return fused_attention(kernel, arrays, x)

        return with_xla_gradient(forward, _reference(norm, attention, grid))(x, params)

    def _fused_mlp(self, x, norm, mlp, grid):
        params = {name: self.variables["params"][name] for name in ("norm2", "mlp")}
        primitives = self.primitives
        kernel = describe_mlp(
            self.mlp,
            params["mlp"],
            x.shape[-1],
            mlp.hidden_features,
            x.shape[1],
            tuple(grid) if self.depthwise else None,
            self.relu,
            norm.epsilon,
            primitives.activations,
            primitives.implementation,
            primitives.precision,
        )

        def forward(x, params):
            arrays = mlp_arrays(kernel, params["norm2"], params["mlp"], primitives.weight_bits)
            return fused_mlp(kernel, arrays, x)

        return with_xla_gradient(forward, _reference(norm, mlp, grid))(x, params)


def _reference(norm, branch, grid):
    """The function (x, parameters of both) -> x + branch(norm(x)) on XLA."""
    primitives = dataclasses.replace(branch.primitives, implementation="xla")
    norm_alone, branch_alone = norm.clone(parent=None), branch.clone(parent=None, primitives=primitives)

    def function(x, params):
        normalized = norm_alone.apply({"params": params[norm.name]}, x)
        return x + branch_alone.apply({"params": params[branch.name]}, normalized, grid)

    return function
