"""The three kinds of linear layer, chosen by name."""

import flax.linen as nn

from shiftaddvit_jax.names import LINEAR_KINDS
from shiftaddvit_jax.nn.dense import Conv, Dense
from shiftaddvit_jax.nn.moe import MoEDense
from shiftaddvit_jax.nn.primitives import Primitives
from shiftaddvit_jax.nn.shift import ShiftDense, kernel_init
from shiftaddvit_jax.ops.precision import CONV_GENERAL_DILATED, DOT_GENERAL
from shiftaddvit_jax.validation import check_choice


def make_patch_conv(features: int, side: int, primitives: Primitives, *, name: str) -> Conv:
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


def multiplies_in_bfloat16(module: nn.Module) -> bool:
    """Whether a module is a dense layer or a convolution whose factors are rounded to bfloat16."""
    return (isinstance(module, nn.Dense) and module.dot_general is DOT_GENERAL["bfloat16"]) or (
        isinstance(module, nn.Conv) and module.conv_general_dilated is CONV_GENERAL_DILATED["bfloat16"]
    )


def make_linear(kind: str, features: int, primitives: Primitives, *, name: str | None = None) -> nn.Module:
    """A linear layer of the kind ``"dense"``, ``"shift"`` or ``"moe"``.

    All share one call, ``(x [*batch, inputs], train=False) -> [*batch, features]``. ``train`` adds noise to a
    mixture's router and changes nothing in the other kinds.

    Raises:
      ValueError: unknown kind.
    """
    check_choice("kind of linear layer", kind, LINEAR_KINDS)
    if kind == "dense":
        return Dense(
            features,
            dtype=primitives.dtype,
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
        return ShiftDense(features, **settings)
    return MoEDense(features, precision=primitives.precision, **settings)
