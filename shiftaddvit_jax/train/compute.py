"""How a step computes a model: which changes memory and time, and not what the model is."""

import dataclasses
from typing import Literal

import flax.linen as nn
import jax.numpy as jnp

from shiftaddvit_jax.names import TRAINING_DTYPES
from shiftaddvit_jax.validation import check_choice


def compute_as(
    model: nn.Module, *, dtype: Literal["float32", "bfloat16"] | None = None, remat: bool = False
) -> nn.Module:
    """``model`` as training computes it, on the same variables; keep ``model`` itself for what is saved.

    Args:
      model: from `create_model` or `reparameterize`.
      dtype: of activations and of the factors of every product; by default the model's own. With
        ``"bfloat16"``, parameters, their gradients, LayerNorms' means and variances, softmaxes, routers and
        logits are float32 still, and products are summed in it.
      remat: whether each block keeps its input alone, and computes the rest again for its gradients. These
        and the random draws are those without. On CPUs it saves no memory: XLA computes again too early.

    Raises:
      ValueError: an unknown dtype.
    """
    primitives = dataclasses.replace(model.primitives, remat=remat)
    if dtype is not None:
        check_choice("dtype", dtype, TRAINING_DTYPES)
        primitives = dataclasses.replace(primitives, dtype=jnp.dtype(dtype))
    return model.clone(primitives=primitives)
