"""Weights of powers of two: one power (MatShift), or a sum or difference of two."""

from functools import partial
from types import ModuleType
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PRNGKeyArray

from shiftaddvit_jax.validation import check_choice

Rounding = Literal["deterministic", "stochastic"]

MOST_EXPONENTS = 7  # of the powers that a sum of two has: more would leave the range of int8

# The bits of a float32: exponents begin at bit 23, and the exponent 0 has the bits of 127.
FRACTION, BIAS = 23, 127
EXPONENT_BITS = np.uint32(0x7F800000)


def min_exponent(weight_bits: int) -> int:
    """The smallest exponent of a power-of-two weight: -(2^(weight_bits - 1) - 2), so -14 at 5 bits.

    A weight has 2^weight_bits - 1 values: 0, and either sign at each exponent from the smallest to 0.

    Raises:
      ValueError: ``weight_bits`` outside 2 to 8.
    """
    if not 2 <= weight_bits <= 8:
        raise ValueError(f"weight_bits must be between 2 and 8, got {weight_bits}")
    return -(2 ** (weight_bits - 1) - 2)


def power_of_two_codes(
    weight: Float[Array, "*shape"],
    weight_bits: int = 5,
    rounding: Rounding = "deterministic",
    key: PRNGKeyArray | None = None,
) -> tuple[Int[Array, "*shape"], Int[Array, "*shape"]]:
    """The sign (-1, 0, 1) and the exponent of the nearest power of two, both int8.

    Distance is measured on the logarithm, as in DeepShift: between 2^e and 2^(e+1) the border is
    2^(e + 1/2). Stochastic rounding takes the upper power with probability (abs(w) - 2^e) / 2^e, so that
    the expected weight is w itself wherever the range allows. Magnitudes outside the range take its
    nearest end. Zero and denormal numbers have sign 0 and exponent 0.

    Raises:
      ValueError: ``weight_bits`` outside 2 to 8, unknown rounding, stochastic rounding without a key.
    """
    low = min_exponent(weight_bits)
    check_choice("rounding", rounding, ("deterministic", "stochastic"))
    magnitude = jnp.abs(weight.astype(jnp.float32))
    # |w| = mantissa * 2^exponent with mantissa in [1/2, 1): no logarithm, so no error near a border.
    mantissa, exponent = jnp.frexp(magnitude)
    if rounding == "deterministic":
        up = mantissa >= np.float32(np.sqrt(0.5))
    else:
        if key is None:
            raise ValueError("stochastic rounding needs a random key: pass key=jax.random.key(...)")
        up = jax.random.uniform(key, weight.shape, jnp.float32) < 2 * mantissa - 1
    exponent = jnp.clip(exponent - jnp.where(up, 0, 1), low, 0)
    # XLA reads denormals as 0 on CPU but not everywhere; here they are 0 wherever this runs.
    sign = jnp.where(magnitude < jnp.finfo(jnp.float32).tiny, 0, jnp.sign(weight)).astype(jnp.int8)
    return sign, jnp.where(sign == 0, 0, exponent).astype(jnp.int8)


def power_of_two(
    weight: Float[Array, "*shape"],
    weight_bits: int = 5,
    rounding: Rounding = "deterministic",
    key: PRNGKeyArray | None = None,
) -> Float[Array, "*shape"]:
    """``weight`` rounded to sign * 2^exponent (see `power_of_two_codes`), in its own dtype.

    The gradient is straight-through: the rounded weight's gradient, unchanged (DeepShift-Q). Rounding twice
    is rounding once. NaN stays NaN.

    Raises:
      ValueError: as `power_of_two_codes`.
    """
    return _power_of_two(weight, key, weight_bits, rounding)


@partial(jax.custom_jvp, nondiff_argnums=(2, 3))
@partial(jax.jit, static_argnums=(2, 3))
def _power_of_two(weight, key, weight_bits, rounding):
    if rounding == "deterministic":
        return _nearest_power(weight, min_exponent(weight_bits))
    sign, exponent = power_of_two_codes(weight, weight_bits, rounding, key)
    rounded = sign.astype(jnp.float32) * exact_power(exponent)
    return jnp.where(jnp.isnan(weight), weight, rounded).astype(weight.dtype)


