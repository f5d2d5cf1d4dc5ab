"""A Gaussian process on the evaluations already paid for: accuracy along each parameter, and what costs most.

It lives in the unit cube, where each parameter is what share of its distribution lies below it. Kernels are
products over dimensions, so that means over the other parameters are products of one-dimensional integrals.
"""

import math
from collections.abc import Callable
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct
from jaxtyping import Array, Float

from shiftaddvit_jax.qmc import (
    DigitalNet,
    Lattice,
    digitally_shift_invariant_kernel,
    gram,
    shift_invariant_kernel,
)
from shiftaddvit_jax.robustness.study import Robustness, as_scipy

DENSE, FAST = 2**10, 2**11  # points at most: of Matern's kernel, and of those on a net or a lattice
NODES = 128  # of integrals over one parameter
CURVE = 65  # positions along a parameter
SMOOTHNESS = 2
STEPS = 60  # of the optimizer
LEAST_DEVIATION = 1e-9  # of scores; below, nothing depends on any parameter


class Surrogate(NamedTuple):
    """What a Gaussian process says of one score.

    Attributes:
      kernel: "Matern", "DSI" (digitally shift-invariant, on a net) or "SI" (shift-invariant, on a lattice).
      evaluations: how many it was fitted to, the first ones.
      predicted: the share of the score's variance that it predicts at points left out one by one; NaN if the
        score never changes. What follows is worth no more than that.
      first_order: Sobol' indices: the share of the variance that each parameter causes by itself.
      total: the same, by itself and together with others.
      positions: values of each parameter.
      mean: the score's mean over all other parameters there.
      deviation: its standard deviation, given the evaluations.
    """

    kernel: str
    evaluations: int
    predicted: float
    first_order: Float[np.ndarray, "parameters"]
    total: Float[np.ndarray, "parameters"]
    positions: Float[np.ndarray, "parameters positions"]
    mean: Float[np.ndarray, "parameters positions"]
    deviation: Float[np.ndarray, "parameters positions"]


def fit_surrogate(found: Robustness, score: Float[np.ndarray, "evaluations"]) -> Surrogate:
    """A Gaussian process of a score of each evaluation, such as a model's accuracy.

    The kernel is SI on a lattice if a parameter turns all the way round or there are 2,048 points, DSI on a
    net from 2,048 points on, and otherwise Matern's of smoothness 5/2, on at most 1,024 points: what is left
    of other points after the first is drawn by the same distribution.

    Args:
      found: a study.
      score: a number for each of its evaluations.
    """
    distributions = [as_scipy(parameter.distribution) for parameter in found.design.parameters]
    units = np.linspace(0.5 / CURVE, 1 - 0.5 / CURVE, CURVE)
    positions = np.stack([each.ppf(units) for each in distributions])
    kernel = _kernel(found)
    count = min(len(score), DENSE if kernel == "Matern" else FAST)
    score = np.asarray(score[:count], np.float64)
    centre, deviation = score.mean(), score.std()
    if deviation < LEAST_DEVIATION:
        unknown = np.full(len(distributions), np.nan)
        flat = np.full_like(positions, centre)
        return Surrogate(kernel, count, math.nan, unknown, unknown, positions, flat, np.zeros_like(flat))
    with jax.enable_x64(True):
        nodes = (np.arange(NODES) + 0.5) / NODES
        if found.sequence is None or kernel == "Matern":
            columns = zip(distributions, found.values[:count].T, strict=True)
            points = np.stack([each.cdf(column) for each, column in columns], axis=-1)
            process = _Matern(jnp.asarray(points))
        else:
            process = _Invariant(found.sequence, count)
        curve = units / 2 if kernel == "SI" else units  # a lattice's axes are folded
        y = (score - centre) / deviation
        parts = _moments(process, _fit(process, y, len(distributions)), y, nodes, curve)
        predicted, first_order, total, mean, spread = jax.device_get(parts)
    return Surrogate(
        kernel,
        count,
        float(predicted),
        first_order,
        total,
        positions,
        centre + deviation * mean,
        deviation * spread,
    )


def _kernel(found):
    if isinstance(found.sequence, Lattice):
        periodic = any(parameter.is_periodic for parameter in found.design.parameters)
        return "SI" if periodic or len(found.values) >= FAST else "Matern"
    return "DSI" if isinstance(found.sequence, DigitalNet) and len(found.values) >= FAST else "Matern"


class _Solved(NamedTuple):
    """A process's matrix, known well enough to solve with it."""

    solve: Callable[[Array], Array]  # along the last axis
    log_determinant: Float[Array, ""]
    inverse_diagonal: Float[Array, "..."]


