"""The LayerNorms of a model, and the one place that has their epsilons."""

import flax.linen as nn

from shiftaddvit_jax.nn.primitives import Primitives

# The original authors' in blocks and at the ends of stages and models.
EPSILON = 1e-6
# PyTorch's default, which the authors keep in patch embeddings and spatial reductions.
PATCH_EPSILON = 1e-5


def make_layer_norm(
    epsilon: float | None, primitives: Primitives, *, name: str | None = None, default: float = EPSILON
) -> nn.LayerNorm:
    """A LayerNorm over channels with ``epsilon``, or ``default`` for None."""
    return nn.LayerNorm(default if epsilon is None else epsilon, dtype=primitives.dtype, name=name)