def _nearest_power(weight, low):
    """`power_of_two_codes` as a number: a tenth of the time, since a training step rounds every weight."""
    magnitude = jnp.abs(weight.astype(jnp.float32))
    # What fractions from sqrt(2) on need to carry into the exponent.
    fraction = np.float32(np.sqrt(0.5)).view(np.uint32) % 2**FRACTION
    power = jnp.clip(_power_below(magnitude, 2**FRACTION - int(fraction)), 2.0**low, 1)
    # XLA reads denormals as 0 on CPU but not everywhere; here they are 0 wherever this runs.
    rounded = jnp.where(magnitude < jnp.finfo(jnp.float32).tiny, 0, jnp.sign(weight) * power)
    return jnp.where(jnp.isnan(weight), weight, rounded).astype(weight.dtype)


def exact_power(
    exponent: Int[Array | np.ndarray, "*shape"], xp: ModuleType = jnp
) -> Float[Array | np.ndarray, "*shape"]:
    """2^exponent, float32, from its bits; exponents lie between -126 and 127."""
    bits = (exponent.astype(xp.int32) + BIAS) << FRACTION
    return bits.view(np.float32) if xp is np else jax.lax.bitcast_convert_type(bits, jnp.float32)


def _power_below(x, carry=0):
    """The largest power of two up to ``x``, which is not negative; up to 2 ``x`` where ``carry`` adds a bit.

    ``carry`` is added to the bits of the fraction.
    """
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + np.uint32(carry)
    return jax.lax.bitcast_convert_type(bits & EXPONENT_BITS, jnp.float32)


@_power_of_two.defjvp
def _power_of_two_jvp(weight_bits, rounding, arguments, tangents):
    return _power_of_two(*arguments, weight_bits, rounding), tangents[0]


def power_of_two_weight(
    sign: Float[Array, "*shape"] | Int[Array, "*shape"],
    exponent: Float[Array, "*shape"] | Int[Array, "*shape"],
    weight_bits: int = 5,
) -> Float[Array, "*shape"]:
    """The weight sign * 2^exponent of two trainable arrays (DeepShift-PS), float32 for integer codes.

    Both are rounded first, the exponent clipped to the range of ``weight_bits``. The gradients are the
    authors': g * w * ln 2 for the exponent and g itself for the sign, through rounding and clipping.
    """
    dtype = sign.dtype if jnp.issubdtype(sign.dtype, jnp.floating) else jnp.float32
    return _power_of_two_weight(sign.astype(dtype), exponent.astype(dtype), min_exponent(weight_bits))


@partial(jax.custom_jvp, nondiff_argnums=(2,))
def _power_of_two_weight(sign, exponent, low):
    rounded = jnp.round(jnp.clip(exponent, low, 0)).astype(jnp.int32)
    return jnp.ldexp(jnp.sign(jnp.round(sign)), rounded).astype(sign.dtype)


@_power_of_two_weight.defjvp
def _power_of_two_weight_jvp(low, arguments, tangents):
    weight, (sign, exponent) = _power_of_two_weight(*arguments, low), tangents
    return weight, sign + (exponent * weight * float(np.log(2))).astype(weight.dtype)


def two_power_numbers(weight_bits: int = 4) -> Float[np.ndarray, "numbers"]:
    """The magnitudes 2^a, 2^a + 2^b and 2^a - 2^b, and 0, in rising order, with exponents from 0 on.

    A power has ``weight_bits``, which give 2^(weight_bits - 1) - 1 exponents; from 4 bits on there are seven,
    so that all numbers, 96 at most, are int8 numbers: 39 magnitudes.

    Raises:
      ValueError: ``weight_bits`` outside 2 to 8.
    """
    powers = 2.0 ** np.arange(_largest_exponent(weight_bits) + 1)
    sums = np.concatenate([powers, np.ravel(powers[:, None] + powers), np.ravel(powers[:, None] - powers)])
    return np.unique(sums[(sums >= 0) & (sums <= 1.5 * powers[-1])]).astype(np.float32)