@struct.dataclass
class _Matern:
    """Matern's kernel of smoothness 5/2 in each dimension, by its lengths."""

    points: Float[Array, "count parameters"]
    bounds = (math.log(0.05), math.log(50.0))  # of a length's logarithm

    def along(self, dimension, positions, log_length):
        """The factor of one dimension between positions and points."""
        distance = (
            jnp.abs(positions[:, None] - self.points[:, dimension]) * math.sqrt(5) / jnp.exp(log_length)
        )
        return (1 + distance + distance**2 / 3) * jnp.exp(-distance)

    def over_all(self, dimension, positions, log_length):
        """The factor of one dimension between positions."""
        return _Matern(positions[:, None]).along(0, positions, log_length)

    def solved(self, log_lengths, noise):
        unit = jnp.eye(len(self.points))
        matrix = noise * unit + _product(
            self.along(dimension, self.points[:, dimension], log_length)
            for dimension, log_length in enumerate(log_lengths)
        )
        factor = jnp.linalg.cholesky(matrix)
        return _Solved(
            lambda y: jax.scipy.linalg.cho_solve((factor, True), y.T).T,
            2 * jnp.sum(jnp.log(jnp.diag(factor))),
            jnp.diag(jax.scipy.linalg.cho_solve((factor, True), unit)),
        )


@struct.dataclass
class _Invariant:
    """The kernel that is invariant to a sequence's shifts, by the weights of dimensions."""

    sequence: DigitalNet | Lattice
    count: int = struct.field(pytree_node=False)
    bounds = (math.log(1e-5), math.log(1e2))  # of a weight's logarithm

    def along(self, dimension, positions, log_weight):
        return self._factor(positions, self.sequence.integers(self.count)[:, dimension], log_weight)

    def over_all(self, dimension, positions, log_weight):
        return self._factor(positions, (positions * 2.0**32).astype(jnp.uint32), log_weight)

    def _factor(self, positions, others, log_weight):
        digital = isinstance(self.sequence, DigitalNet)
        kernel = digitally_shift_invariant_kernel if digital else shift_invariant_kernel
        integers = (positions * 2.0**32).astype(jnp.uint32)
        weights = jnp.exp(log_weight)[None]
        return kernel(integers[:, None, None], others[None, :, None], SMOOTHNESS, weights)

    def solved(self, log_weights, noise):
        matrix = gram(self.sequence, self.count, SMOOTHNESS, jnp.exp(log_weights), noise=noise)
        eigenvalues = matrix.eigenvalues
        return _Solved(matrix.solve, jnp.sum(jnp.log(eigenvalues)), jnp.mean(1 / eigenvalues))


def _product(factors):
    return reduce(jnp.multiply, factors, jnp.ones(()))


@jax.jit
@partial(jax.value_and_grad, argnums=1)
def _loss(process, theta, y):
    """The negative log-likelihood of ``y``, by point, with the best scale.

    ``theta`` has the logarithms of each dimension's length or weight, and of the noise relative to the scale.
    """
    solved = process.solved(theta[:-1], jnp.exp(theta[-1]))
    scale = y @ solved.solve(y) / len(y)
    return jnp.log(scale) / 2 + solved.log_determinant / (2 * len(y))


def _fit(process, y, dimensions):
    """The most likely ``theta`` of `_loss`."""
    from scipy.optimize import minimize

    def loss(theta):
        value, gradient = _loss(process, theta, y)
        return float(value), np.asarray(gradient)

    start = np.array([0.0] * dimensions + [math.log(1e-2)])
    bounds = [process.bounds] * dimensions + [(math.log(1e-5), 0.0)]
    return minimize(loss, start, jac=True, bounds=bounds, method="L-BFGS-B", options={"maxiter": STEPS}).x


@jax.jit
def _moments(process, theta, y, nodes, curve):
    """The share predicted, Sobol' indices, and mean and deviation along each parameter, of scores ``y``."""
    solved = process.solved(theta[:-1], jnp.exp(theta[-1]))
    weights = solved.solve(y)
    scale = y @ weights / len(y)
    left_out = weights / solved.inverse_diagonal
    predicted = 1 - jnp.sum(left_out**2) / jnp.sum(y**2)

    factors = [process.along(j, nodes, theta[j]) for j in range(len(theta) - 1)]  # [nodes, count] each
    means = [jnp.mean(factor, axis=0) for factor in factors]
    squares = [factor.T @ factor / len(nodes) for factor in factors]
    constants = [jnp.mean(process.over_all(j, nodes, theta[j])) for j in range(len(theta) - 1)]
    mean = _product(means) @ weights
    variance = weights @ _product(squares) @ weights - mean**2

    found = []
    for j, factor in enumerate(factors):
        others = [each for each in range(len(factors)) if each != j]
        integrated = _product(means[each] for each in others)
        alone = jnp.mean(jnp.square(factor @ (integrated * weights) - mean))
        without = _product(squares[each] for each in others) * jnp.outer(means[j], means[j])
        in_all = variance - (weights @ without @ weights - mean**2)
        cross = process.along(j, curve, theta[j]) * integrated
        prior = jnp.diag(process.over_all(j, curve, theta[j])) * _product(constants[each] for each in others)
        left = prior - jnp.sum(cross * solved.solve(cross), axis=-1)
        deviation = jnp.sqrt(scale * jnp.maximum(left, 0))
        found.append((alone / variance, in_all / variance, cross @ weights, deviation))
    return predicted, *(jnp.stack(each) for each in zip(*found, strict=True))
