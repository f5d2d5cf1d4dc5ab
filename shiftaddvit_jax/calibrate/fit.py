"""The algebra of one layer: its weights and bias from sums over the tokens of the calibration images."""

from collections.abc import Iterable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from shiftaddvit_jax.ops import power_of_two
from shiftaddvit_jax.ops.power_of_two import round_at, two_power_exponent

DAMPING = 0.01  # added to a Hessian's diagonal, as a share of its mean; GPTQ's authors take the same
LAZY = 128  # inputs of a layer that are rounded before all later ones learn of the errors
# `power_of_two` rounds up from sqrt(2) * 2^exponent on; the upper power is nearer from 1.5 * 2^exponent on.
TO_NEARER = 2**0.5 / 1.5

Matrix = Float[Array | np.ndarray, "inputs outputs"]
Vector = Float[Array | np.ndarray, "outputs"]
Layer = dict[str, Float[Array | np.ndarray, "..."]]


class Moments(NamedTuple):
    """Of one layer, sums over all tokens of all calibration images.

    Attributes:
      count: the tokens.
      inputs: sum of what goes in.
      outputs: sum of what should come out.
      squares: sum of inputs times inputs.
      products: sum of inputs times outputs.
      powers: sum of each squared output.
    """

    count: Float[Array | np.ndarray, ""]
    inputs: Float[Array | np.ndarray, "inputs"]
    outputs: Vector
    squares: Float[Array | np.ndarray, "inputs inputs"]
    products: Matrix
    powers: Vector

    def centred(self) -> tuple[Float[Array | np.ndarray, "inputs inputs"], Matrix, Vector]:
        """``squares``, ``products`` and ``powers`` of inputs and outputs less their means."""
        squares = self.squares - np.outer(self.inputs, self.inputs) / self.count
        products = self.products - np.outer(self.inputs, self.outputs) / self.count
        return squares, products, self.powers - np.square(self.outputs) / self.count

    def bias(self, kernel: Matrix) -> Vector:
        """The bias with which the mean output of a layer with ``kernel`` is what it should be."""
        return (self.outputs - self.inputs @ kernel) / self.count

    def noise(self, kernel: Matrix, bias: Vector) -> Vector:
        """The mean square of what is missing from each output of a layer."""
        squares, products, powers = self.centred()
        noise = powers + np.sum(kernel * (squares @ kernel - 2 * products), axis=0)
        return noise / self.count + np.square(self.bias(kernel) - bias)

    def signal_to_noise(self, kernel: Matrix, bias: Vector) -> float:
        """Variance of what should come out over the mean square of what is missing, in decibels."""
        signal = np.sum(self.centred()[2]) / self.count
        return decibels(float(signal), float(np.sum(self.noise(kernel, bias))))


def decibels(signal: float, noise: float) -> float:
    """The ratio of two powers."""
    return float(10 * np.log10(signal / noise)) if noise > 0 else float("inf")


def add_moments(
    pairs: Iterable[tuple[Float[Array, "tokens inputs"], Float[Array, "tokens outputs"]]],
) -> Moments:
    """The moments, in float64, of pairs of inputs and outputs."""
    sums = None
    for inputs, outputs in pairs:
        found = [np.asarray(total, np.float64) for total in _moments(inputs, outputs)]
        sums = found if sums is None else [total + more for total, more in zip(sums, found, strict=True)]
    return Moments(*(sums or ()))


@jax.jit
def _moments(inputs, outputs):
    multiply = partial(jnp.matmul, precision="highest")
    return Moments(
        jnp.float32(len(inputs)),
        jnp.sum(inputs, axis=0),
        jnp.sum(outputs, axis=0),
        multiply(inputs.T, inputs),
        multiply(inputs.T, outputs),
        jnp.sum(jnp.square(outputs), axis=0),
    )


def fit_layer(
    moments: Moments,
    kernel: Float[Array | np.ndarray, "inputs outputs"],
    weight_bits: int = 5,
    weight_terms: int = 1,
) -> Layer:
    """The ``kernel`` of powers of two and the ``bias`` of a layer, float32, for the outputs it should have.

    What is rounded is the kernel of `fit_dense`.
    """
    wanted, hessian = _ridge(moments, kernel)
    rounded = compensated_rounding(wanted, hessian, weight_bits, weight_terms)
    return {"kernel": rounded, "bias": moments.bias(rounded).astype(np.float32)}


