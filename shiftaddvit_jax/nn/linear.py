"""The three kinds of linear layer, chosen by name."""

from typing import get_args

import flax.linen as nn

from shiftaddvit_jax.names import LINEAR_KINDS
from shiftaddvit_jax.nn.dense import Conv, Dense
from shiftaddvit_jax.nn.moe import MoEDense
from shiftaddvit_jax.nn.primitives import Primitives
from shiftaddvit_jax.nn.shift import ShiftDense
from shiftaddvit_jax.ops.precision import CONV_GENERAL_DILATED, DOT_GENERAL, Precision
from shiftaddvit_jax.validation import check_choice


def make_patch_conv(features: int, side: int, primitives: Primitives, *, name: str | None = None) -> Conv:
    """A convolution over patches of ``side`` x ``side`` that do not overlap."""
    return Conv(
        features,
        (side, side),
        (side, side),
        "VALID",
        dtype=primitives.dtype,
        conv_general_dilated=primitives.conv_general_dilated,
        name=name,
    )


def precision_of(module: nn.Module) -> Precision | None:
    """The number format of the factors of a dense layer or a convolution over patches; None for others."""
    product, products = None, DOT_GENERAL
    if isinstance(module, nn.Dense):
        product = module.dot_general
    elif isinstance(module, nn.Conv):
        product, products = module.conv_general_dilated, CONV_GENERAL_DILATED
    return next((precision for precision in get_args(Precision) if products[precision] is product), None)


def make_linear(kind: str, features: int, primitives: Primitives, *, name: str | None = None) -> nn.Module:
    """A linear layer of the kind ``"dense"``, ``"shift"`` or ``"moe"``, unless ``primitives`` choose another.

    All share one call, ``(x [*batch, inputs], train=False) -> [*batch, features]``. ``train`` adds noise to a
    mixture's router and changes nothing in the other kinds.

    Raises:
      ValueError: unknown kind.
    """
    check_choice("kind of linear layer", kind, LINEAR_KINDS)
    kind, primitives = primitives.of_layer(name or "", kind)
    if kind == "dense":
        return Dense(
            features,
            dtype=primitives.dtype,
            kernel_init=primitives.kernel_init,
            dot_general=primitives.dot_general,
            implementation=primitives.implementation,
            name=name,
        )
    settings = {
        "weight_bits": primitives.weight_bits,
        "weight_terms": primitives.weight_terms,
        "activations": primitives.activations,
        "implementation": primitives.implementation,
        "dtype": primitives.dtype,
        "kernel_init": primitives.kernel_init,
        "name": name,
    }
    if kind == "shift":
        return ShiftDense(features, **settings)
    return MoEDense(features, precision=primitives.precision, **settings)
