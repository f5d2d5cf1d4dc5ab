"""The three kinds of linear layer, chosen by name."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn

from shiftaddvit_jax.nn.dense import Dense
from shiftaddvit_jax.nn.moe import MoEDense
from shiftaddvit_jax.nn.shift import ShiftDense, kernel_init
from shiftaddvit_jax.ops.activations import Activations
from shiftaddvit_jax.ops.binarize import Threshold
from shiftaddvit_jax.ops.implementation import Implementation
from shiftaddvit_jax.ops.precision import CONV_GENERAL_DILATED, DOT_GENERAL, Precision
from shiftaddvit_jax.validation import check_choice

LINEAR_KINDS = ("dense", "shift", "moe")


@dataclass(frozen=True)
class Primitives:
    """How a model computes its products, shifts and additions: the same for all its layers.

    Attributes:
      weight_bits: bits of a power-of-two weight.
      activations: number format of what is shifted, see `shiftaddvit_jax.ops.matshift`.
      threshold: where queries and keys are binarized, see `shiftaddvit_jax.ops.binarize`.
      implementation: see `shiftaddvit_jax.ops`.
      dtype: dtype of the computation, float32 by default; parameters are float32.
      precision: number format of what dense layers and convolutions over patches multiply.
    """

    weight_bits: int = 5
    activations: Activations = "float"
    threshold: Threshold = "sample"
    implementation: Implementation = None
    dtype: Any = None
    precision: Precision = "float32"

    @property
    def dot_general(self) -> Callable:
        """Of dense layers."""
        return DOT_GENERAL[self.precision]

    @property
    def conv_general_dilated(self) -> Callable:
        """Of convolutions over patches."""
        return CONV_GENERAL_DILATED[self.precision]

    def implementation_of_ops(self, train: bool) -> Implementation:
        """``implementation``, with XLA for None in training: kernels are for inference."""
        return "xla" if train and self.implementation is None else self.implementation


def make_patch_conv(features: int, side: int, primitives: Primitives, *, name: str) -> nn.Conv:
    """A convolution over patches of ``side`` x ``side`` that do not overlap."""
    return nn.Conv(
        features,
        (side, side),
        (side, side),
        "VALID",
        dtype=primitives.dtype,
        conv_general_dilated=primitives.conv_general_dilated,
        name=name,
    )


def multiplies_in_bfloat16(module: nn.Module) -> bool:
    """Whether a module is a dense layer or a convolution whose factors are rounded to bfloat16."""
    return (isinstance(module, nn.Dense) and module.dot_general is DOT_GENERAL["bfloat16"]) or (
        isinstance(module, nn.Conv) and module.conv_general_dilated is CONV_GENERAL_DILATED["bfloat16"]
    )


def make_linear(
    kind: str, features: int, primitives: Primitives, *, name: str, use_bias: bool = True, train: bool = False
) -> nn.Module:
    """A linear layer of the kind ``"dense"``, ``"shift"`` or ``"moe"``, to be called in a compact method.

    Raises:
      ValueError: unknown kind.
    """
    check_choice("kind of linear layer", kind, LINEAR_KINDS)
    if kind == "dense":
        return Dense(
            features,
            use_bias,
            primitives.dtype,
            kernel_init=kernel_init,
            dot_general=primitives.dot_general,
            name=name,
        )
    settings = {
        "weight_bits": primitives.weight_bits,
        "activations": primitives.activations,
        "implementation": primitives.implementation,
        "dtype": primitives.dtype,
        "name": name,
    }
    if kind == "shift":
        return ShiftDense(features, use_bias, **settings)
    return MoEDense(features, use_bias, train, precision=primitives.precision, **settings)
