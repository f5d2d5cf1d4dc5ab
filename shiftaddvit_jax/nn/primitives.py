"""How a model computes its products, shifts and additions, said once for all of its layers."""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from shiftaddvit_jax.ops.activations import Activations
from shiftaddvit_jax.ops.binarize import Threshold
from shiftaddvit_jax.ops.implementation import Implementation
from shiftaddvit_jax.ops.precision import CONV_GENERAL_DILATED, DOT_GENERAL, Precision


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

    def on_xla(self) -> "Primitives":
        """The same numbers, all of them computed by XLA."""
        return dataclasses.replace(self, implementation="xla")

    def implementation_of_ops(self, train: bool) -> Implementation:
        """``implementation``, with XLA for None in training: kernels are for inference."""
        return "xla" if train and self.implementation is None else self.implementation
