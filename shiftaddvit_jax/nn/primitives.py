"""The settings of a model's products, shifts and additions, in one place for all its layers."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from flax.linen import initializers

from shiftaddvit_jax.ops.activations import Activations
from shiftaddvit_jax.ops.binarize import Threshold
from shiftaddvit_jax.ops.implementation import Implementation
from shiftaddvit_jax.ops.precision import CONV_GENERAL_DILATED, DOT_GENERAL, Precision

AttentionPrecision = Literal["float32", "int8", "clipped_int8"]
PerformerFeatures = Literal["gaussian", "hadamard"]
Rotation = Literal["none", "hadamard", "hadamard_2x", "hadamard_4x"]

KERNEL_INIT = initializers.truncated_normal(0.02)  # of ViT and its descendants

# What one linear layer can be: its kind, and settings that are not the model's.
LAYER_CHOICES: dict[str, tuple[str, dict[str, Any]]] = {
    "dense": ("dense", {"precision": "float32"}),
    "dense_int8": ("dense", {"precision": "int8"}),
    "shift": ("shift", {"weight_terms": 1}),
    "shift_two_terms": ("shift", {"weight_terms": 2}),
    "moe": ("moe", {}),
}


@dataclass(frozen=True)
class Primitives:
    """How a model computes its products, shifts and additions: the same for all its layers.

    Attributes:
      weight_bits: bits of a power of two in a shift layer's weights.
      activations: number format of MatShift's activations, see `shiftaddvit_jax.ops.matshift`.
      threshold: at which queries and keys are binarized, see `shiftaddvit_jax.ops.binarize`.
      implementation: see `shiftaddvit_jax.ops`.
      dtype: dtype of the computation, float32 by default. In bfloat16, parameters, LayerNorms' means and
        variances, softmaxes, routers, and sums over tokens and images are float32 still.
      precision: number format of the factors in dense layers and convolutions over patches.
      remat: whether training keeps a block's input alone and computes the rest again for its gradients,
        which takes less memory and more time. Gradients and variables are the same.
      weight_terms: powers of two in a weight, see `shiftaddvit_jax.ops.shift_weight`.
      layers: what single linear layers are, by their path and instead of what the model's kinds say: pairs of
        a path and a choice, see `LAYER_CHOICES`.
      kernel_init: what linear layers' kernels are drawn by.
      attention_precision: number format of the probabilities and values that attention ``"binary_softmax"``
        multiplies, see `shiftaddvit_jax.nn.attention.weigh_values`.
      performer_features: random features that attention ``"performer"`` draws, see `create_model`.
      rotation: what queries and keys pass through before they are binarized, see `create_model`.
    """

    weight_bits: int = 5
    activations: Activations = "float"
    threshold: Threshold = "sample"
    implementation: Implementation = None
    dtype: Any = None
    precision: Precision = "float32"
    remat: bool = False
    weight_terms: int = 1
    layers: tuple[tuple[str, str], ...] = ()
    kernel_init: initializers.Initializer = KERNEL_INIT
    attention_precision: AttentionPrecision = "float32"
    performer_features: PerformerFeatures = "gaussian"
    rotation: Rotation = "none"

    @property
    def dot_general(self) -> Callable:
        """The ``dot_general`` of dense layers."""
        return DOT_GENERAL[self.precision]

    @property
    def conv_general_dilated(self) -> Callable:
        """The ``conv_general_dilated`` of convolutions over patches."""
        return CONV_GENERAL_DILATED[self.precision]

    def inside(self, module: str) -> "Primitives":
        """The same settings, for the layers inside a module: their paths begin there."""
        if not self.layers:
            return self
        prefix = f"{module}/"
        layers = tuple(
            (path.removeprefix(prefix), choice) for path, choice in self.layers if path.startswith(prefix)
        )
        return dataclasses.replace(self, layers=layers)

    def choosing(self, layers: Mapping[str, str]) -> "Primitives":
        """The same settings, with these choices for single layers and no others."""
        return dataclasses.replace(self, layers=tuple(sorted(layers.items())))

    def of_layer(self, path: str, kind: str) -> tuple[str, "Primitives"]:
        """The kind of the linear layer at ``path``, ``kind`` unless chosen otherwise, and its settings."""
        choice = dict(self.layers).get(path)
        if choice is None:
            return kind, self
        kind, changes = LAYER_CHOICES[choice]
        return kind, dataclasses.replace(self, **changes)

    def on_xla(self) -> "Primitives":
        """The same settings, with XLA computing everything."""
        return dataclasses.replace(self, implementation="xla")

    def implementation_of_ops(self, train: bool) -> Implementation:
        """``implementation``; in training, XLA instead of None, since kernels are for inference."""
        return "xla" if train and self.implementation is None else self.implementation