def _largest_exponent(weight_bits):
    return min(-min_exponent(weight_bits), MOST_EXPONENTS - 1)


def two_power_exponent(
    weight: Float[Array | np.ndarray, "inputs outputs"], weight_bits: int = 4, xp: ModuleType = jnp
) -> Int[Array | np.ndarray, "outputs"]:
    """The exponent of each output's scale, int32: the smallest at which its largest weight is not clipped.

    A weight is clipped from 1.625 times the largest power on, where 1.75 times it would be nearer than 1.5
    times it. An output of zeros has the exponent -64, the smallest that there is; 63 is the largest.
    """
    largest = xp.max(xp.abs(weight.astype(xp.float32)), axis=0)
    mantissa, exponent = xp.frexp(largest / xp.float32(1.625 * 2 ** _largest_exponent(weight_bits)))
    exponent = exponent.astype(xp.int32) - (mantissa == 0.5)
    return xp.clip(xp.where(largest == 0, -64, exponent), -64, 63)


def nearest_two_powers(x: Float[Array, "*shape"], weight_bits: int = 4) -> Float[Array, "*shape"]:
    """``x`` rounded to the nearest of `two_power_numbers` with its sign, a half to the larger one."""
    magnitude = jnp.minimum(jnp.abs(x.astype(jnp.float32)), two_power_numbers(weight_bits)[-1])
    half = 2 ** (FRACTION - 1)  # which 1.5 times a power carries
    # The power below, and what is left to the power above it: a second power is added to the one, or
    # subtracted from the other. It is at least 1, so that borders are multiples of 1/2; halves go up.
    below = _power_below(magnitude)
    rest = magnitude - below
    missing = below - rest
    added = jnp.where(rest < 0.5, 0, jnp.maximum(_power_below(rest, half), 1))
    lacking = jnp.where(missing <= 0.5, 0, jnp.maximum(_power_below(missing, half - 1), 1))
    rounded = jnp.where(rest <= missing, below + added, 2 * below - lacking)
    rounded = jnp.where(magnitude < 1, jnp.where(magnitude < 0.5, 0, 1), rounded)
    return jnp.where(jnp.isnan(x), x, jnp.sign(x) * rounded).astype(x.dtype)


def round_at(
    weight: Float[Array, "*inputs outputs"], exponent: Int[Array | np.ndarray, "outputs"], weight_bits: int
) -> Float[Array, "*inputs outputs"]:
    """``weight`` as `nearest_two_powers` times 2^exponent of each output, without a gradient of its own."""
    numbers = weight.astype(jnp.float32) * exact_power(-exponent)
    return (nearest_two_powers(numbers, weight_bits) * exact_power(exponent)).astype(weight.dtype)


def two_powers_of_two(
    weight: Float[Array, "inputs outputs"], weight_bits: int = 5
) -> Float[Array, "inputs outputs"]:
    """``weight`` rounded to sums and differences of two powers of two, times a power of two of each output.

    The largest weight of an output sets its scale (see `two_power_exponent`). Gaussian weights have a signal
    to noise of 28.4 dB after this, 13.8 dB after `power_of_two`. Rounding twice is rounding once; the
    gradient is straight-through; NaN stays NaN.

    Raises:
      ValueError: ``weight_bits`` outside 2 to 8.
    """
    return _two_powers_of_two(weight, weight_bits)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
@partial(jax.jit, static_argnums=1)
def _two_powers_of_two(weight, weight_bits):
    return round_at(weight, two_power_exponent(weight, weight_bits), weight_bits)


_two_powers_of_two.defjvp(
    lambda weight_bits, arguments, tangents: (_two_powers_of_two(*arguments, weight_bits), *tangents)
)


def shift_weight(
    kernel: Float[Array, "inputs outputs"], weight_bits: int = 5, weight_terms: int = 1
) -> Float[Array, "inputs outputs"]:
    """The weight of a shift layer with a dense ``kernel``: `power_of_two` or `two_powers_of_two`.

    Raises:
      ValueError: ``weight_terms`` other than 1 and 2, or ``weight_bits`` outside 2 to 8.
    """
    check_weight_terms(weight_terms)
    return (power_of_two if weight_terms == 1 else two_powers_of_two)(kernel, weight_bits)


