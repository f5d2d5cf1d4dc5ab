"""Low-discrepancy points in the unit cube: digital nets in base 2, rank-1 lattices and Halton points.

A sequence is made by `sobol`, `lattice` or `halton`, randomized by its method ``randomize(key)`` and read by
``points(count, start)``. Points are 32-bit integers first, so that kernels compare them exactly. Sequences
are extensible: the points that there are stay when their number doubles.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, PRNGKeyArray, UInt32

from shiftaddvit_jax.qmc.tables import JOE_KUO, KUO_LATTICE
from shiftaddvit_jax.validation import check_choice

BITS = 32  # of a coordinate
MOST_DIMENSIONS = len(KUO_LATTICE)
NET_POINTS = 2**BITS
LATTICE_POINTS = 2**20  # what the generating vector was made for
HALTON_POINTS = 2**24  # the smallest power of two below what each base's digits can number
BELOW_ONE = 1 - 2.0**-24  # the largest float32 below 1


class DigitalNet(NamedTuple):
    """A digital sequence in base 2: points are XORs of a generating matrix's columns, then a digital shift.

    Attributes:
      matrices: a generating matrix for each dimension by its columns, whose first row is the highest bit.
      shift: what each coordinate's bits are XORed with.
    """

    matrices: UInt32[Array, "dimensions 32"]
    shift: UInt32[Array, "dimensions"]

    def randomize(self, key: PRNGKeyArray) -> "DigitalNet":
        """Another net of the same quality: linear matrix scrambling (LMS) and a digital shift.

        LMS multiplies each generating matrix from the left by a random lower triangular matrix with ones on
        its diagonal. J. Matousek, "On the L2-discrepancy for anchored boxes", J. Complexity 14 (1998).
        """
        scrambling, shift = jax.random.split(key)
        diagonal = jnp.uint32(1) << jnp.arange(BITS - 1, -1, -1, dtype=jnp.uint32)
        below = jax.random.bits(scrambling, self.matrices.shape, jnp.uint32) & (diagonal - 1)
        rows = _bits(self.matrices)[..., ::-1]  # [dimensions, column, row], the highest bit first
        return self._replace(
            matrices=_product(rows, (diagonal | below)[:, None, :]),
            shift=jax.random.bits(shift, self.shift.shape, jnp.uint32),
        )

    @functools.partial(jax.jit, static_argnames=("count", "start", "order"))
    def integers(
        self, count: int, start: int = 0, order: str = "natural"
    ) -> UInt32[Array, "{count} dimensions"]:
        """Points ``start`` and after, times ``2 ** 32``.

        Args:
          count: how many. Each block of ``2 ** m`` that begins at a multiple of it is a net.
          start: index of the first of them.
          order: "natural", or "gray" for that of the Gray code: the same blocks, another order within them.

        Raises:
          ValueError: for points after the first ``2 ** 32``, or another order.
        """
        check_choice("order of a digital net", order, ("natural", "gray"))
        index = _indices(count, start, NET_POINTS, "a digital net")
        if order == "gray":
            index = index ^ (index >> 1)
        return _product(_bits(index)[:, None, :], self.matrices) ^ self.shift

    def points(
        self, count: int, start: int = 0, order: str = "natural"
    ) -> Float32[Array, "{count} dimensions"]:
        """Points in ``[0, 1)``: the first 24 bits of `integers`, so that each keeps its interval."""
        return to_unit(self.integers(count, start, order))


class Lattice(NamedTuple):
    """A rank-1 lattice sequence in van der Corput's order, shifted modulo 1.

    Attributes:
      vector: the generating vector.
      shift: what is added to each coordinate, times ``2 ** 32``.
    """

    vector: UInt32[Array, "dimensions"]
    shift: UInt32[Array, "dimensions"]

    def randomize(self, key: PRNGKeyArray) -> "Lattice":
        """The lattice under a random shift."""
        return self._replace(shift=jax.random.bits(key, self.shift.shape, jnp.uint32))

    @functools.partial(jax.jit, static_argnames=("count", "start"))
    def integers(self, count: int, start: int = 0) -> UInt32[Array, "{count} dimensions"]:
        """Points ``start`` and after, times ``2 ** 32``; the first ``2 ** m`` are a lattice.

        Raises:
          ValueError: for points after the first ``2 ** 20``, for which the generating vector was made.
        """
        index = _indices(count, start, LATTICE_POINTS, "a lattice")
        # Point i is vector * radical_inverse(i) modulo 1: modulo 2 ** 32, the product of integers is exact.
        reversed_powers = jnp.uint32(1) << jnp.arange(BITS - 1, -1, -1, dtype=jnp.uint32)
        return _product(_bits(index), reversed_powers)[:, None] * self.vector + self.shift

    def points(self, count: int, start: int = 0) -> Float32[Array, "{count} dimensions"]:
        """Points in ``[0, 1)``: the first 24 bits of `integers`."""
        return to_unit(self.integers(count, start))


class Halton(NamedTuple):
    """The Halton sequence, dimension j in the base of the j-th prime, for any number of points.

    Attributes:
      permutations: what each digit is replaced by, for each dimension and place; unused places and digits at
        the ends keep the array square.
    """

    permutations: UInt32[Array, "dimensions places base"]

    def randomize(self, key: PRNGKeyArray) -> "Halton":
        """The sequence with a random permutation of the digits at each place.

        A. B. Owen, "A randomized Halton algorithm in R", arXiv 1706.02808.
        """
        dimensions, _, most = self.permutations.shape
        bases, _ = _bases(dimensions)
        draws = jax.random.uniform(key, self.permutations.shape)
        # What is no digit of its base sorts behind all that are.
        return Halton(
            jnp.argsort(jnp.where(np.arange(most) < bases[:, None, None], draws, 2.0), axis=-1).astype(
                jnp.uint32
            )
        )

    @functools.partial(jax.jit, static_argnames=("count", "start"))
    def integers(self, count: int, start: int = 0) -> UInt32[Array, "{count} dimensions"]:
        """Points ``start`` and after, times `denominators`.

        Raises:
          ValueError: for points after the first ``2 ** 24``.
        """
        index = _indices(count, start, HALTON_POINTS, "a Halton sequence")
        bases, places = _bases(self.permutations.shape[0])
        coordinates = []
        for base, used, permutations in zip(bases.tolist(), places.tolist(), self.permutations, strict=True):
            value, left = jnp.zeros_like(index), index
            for place in range(used):  # the last digit first: the radical inverse
                value = value * base + permutations[place][left % base]
                left = left // base
            coordinates.append(value)
        return jnp.stack(coordinates, axis=-1)

    @property
    def denominators(self) -> np.ndarray:
        """What `integers` are divided by, uint32 [dimensions]: powers of the bases, below ``2 ** 32``."""
        bases, places = _bases(self.permutations.shape[0])
        return bases.astype(np.uint32) ** places.astype(np.uint32)

    def points(self, count: int, start: int = 0) -> Float32[Array, "{count} dimensions"]:
        """Points in ``[0, 1)``, the nearest numbers below 1 to `integers` over `denominators`."""
        fractions = self.integers(count, start).astype(jnp.float32) / self.denominators.astype(np.float32)
        return jnp.minimum(fractions, jnp.float32(BELOW_ONE))


def sobol(dimensions: int) -> DigitalNet:
    """Sobol' points with the direction numbers of Joe and Kuo (2008), the first of them the origin.

    Raises:
      ValueError: outside 1 to 64 dimensions.
    """
    _check_dimensions(dimensions, "DigitalNetB2")
    matrices = _sobol_matrices()[:dimensions]
    return DigitalNet(jnp.asarray(matrices), jnp.zeros(dimensions, jnp.uint32))


def lattice(dimensions: int) -> Lattice:
    """The lattice sequence of Cools, Kuo and Nuyens (2006), the first of its points the origin.

    Raises:
      ValueError: outside 1 to 64 dimensions.
    """
    _check_dimensions(dimensions, "Lattice")
    return Lattice(jnp.asarray(KUO_LATTICE[:dimensions], jnp.uint32), jnp.zeros(dimensions, jnp.uint32))


def halton(dimensions: int) -> Halton:
    """Halton points, the first of them the origin.

    Raises:
      ValueError: outside 1 to 64 dimensions.
    """
    _check_dimensions(dimensions, "Halton")
    bases, places = _bases(dimensions)
    digits = jnp.arange(bases.max(), dtype=jnp.uint32)
    return Halton(jnp.tile(digits, (dimensions, places.max(), 1)))


def to_unit(integers: UInt32[Array, "*shape"]) -> Float32[Array, "*shape"]:
    """Numbers in ``[0, 1)`` by the first 24 of 32 bits, so that none is rounded to 1."""
    return (integers >> 8).astype(jnp.float32) * jnp.float32(2**-24)


def from_unit(points: Float32[Array, "*shape"]) -> UInt32[Array, "*shape"]:
    """Numbers in ``[0, 1)`` times ``2 ** 32``, without loss from 2 ** -9 on: what kernels take."""
    return (points * jnp.float32(2**32)).astype(jnp.uint32)


def _bits(integers):
    """The bits of integers along a new last axis, the lowest first."""
    return (integers[..., None] >> jnp.arange(BITS, dtype=jnp.uint32)) & 1


def _product(bits, columns):
    """Matrices times vectors over GF(2): the XOR of those columns, as integers, whose bit is 1."""
    return jnp.bitwise_xor.reduce(jnp.where(bits == 1, columns, jnp.uint32(0)), axis=-1)


def _indices(count, start, most, what):
    if count < 1 or start < 0 or start + count > most:
        raise ValueError(
            f"{what} has points 0 to {most - 1:,}, got {count:,} from {start:,} on; ask for some of them"
        )
    return jnp.uint32(start) + jnp.arange(count, dtype=jnp.uint32)


def _check_dimensions(dimensions, name):
    if not 1 <= dimensions <= MOST_DIMENSIONS:
        raise ValueError(
            f"points have 1 to {MOST_DIMENSIONS} dimensions, got {dimensions}; for more: qmcpy.{name}"
        )


@functools.cache
def _sobol_matrices():
    """Generating matrices by the recurrence of Bratley and Fox (1988), uint32 [64, 32]."""
    columns = np.zeros((MOST_DIMENSIONS, BITS), np.uint64)
    columns[0] = 1
    for row, (polynomial, initial) in zip(columns[1:], JOE_KUO, strict=True):
        degree = len(initial)
        row[:degree] = initial
        for j in range(degree, BITS):
            row[j] = row[j - degree]
            for k in range(1, degree + 1):
                if polynomial >> (degree - k) & 1:
                    row[j] ^= row[j - k] << np.uint64(k)
    # Column j is an odd number below 2 ** (j + 1), whose lowest bit is that of row j.
    return (columns << np.arange(BITS - 1, -1, -1, dtype=np.uint64)).astype(np.uint32)


@functools.cache
def _bases(dimensions):
    """The first primes, and how many digits of each make an integer below ``2 ** 32``."""
    primes = [2]
    while len(primes) < dimensions:
        primes.append(
            next(n for n in range(primes[-1] + 1, 2 * primes[-1] + 1) if all(n % prime for prime in primes))
        )
    places = [max(n for n in range(1, BITS) if prime**n < 2**BITS) for prime in primes]
    return np.asarray(primes), np.asarray(places)
