"""From measured losses of some configurations to main effects and pairs, which predict those of all."""

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy.optimize
from jaxtyping import Array, Float, Int

from shiftaddvit_jax.qmc.kernels import Gram
from shiftaddvit_jax.qmc.kernels import _fwht as walsh_transform
from shiftaddvit_jax.search.design import Design

LEAST_NOISE = 1e-5  # of the measurements' variance: what float32 resolves


class Effects(NamedTuple):
    """A loss as a sum: the mean, what each factor's level adds, and what each two factors' levels add.

    Attributes:
      mean: over all configurations.
      mains: by factor and level.
      pairs: by two factors, the first before the second, and their levels; only those that are not 0.
    """

    mean: float
    mains: Float[np.ndarray, "factors choices"]
    pairs: dict[tuple[int, int], Float[np.ndarray, "choices choices"]]

    def predict(self, levels: Int[np.ndarray, "*batch factors"]) -> Float[np.ndarray, "*batch"]:
        """The losses of configurations."""
        total = self.mean + sum(main[levels[..., factor]] for factor, main in enumerate(self.mains))
        return total + sum(table[levels[..., i], levels[..., j]] for (i, j), table in self.pairs.items())


def estimate_effects(design: Design, losses: Float[np.ndarray, "runs"]) -> Effects:
    """The effects of all factors, from the losses of a design's configurations.

    Of two levels, they are entries of the losses' Walsh transform. Where pairs share an entry, it is shared out
    by the squared products of their main effects. Of four levels, they are the posterior mean of a Gaussian
    process, see `fit_process`.
    """
    return _contrasts(design, losses) if design.columns.shape[1] == 1 else fit_process(design, losses)


def _contrasts(design, losses):
    transformed = np.asarray(walsh_transform(jnp.asarray(losses))) / len(losses) ** 0.5
    columns, signs = design.columns[:, 0], 1 - 2 * design.flipped[:, 0]
    mains = transformed[columns] * signs  # of level 0, and less of level 1
    sharing: dict[int, list[tuple[int, int]]] = {}
    for i, j in itertools.combinations(range(len(columns)), 2):
        sharing.setdefault(int(columns[i] ^ columns[j]), []).append((i, j))
    pairs = {}
    for column, members in sharing.items():
        weights = np.square([mains[i] * mains[j] for i, j in members])
        for (i, j), weight in zip(members, weights, strict=True):
            if weight > 0:
                pairs[i, j] = transformed[column] * signs[i] * signs[j] * weight / weights.sum() * _SIGNS
    return Effects(float(transformed[0]), mains[:, None] * np.array([1.0, -1.0]), pairs)


_SIGNS = np.array([[1.0, -1.0], [-1.0, 1.0]])


def fit_process(design: Design, losses: Float[np.ndarray, "runs"]) -> Effects:
    """The effects in the posterior mean of a Gaussian process with a product kernel over the factors.

    Each factor's kernel is the digitally shift-invariant one of smoothness 1, averaged over the bits that its
    level leaves open, so that its mean over the levels is 0. On the net, the Gram matrix is diagonal in the Walsh
    basis. The factors' weights, the scale and the noise are those of the greatest likelihood.
    """
    table = jnp.asarray(level_kernel(design.columns.shape[1]))
    levels, factors = jnp.asarray(design.levels), design.levels.shape[1]
    mean, deviation = float(np.mean(losses)), float(np.std(losses))
    if deviation == 0:
        return Effects(mean, np.zeros((factors, len(table))), {})
    targets = jnp.asarray((losses - mean) / deviation, jnp.float32)

    def covariance(logs):
        weights, scale, noise = jnp.exp(logs[:factors]), jnp.exp(logs[-2]), jnp.exp(logs[-1]) + LEAST_NOISE
        column = scale * jnp.prod(1 + weights * table[levels ^ levels[0]], axis=-1)
        eigenvalues = jnp.maximum(walsh_transform(column) * len(column) ** 0.5, 0.0)
        return Gram(eigenvalues + noise, digital=True)

    @jax.jit
    def objective(logs):
        # A weak prior keeps what the losses say nothing of where it began.
        return -covariance(logs).log_likelihood(targets) + 0.5 * jnp.sum(jnp.square((logs - start) / 3.0))

    start = jnp.concatenate([jnp.full(factors, np.log(0.1)), jnp.asarray([0.0, np.log(1e-3)])])
    found = scipy.optimize.minimize(
        lambda logs: tuple(np.asarray(part, float) for part in jax.value_and_grad(objective)(logs)),
        np.asarray(start),
        jac=True,
        method="L-BFGS-B",
        bounds=[(-14.0, 6.0)] * len(start),
    )
    logs = jnp.asarray(found.x, jnp.float32)
    weights = np.exp(found.x[:factors])
    solved = np.asarray(covariance(logs).solve(targets), float) * np.exp(found.x[-2]) * deviation
    # near[run, factor, level]: the weighed kernel of a run's level and another.
    near = weights[:, None] * np.asarray(table)[np.arange(len(table)) ^ design.levels[..., None]]
    mains = np.einsum("r,rfl->fl", solved, near)
    pairs = {
        (i, j): np.einsum("r,rl,rk->lk", solved, near[:, i], near[:, j])
        for i, j in itertools.combinations(range(factors), 2)
    }
    return Effects(mean + float(solved.sum()), mains, pairs)


def level_kernel(bits: int) -> Float[np.ndarray, "choices"]:
    """The kernel of two levels by the XOR of their numbers: 1 - 3 * 2 ** -(place of the first bit that differs).

    It is the digitally shift-invariant kernel of smoothness 1, averaged over the bits after these.
    """
    places = np.array([bits + 1 - int(digits).bit_length() for digits in range(1, 2**bits)])
    others = 1 - 3 * 2.0**-places
    return np.array([-others.sum(), *others])
