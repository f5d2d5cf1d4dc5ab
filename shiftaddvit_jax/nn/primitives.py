"""The settings of a model's products, shifts and additions, in one place for all its layers."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from shiftaddvit_jax.ops.activations import Activations
from shiftaddvit_jax.ops.binarize import Threshold
from shiftaddvit_jax.ops.implementation import Implementation
from shiftaddvit_jax.ops.precision import CONV_GENERAL_DILATED, DOT_GENERAL, Precision

AttentionPrecision = Literal["float32", "int8", "clipped_int8"]


@dataclass(frozen=True)
class Primitives:
    """How a model computes its products, shifts and additions: the same for all its layers.

    Attributes:
      weight_bits: bits of a power-of-two weight.
      activations: number format of MatShift's activations, see `shiftaddvit_jax.ops.matshift`.
      threshold: at which queries and keys are binarized, see `shiftaddvit_jax.ops.binarize`.
      implementation: see `shiftaddvit_jax.ops`.
      dtype: dtype of the computation, float32 by default. In bfloat16, parameters, LayerNorms' means and
        variances, softmaxes, routers, and sums over tokens and images are float32 still.
      precision: number format of the factors in dense layers and convolutions over patches.
      remat: whether training keeps a block's input alone and computes the rest again for its gradients,
        which takes less memory and more time. Gradients and variables are the same.
      attention_precision: number format of the probabilities and values that attention ``"binary_softmax"``
        multiplies, see `shiftaddvit_jax.nn.attention.weigh_values`.
    """

    weight_bits: int = 5
    activations: Activations = "float"
    threshold: Threshold = "sample"
    implementation: Implementation = None
    dtype: Any = None
    precision: Precision = "float32"
    remat: bool = False
    attention_precision: AttentionPrecision = "float32"

    @property
    def dot_general(self) -> Callable:
        """The ``dot_general`` of dense layers."""
        return DOT_GENERAL[self.precision]

    @property
    def conv_general_dilated(self) -> Callable:
        """The ``conv_general_dilated`` of convolutions over patches."""
        return CONV_GENERAL_DILATED[self.precision]

    def on_xla(self) -> "Primitives":
        """The same settings, with XLA computing everything."""
        return dataclasses.replace(self, implementation="xla")

    def implementation_of_ops(self, train: bool) -> Implementation:
        """``implementation``; in training, XLA instead of None, since kernels are for inference."""
        return "xla" if train and self.implementation is None else self.implementation
