"""Kernels whose Gram matrices on low-discrepancy points are solved in O(n log n).

On a lattice a shift-invariant (SI) kernel's Gram matrix is diagonal in the Fourier basis, on a digital net a
digitally shift-invariant (DSI) kernel's in the Walsh basis. Both are products over dimensions,
``scale * prod(1 + weights * K(x, z))``, with K of smoothness 1 to 4. Numbers are float32, or float64 under
JAX_ENABLE_X64. J. Dick, "Walsh spaces containing smooth functions and quasi-Monte Carlo rules of arbitrary
high order", SIAM J. Numer. Anal. 46 (2008); A. G. Sorokin, "QMCPy", arXiv 2502.14256.
"""

import math

import jax
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Complex, Float, UInt32

from shiftaddvit_jax.ops import hadamard
from shiftaddvit_jax.qmc.points import BITS, DigitalNet, Lattice


def fftbr(x: Float[Array, "*batch n"] | Complex[Array, "*batch n"]) -> Complex[Array, "*batch n"]:
    """The orthonormal Fourier transform along the last axis, of values in bit-reversed order.

    Raises:
      ValueError: if n is no power of two.
    """
    return jnp.fft.fft(_reverse_bits(x), norm="ortho")


def ifftbr(x: Complex[Array, "*batch n"]) -> Complex[Array, "*batch n"]:
    """The inverse of `fftbr`: values in bit-reversed order, from their Fourier transform.

    Raises:
      ValueError: if n is no power of two.
    """
    return _reverse_bits(jnp.fft.ifft(x, norm="ortho"))


def shift_invariant_kernel(
    x: UInt32[Array, "*batch dimensions"],
    z: UInt32[Array, "*other dimensions"],
    smoothness: int,
    weights: Float[Array, "dimensions"] | float = 1.0,
    scale: Float[Array, ""] | float = 1.0,
) -> Float[Array, "..."]:
    """The SI kernel of points, by Bernoulli polynomials of ``x - z`` modulo 1; its functions are periodic.

    Args:
      x: points times ``2 ** 32``, as ``integers`` and `from_unit` give them.
      z: others, of a shape that broadcasts with it.
      smoothness: 1 to 4, of square integrable derivatives.
      weights: how much each dimension matters, positive.
      scale: the kernel's mean, positive.

    Raises:
      ValueError: for another smoothness.
    """
    _check_smoothness(smoothness)
    difference = x - z
    distance = jnp.minimum(difference, -difference).astype(float) * 2.0**-BITS  # K is even: the shorter way
    t = distance * (1 - distance)
    # The Bernoulli polynomials of degree 2, 4, 6 and 8 in t = x (1 - x), where nothing cancels.
    bernoulli = (
        1 / 6 - t,
        t**2 - 1 / 30,
        1 / 42 - t**2 * (t + 1 / 2),
        t**2 * (t**2 + 4 / 3 * t + 2 / 3) - 1 / 30,
    )[smoothness - 1]
    factor = (-1) ** (smoothness + 1) * (2 * math.pi) ** (2 * smoothness) / math.factorial(2 * smoothness)
    return _over_dimensions(factor * bernoulli, weights, scale)


def digitally_shift_invariant_kernel(
    x: UInt32[Array, "*batch dimensions"],
    z: UInt32[Array, "*other dimensions"],
    smoothness: int,
    weights: Float[Array, "dimensions"] | float = 1.0,
    scale: Float[Array, ""] | float = 1.0,
) -> Float[Array, "..."]:
    """The DSI kernel of points, by Walsh functions of ``x XOR z``; its functions need not be periodic.

    Args:
      x: points times ``2 ** 32``, as ``integers`` and `from_unit` give them.
      z: others, of a shape that broadcasts with it.
      smoothness: 1 to 4; of 1, functions that jump.
      weights: how much each dimension matters, positive.
      scale: the kernel's mean, positive.

    Raises:
      ValueError: for another smoothness.
    """
    _check_smoothness(smoothness)
    digits = x ^ z
    u = digits.astype(float) * 2.0**-BITS
    leading = jax.lax.clz(digits).astype(float) + 1  # the place of the first digit that differs

    def tail(n):  # 1 - 2 ** (-n * leading), and 1 where no digit differs
        return 1 - jnp.where(digits == 0, 0.0, jnp.exp2(-n * leading))

    beta = jnp.where(digits == 0, 0.0, leading)
    # Sums over k > 0 of wal_k(u) 2 ** -mu(k), mu(k) the sum of the highest places of k's ones, ``smoothness``
    # of them; of smoothness 1, for which that sum has no limit at 0, mu(k) is twice the highest place less 1.
    if smoothness == 1:
        sums = 1 - 3 * (1 - tail(1))
    elif smoothness == 2:
        sums = -beta * u + 5 / 2 * tail(1) - 1
    elif smoothness == 3:
        sums = beta * u**2 - 5 * tail(1) * u + 43 / 18 * tail(2) - 1
    else:
        places = jnp.arange(BITS, dtype=jnp.uint32)
        signs = 1 - 2 * ((digits[..., None] >> places[::-1]) & 1).astype(float)
        single = jnp.sum(signs * 8.0 ** -places.astype(float), axis=-1)
        sums = (
            -2 / 3 * beta * u**3
            + 5 * tail(1) * u**2
            - 43 / 9 * tail(2) * u
            + 701 / 294 * tail(3)
            + beta * (single / 48 - 1 / 42)
            - 1
        )
    return _over_dimensions(sums, weights, scale)


