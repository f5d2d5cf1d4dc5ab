"""A transformer block: attention and MLP, each behind a LayerNorm and beside a residual."""

import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from kernels_tvm.descriptions import HammingLinear
from shiftaddvit_jax.nn.attention import make_attention
from shiftaddvit_jax.nn.kernels import (
    describe_linear,
    describe_mlp,
    hamming_linear_arrays,
    is_packed,
    mlp_arrays,
    why_no_kernel,
)
from shiftaddvit_jax.nn.linear import Primitives
from shiftaddvit_jax.nn.mlp import Mlp
from shiftaddvit_jax.ops.custom_call import with_xla_gradient
from shiftaddvit_jax.ops.fused import fused_hamming_linear, fused_mlp
from shiftaddvit_jax.ops.implementation import uses_tvm


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
        if self.train or self.is_initializing() or watched:
            return False
        reason = why_no_kernel(x, (kind,), self.primitives.weight_bits, self.primitives.activations)
        packed = is_packed(self.variables["params"])
        return reason is None and uses_tvm("a block", self.primitives.implementation, prefer=packed)

    def _is_fused_attention(self, x):
        channels = x.shape[-1]
        return (
            self.attention == "hamming_linear"
            and self.primitives.threshold in ("zero", "sample")
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
            )
            for name, outputs in (("qkv", 3 * channels), ("proj", channels))
        )
        sample = primitives.threshold == "sample"
        kernel = HammingLinear(qkv, proj, self.num_heads, x.shape[1], sample, norm.epsilon)

        def forward(x, params):
            arrays = hamming_linear_arrays(kernel, params["norm1"], params["attn"], primitives.weight_bits)
            return fused_hamming_linear(kernel, arrays, x)

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
        )

        def forward(x, params):
            arrays = mlp_arrays(kernel, params["norm2"], params["mlp"], primitives.weight_bits)
            return fused_mlp(kernel, arrays, x)

        return with_xla_gradient(forward, _reference(norm, mlp, grid))(x, params)


def _reference(norm, branch, grid):
    """x + branch(norm(x)) on XLA, as a function of x and the parameters of both, by their modules' names."""
    norm_, name = norm.clone(parent=None), branch.name
    branch = branch.clone(parent=None, primitives=dataclasses.replace(branch.primitives, implementation="xla"))

    def function(x, params):
        normalized = norm_.apply({"params": params[norm.name]}, x)
        return x + branch.apply({"params": params[name]}, normalized, grid)

    return function