def fit_dense(moments: Moments, kernel: Float[Array | np.ndarray, "inputs outputs"]) -> Layer:
    """The ``kernel`` and the ``bias`` of a dense layer, float32, for the outputs it should have.

    It is the ridge regression of outputs on inputs that is drawn to the old ``kernel``, and is that kernel
    where inputs and outputs are the old layer's own.
    """
    wanted = _ridge(moments, kernel)[0].astype(np.float32)
    return {"kernel": wanted, "bias": moments.bias(wanted).astype(np.float32)}


def _ridge(moments, kernel):
    """The kernel that `fit_dense` fits, in float64, and the damped Hessian."""
    squares, products, _ = moments.centred()
    damping = DAMPING * np.mean(np.diag(squares)) or 1.0  # inputs that are constant tell nothing
    hessian = squares + damping * np.eye(len(squares))
    return np.linalg.solve(hessian, products + damping * np.asarray(kernel, np.float64)), hessian


def compensated_rounding(
    weight: Float[Array | np.ndarray, "inputs outputs"],
    hessian: Float[Array | np.ndarray, "inputs inputs"],
    weight_bits: int = 5,
    weight_terms: int = 1,
) -> Float[Array | np.ndarray, "inputs outputs"]:
    """``weight`` as powers of two Q, float32, with a small (weight - Q)^T hessian (weight - Q).

    GPTQ's order and algebra: the input with the largest entry on the diagonal of ``hessian`` first, and the
    Cholesky factor of the inverse for what each error adds to later inputs, in float64; the rounding itself
    is in float32. A weight goes to the nearest power, not to the nearest logarithm as in `power_of_two`; with
    two terms, to the nearest of two powers at the scale of its output's largest ``weight``.

    Raises:
      numpy.linalg.LinAlgError: a ``hessian`` that is not positive definite.
    """
    order = np.argsort(-np.diag(hessian), kind="stable")
    inverse = np.linalg.inv(np.asarray(hessian, np.float64)[np.ix_(order, order)])
    factor = np.linalg.cholesky((inverse + inverse.T) / 2).T
    weight, factor = (np.asarray(given, np.float32) for given in (weight[order], factor))
    rounded = np.empty(weight.shape, np.float32)
    exponent = two_power_exponent(weight, weight_bits, np) if weight_terms == 2 else None
    rounded[order] = _round_in_turn(weight, factor, exponent, weight_bits)
    return rounded


@partial(jax.jit, static_argnums=3)
def _round_in_turn(weight, factor, exponent, weight_bits):
    """``weight`` rounded row by row, with the upper ``factor`` of the Hessian's inverse.

    Two powers of two have the ``exponent`` of each output.
    """
    inputs, outputs = weight.shape
    size = min(LAZY, inputs)
    padding = -inputs % size
    weight = jnp.pad(weight, ((0, padding), (0, 0)))
    factor = jnp.pad(factor, (0, padding)) + jnp.diag(jnp.arange(inputs + padding) >= inputs)

    def nearest(row):
        if exponent is None:
            return power_of_two(row * TO_NEARER, weight_bits)
        return round_at(row, exponent, weight_bits)

    def round_block(block, weight):
        first = block * size
        rows = jax.lax.dynamic_slice_in_dim(factor, first, size)
        inside = jax.lax.dynamic_slice_in_dim(rows, first, size, axis=1)

        def round_row(row, state):
            block, errors = state
            rounded = nearest(block[row])
            error = (block[row] - rounded) / inside[row, row]
            block = (block - inside[row][:, None] * error).at[row].set(rounded)
            return block, errors.at[row].set(error)

        rounded = jax.lax.dynamic_slice_in_dim(weight, first, size)
        rounded, errors = jax.lax.fori_loop(0, size, round_row, (rounded, jnp.zeros((size, outputs))))
        weight -= jnp.matmul(rows.T, errors, precision="highest")
        return jax.lax.dynamic_update_slice_in_dim(weight, rounded, first, axis=0)

    return jax.lax.fori_loop(0, (inputs + padding) // size, round_block, weight)[:inputs]