@struct.dataclass
class Gram:
    """A kernel's Gram matrix plus noise on the first n points of a sequence, known by its eigenvalues.

    Attributes:
      eigenvalues: in the order of the basis.
      digital: whether the basis is that of Walsh; otherwise that of Fourier.
    """

    eigenvalues: Float[Array, "n"]
    digital: bool = struct.field(pytree_node=False)

    def product(self, y: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """The matrix times ``y``, in O(n log n)."""
        return self._in_basis(lambda y: y * self.eigenvalues, y)

    def solve(self, y: Float[Array, "*batch n"]) -> Float[Array, "*batch n"]:
        """The inverse of the matrix times ``y``, in O(n log n)."""
        return self._in_basis(lambda y: y / self.eigenvalues, y)

    def log_likelihood(self, y: Float[Array, "*batch n"]) -> Float[Array, "*batch"]:
        """The logarithm of the density of ``y`` under a Gaussian process of mean 0 with this covariance.

        It has gradients to the kernel's weights, scale and noise; it is NaN where an eigenvalue is negative.
        """
        squares = jnp.square(jnp.abs(_fwht(y) if self.digital else fftbr(y))) / self.eigenvalues
        return -0.5 * jnp.sum(squares + jnp.log(2 * math.pi * self.eigenvalues), axis=-1)

    def _in_basis(self, change, y):
        return _fwht(change(_fwht(y))) if self.digital else ifftbr(change(fftbr(y))).real


def gram(
    sequence: DigitalNet | Lattice,
    count: int,
    smoothness: int,
    weights: Float[Array, "dimensions"] | float = 1.0,
    scale: Float[Array, ""] | float = 1.0,
    *,
    noise: Float[Array, ""] | float,
) -> Gram:
    """The Gram matrix on a sequence's first points in natural order, from one of its columns.

    Args:
      sequence: a digital net, for the DSI kernel, or a lattice, for the SI kernel, randomized or not.
      count: of points, a power of two.
      smoothness: 1 to 4.
      weights: how much each dimension matters, positive.
      scale: the kernel's mean, positive.
      noise: variance added to the diagonal. In float32 eigenvalues are known to about 1e-7 of the largest,
        which is about ``count * scale``: less noise than that gives wrong solutions without JAX_ENABLE_X64.

    Raises:
      ValueError: for a count that is no power of two, or another smoothness.
      TypeError: for a sequence without such a kernel.
    """
    if not isinstance(sequence, (DigitalNet, Lattice)):
        raise TypeError(
            f"no kernel is fast on {type(sequence).__name__} points; take qmc.sobol or qmc.lattice"
        )
    check_power_of_two(count)
    digital = isinstance(sequence, DigitalNet)
    kernel = digitally_shift_invariant_kernel if digital else shift_invariant_kernel
    points = sequence.integers(count)
    column = kernel(points, points[0], smoothness, weights, scale)
    transformed = _fwht(column) if digital else fftbr(column).real
    return Gram(math.sqrt(count) * transformed + noise, digital)


def check_power_of_two(count: int) -> None:
    """Raise a ``ValueError`` unless ``count`` is a power of two."""
    if count < 1 or count & (count - 1):
        below = 1 << max(count.bit_length() - 1, 0) if count > 0 else 1
        raise ValueError(
            f"the number of points must be a power of two, got {count}; take {below} or {2 * below}"
        )


def _check_smoothness(smoothness):
    if smoothness not in (1, 2, 3, 4):
        raise ValueError(f"smoothness must be 1, 2, 3 or 4, got {smoothness}")


def _over_dimensions(values, weights, scale):
    return scale * jnp.prod(1 + jnp.asarray(weights, values.dtype) * values, axis=-1)


def _reverse_bits(x):
    *batch, n = x.shape
    check_power_of_two(n)
    levels = n.bit_length() - 1
    split = x.reshape(*batch, *[2] * levels)
    return split.transpose(*range(len(batch)), *reversed(range(len(batch), split.ndim))).reshape(x.shape)


def _fwht(x):
    """The orthonormal Walsh-Hadamard transform along the last axis, a power of two."""
    check_power_of_two(x.shape[-1])
    return hadamard(x, "xla")  # in float64 too, of any number of points
