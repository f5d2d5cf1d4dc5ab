"""From the logits of some configurations to the loss of all: what each choice adds to the logits.

Where layers change the logits little, their changes add up: the logits are those of the mean and a main
effect of each factor's level, which the Walsh transform of a design's runs gives. The loss of that sum is
taken to the second order around the mean; for a squared error this is exact. So it is a sum over factors and
pairs of them, each known from main effects of all logits, not from the runs' losses alone.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from shiftaddvit_jax.qmc.kernels import _fwht as walsh_transform
from shiftaddvit_jax.search.design import Design


class Effects(NamedTuple):
    """A loss as a sum: that of the mean logits, what each level adds, and what each two factors' levels add.

    Attributes:
      base: the loss of the mean logits.
      mains: by factor and level.
      pairs: by two factors and their levels, 0 unless the first comes before the second.
    """

    base: float
    mains: Float[np.ndarray, "factors choices"]
    pairs: Float[np.ndarray, "factors choices factors choices"]

    def predict(self, levels: Int[np.ndarray, "factors"]) -> float:
        """The loss of a configuration."""
        places = np.arange(len(self.mains))
        pairs = self.pairs[places[:, None], levels[:, None], places, levels]
        return float(self.base + self.mains[places, levels].sum() + pairs.sum())


def estimate_effects(
    design: Design,
    outputs: Float[np.ndarray, "runs batch classes"],
    loss: Callable[[Float[Array, "batch classes"]], Float[Array, ""]],
) -> Effects:
    """The effects of all factors on a loss, from the logits of a design's configurations.

    Args:
      design: from `make_design`.
      outputs: the logits of each configuration.
      loss: a smooth function of logits.
    """
    mean, changes = logit_effects(design, outputs)
    factors, choices = changes.shape[:2]
    slope = jax.grad(loss)

    @jax.jit
    def products(mean, changes):
        """What a change adds by the slope, and what two add by the curvature."""
        flat = changes.reshape(factors * choices, *changes.shape[2:])
        curved = jax.lax.map(lambda change: jax.jvp(slope, (mean,), (change,))[1], flat)
        by_slope = jnp.einsum("fbc,bc->f", flat, slope(mean))
        return by_slope, jnp.einsum("fbc,gbc->fg", flat, curved)

    by_slope, by_curvature = (np.asarray(part, np.float64) for part in products(mean, changes))
    mains = (by_slope + np.diag(by_curvature) / 2).reshape(factors, choices)
    pairs = by_curvature.reshape(factors, choices, factors, choices)
    earlier = np.triu(np.ones((factors, factors), bool), 1)
    return Effects(float(loss(mean)), mains, pairs * earlier[:, None, :, None])


def logit_effects(
    design: Design, outputs: Float[np.ndarray, "runs batch classes"]
) -> tuple[Float[Array, "batch classes"], Float[Array, "factors choices batch classes"]]:
    """The mean logits, and what each factor's level adds to them: entries of the runs' Walsh transform."""
    runs, *shape = outputs.shape
    transformed = walsh_transform(jnp.asarray(outputs).reshape(runs, -1).T).T / runs**0.5
    factors, bits = design.columns.shape
    changes: Any = 0.0
    for subset in range(1, 2**bits):  # the bits whose product is a contrast of the levels
        taken = [bit for bit in range(bits) if subset >> bit & 1]
        columns = np.bitwise_xor.reduce(design.columns[:, taken], axis=1)
        flips = np.bitwise_xor.reduce(design.flipped[:, taken], axis=1)
        ones = sum(np.arange(2**bits) >> (bits - 1 - bit) & 1 for bit in taken)
        signs = (1 - 2 * flips)[:, None] * (1 - 2 * (ones % 2))
        changes = changes + signs[..., None] * transformed[columns][:, None]
    return transformed[0].reshape(shape), changes.reshape(factors, 2**bits, *shape)
