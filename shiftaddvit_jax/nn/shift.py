"""A linear layer whose weights are powers of two (DeepShift, arXiv 1905.13298)."""

from collections.abc import Callable
from typing import Any, Literal

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.linen.dtypes import promote_dtype
from jaxtyping import Array, Float

from shiftaddvit_jax.nn.dense import promote_factors
from shiftaddvit_jax.nn.primitives import KERNEL_INIT
from shiftaddvit_jax.ops import (
    PackedWeight,
    fixed_point,
    packed_product,
    power_of_two,
    power_of_two_codes,
    power_of_two_weight,
    shift_product,
    shift_weight,
    unpack_weight,
)
from shiftaddvit_jax.ops.activations import Activations
from shiftaddvit_jax.ops.implementation import Implementation, uses_tvm
from shiftaddvit_jax.ops.matshift import prepare_weight, prepared_product
from shiftaddvit_jax.ops.packing import has_packed_form
from shiftaddvit_jax.validation import check_choice


class ShiftDense(nn.Module):
    """``y = x W + b`` where every entry of W is sign * 2^exponent, or a sum or difference of two powers.

    A call with a random stream ``"rounding"`` draws each weight of mode ``"q"`` that is one power of two as
    the power below or above its entry of ``kernel``, so that the mean over draws is that entry wherever the
    range allows (see `power_of_two`). Without the stream, and in other kinds of weight, it is the nearest.

    Attributes:
      features: number of outputs.
      use_bias: whether to add b; with fixed-point activations, b is rounded to their grid.
      mode: ``"q"`` keeps a dense ``kernel`` [inputs, outputs] and rounds it in every forward pass;
        ``"ps"`` trains ``sign`` and ``exponent`` [inputs, outputs] themselves.
      freeze_sign: in mode ``"ps"``, give ``sign`` no gradient.
      weight_bits: bits of a power of two, which set the range of exponents: -14 to 0 at 5 bits.
      weight_terms: powers of two in a weight, see `shift_weight`; mode ``"ps"`` has one.
      activations: number format of ``x``, see `shiftaddvit_jax.ops.matshift`.
      implementation: see `shiftaddvit_jax.ops`.
      dtype: dtype of the computation; by default the common one of ``x`` and the parameters.
      kernel_init: what ``kernel`` is drawn by, and what ``sign`` and ``exponent`` are made of.
    """

    features: int
    use_bias: bool = True
    mode: Literal["q", "ps"] = "q"
    freeze_sign: bool = False
    weight_bits: int = 5
    weight_terms: int = 1
    activations: Activations = "float"
    implementation: Implementation = None
    dtype: Any = None
    kernel_init: nn.initializers.Initializer = KERNEL_INIT

    @nn.compact
    def __call__(
        self, x: Float[Array, "*batch inputs"], train: bool = False
    ) -> Float[Array, "*batch outputs"]:
        """Apply the layer; ``train`` changes nothing.

        Raises:
          ValueError: unknown mode, or mode ``"ps"`` with two powers.
        """
        check_choice("shift mode", self.mode, ("q", "ps"))
        if self.mode == "ps" and self.weight_terms != 1:
            raise ValueError(f"mode 'ps' trains one power of two a weight, not {self.weight_terms}")
        shape = (x.shape[-1], self.features)
        if self.has_variable("params", "codes"):
            pass  # packed weights are neither drawn here nor trained
        elif self.mode == "q":
            self.param("kernel", self.kernel_init, shape, jnp.float32)
        else:
            self.param("sign", self._init_sign, shape)
            self.param("exponent", self._init_exponent, shape)
        if self.use_bias:
            self.param("bias", nn.initializers.zeros, (self.features,), jnp.float32)
        return self.project(x, self.weight())

    def weight(self) -> Float[Array, "inputs outputs"] | PackedWeight:
        """The power-of-two weight with its straight-through gradient, or the packed weight."""
        if self.has_variable("params", "codes"):
            return PackedWeight(*(self.get_variable("params", name) for name in PackedWeight._fields))
        if self.mode == "ps":
            sign = self.get_variable("params", "sign")
            sign = jax.lax.stop_gradient(sign) if self.freeze_sign else sign
            return power_of_two_weight(sign, self.get_variable("params", "exponent"), self.weight_bits)
        kernel = self.get_variable("params", "kernel")
        if self.weight_terms == 1 and self.has_rng("rounding"):
            return power_of_two(kernel, self.weight_bits, "stochastic", self.make_rng("rounding"))
        return shift_weight(kernel, self.weight_bits, self.weight_terms)

    def project(
        self, x: Float[Array, "*batch inputs"], weight: Float[Array, "inputs outputs"] | PackedWeight
    ) -> Float[Array, "*batch outputs"]:
        """``x`` times a weight that `weight` returned, plus the bias."""
        bias = self.get_variable("params", "bias") if self.use_bias else None
        if isinstance(weight, PackedWeight):
            x, bias = promote_dtype(x, bias, dtype=self.dtype)
            y = packed_product(x, weight, self.features, self.activations, self.implementation)
        else:
            x, weight, bias = promote_factors(x, weight, bias, dtype=self.dtype)
            implementation = self.implementation
            if not has_packed_form(self.weight_bits, self.weight_terms):
                reason = "there is no kernel for powers of two of more than 5 bits"
                uses_tvm("a shift layer", implementation, unsupported=reason)
                implementation = "xla"
            y = shift_product(x, weight, self.activations, implementation, self.weight_terms)
        return self._add_bias(y, bias)

    def on_xla(
        self, inputs: int
    ) -> Callable[[Float[Array, "*batch inputs"]], Float[Array, "*batch outputs"]]:
        """The layer as a function of its ``inputs`` on XLA; the weight's numbers are made here, once."""
        weight = self.weight()
        bias = self.get_variable("params", "bias") if self.use_bias else None
        if isinstance(weight, PackedWeight):
            weight = jnp.asarray(unpack_weight(weight, inputs, self.features))
        else:
            weight = prepare_weight(weight, self.activations, self.weight_terms)

        def apply(x):
            x_, weight_, bias_ = promote_factors(x, weight, bias, dtype=self.dtype)
            return self._add_bias(prepared_product(x_, weight_, self.activations), bias_)

        return apply

    @nn.nowrap
    def _add_bias(self, y, bias):
        if bias is None:
            return y
        return (y + (fixed_point(bias) if self.activations == "fixed_point" else bias)).astype(y.dtype)

    @nn.nowrap
    def _init_sign(self, key, shape):
        return jnp.sign(self.kernel_init(key, shape, jnp.float32))

    @nn.nowrap
    def _init_exponent(self, key, shape):
        _, exponent = power_of_two_codes(self.kernel_init(key, shape, jnp.float32), self.weight_bits)
        return exponent.astype(jnp.float32)