def check_weight_terms(weight_terms: int) -> None:
    """Raise a ``ValueError`` for a number of powers of two in a weight other than 1 and 2."""
    if weight_terms not in (1, 2):
        raise ValueError(f"weight_terms must be 1 or 2, got {weight_terms!r}")


def _apot_terms(weight_bits: int) -> tuple[np.ndarray, np.ndarray]:
    if weight_bits not in (3, 5, 7):
        raise ValueError(f"additive powers of two need weight_bits 3, 5 or 7, got {weight_bits}")
    index = np.arange(2 ** ((weight_bits - 1) // 2) - 1)
    return (
        np.concatenate([[0.0], 2.0 ** (-2 * index)]),
        np.concatenate([[0.0], 2.0 ** (-2 * index - 1)]),
    )


def additive_power_of_two_levels(weight_bits: int = 5) -> Float[np.ndarray, "levels"]:
    """The magnitudes of APoT with two terms, (2^(2i) + 2^(2j - 1)) * 2/3 with i, j <= 0, in rising order.

    One bit is the sign, and half of the others choose each term; one value of each term is 0 (Li et al.,
    arXiv 1909.13144). The levels are scaled so that the largest is 1.

    Raises:
      ValueError: ``weight_bits`` other than 3, 5 or 7.
    """
    first, second = _apot_terms(weight_bits)
    return np.sort((first[:, None] + second[None, :]).ravel()).astype(np.float32) * np.float32(2 / 3)


def additive_power_of_two_codes(
    weight: Float[Array, "*shape"], weight_bits: int = 5
) -> tuple[Int[Array, "*shape"], ...]:
    """APoT codes ``(sign, sign_1, sign_2, exponent_1, exponent_2)``, all int8.

    The weight is sign * (sign_1 * 2^(2 exponent_1) + sign_2 * 2^(2 exponent_2 - 1)) * 2/3 with sign_1 and
    sign_2 in {0, 1}; an absent term has exponent 0.
    """
    first, second = _apot_terms(weight_bits)
    pairs = (first[:, None] + second[None, :]).ravel()
    order = np.argsort(pairs)
    nearest = _nearest_level(weight, weight_bits)
    term_1, term_2 = (jnp.asarray(order // len(second))[nearest], jnp.asarray(order % len(second))[nearest])
    sign = jnp.sign(weight)
    sign_1, sign_2 = ((term > 0) & (sign != 0) for term in (term_1, term_2))
    exponent_1, exponent_2 = (
        jnp.where(present, 1 - term, 0) for term, present in ((term_1, sign_1), (term_2, sign_2))
    )
    return tuple(code.astype(jnp.int8) for code in (sign, sign_1, sign_2, exponent_1, exponent_2))


def _nearest_level(weight, weight_bits):
    levels = additive_power_of_two_levels(weight_bits)
    borders = jnp.asarray((levels[1:] + levels[:-1]) / 2)
    return jnp.searchsorted(borders, jnp.abs(weight.astype(jnp.float32)))


def additive_power_of_two(weight: Float[Array, "*shape"], weight_bits: int = 5) -> Float[Array, "*shape"]:
    """``weight`` rounded to the nearest APoT level, clipped to [-1, 1]; straight-through gradient."""
    return _additive_power_of_two(weight, weight_bits)


@partial(jax.custom_jvp, nondiff_argnums=(1,))
def _additive_power_of_two(weight, weight_bits):
    levels = jnp.asarray(additive_power_of_two_levels(weight_bits))
    rounded = jnp.sign(weight) * levels[_nearest_level(weight, weight_bits)].astype(weight.dtype)
    return rounded.astype(weight.dtype)


_additive_power_of_two.defjvp(
    lambda weight_bits, arguments, tangents: (_additive_power_of_two(*arguments, weight_bits), *tangents)
)
