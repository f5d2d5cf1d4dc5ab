import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from shiftaddvit_jax.ops import (
    additive_power_of_two,
    additive_power_of_two_codes,
    additive_power_of_two_levels,
    power_of_two,
    power_of_two_codes,
    power_of_two_weight,
    two_power_numbers,
    two_powers_of_two,
)
from shiftaddvit_jax.ops.power_of_two import nearest_two_powers

BITS = range(2, 9)
# Denormals have a test of their own: some devices read them as zero.
FINITE = st.floats(width=32, allow_nan=False, allow_infinity=False, allow_subnormal=False)
OCTAVES = st.builds(lambda n, e: n / 1024 * 2.0**e, st.integers(-1024, 1024), st.integers(-20, 4))
WEIGHTS = arrays(np.float32, 24, elements=FINITE | OCTAVES)
EXTREMES = np.array(
    [0, -0.0, 1.2e-38, -1.2e-38, 1e-7, 2**-14, 0.7, 0.71, -1, 1, 3e38, -3.4028235e38], np.float32
)

rounded = jax.jit(power_of_two, static_argnums=(1,))
coded = jax.jit(power_of_two_codes, static_argnums=(1,))
rounded_additively = jax.jit(additive_power_of_two, static_argnums=(1,))


def low(bits):
    return -(2 ** (bits - 1) - 2)


def reference(weight, bits):
    """Nearest on the logarithm, in float64."""
    weight = np.asarray(weight, np.float64)
    logarithm = np.log2(np.abs(np.where(weight == 0, 1, weight)))
    return np.sign(weight) * 2.0 ** np.clip(np.floor(logarithm + 0.5), low(bits), 0)


def away_from_borders(weight):
    logarithm = np.log2(np.abs(np.where(weight == 0, 1, weight).astype(np.float64)))
    return np.abs(logarithm - np.floor(logarithm) - 0.5) > 1e-6


@given(WEIGHTS, st.sampled_from(BITS))
def test_a_value_is_zero_or_a_signed_power_of_two_in_range(weight, bits):
    value = np.asarray(rounded(weight, bits))
    mantissa, exponent = np.frexp(np.abs(value))
    assert np.all((value == 0) | (mantissa == 0.5))
    assert np.all((value == 0) | ((exponent - 1 >= low(bits)) & (exponent - 1 <= 0)))


@given(WEIGHTS, st.sampled_from(BITS))
def test_a_value_is_the_nearest_on_the_logarithm_in_float64(weight, bits):
    clear = away_from_borders(weight)
    np.testing.assert_array_equal(np.asarray(rounded(weight, bits))[clear], reference(weight, bits)[clear])


@given(WEIGHTS, st.sampled_from(BITS))
def test_rounding_twice_is_rounding_once(weight, bits):
    once = rounded(weight, bits)
    np.testing.assert_array_equal(rounded(once, bits), once)


@given(WEIGHTS, st.sampled_from(BITS))
def test_the_sign_is_kept_and_only_zero_becomes_zero(weight, bits):
    np.testing.assert_array_equal(np.sign(rounded(weight, bits)), np.sign(weight))


@given(WEIGHTS, st.sampled_from(BITS))
def test_codes_stand_for_the_value(weight, bits):
    sign, exponent = (np.asarray(code) for code in coded(weight, bits))
    assert sign.dtype == exponent.dtype == np.int8
    np.testing.assert_array_equal(sign * 2.0**exponent, rounded(weight, bits))


@pytest.mark.parametrize("bits", BITS)
def test_the_smallest_and_the_largest_normal_floats_take_the_ends_of_the_range(bits):
    np.testing.assert_array_equal(rounded(EXTREMES, bits), reference(EXTREMES, bits))


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("denormal", [1e-45, -1e-45, 1.1e-38, -1e-39])
def test_a_denormal_becomes_zero(bits, denormal):
    assert rounded(np.float32(denormal), bits) == 0


def test_five_bits_have_the_exponents_minus_14_to_0():
    weight = 2.0 ** np.arange(-20, 5, dtype=np.float32)
    np.testing.assert_array_equal(np.unique(rounded(weight, 5)), 2.0 ** np.arange(-14, 1))


def test_the_border_is_the_geometric_mean_of_its_neighbours():
    border = np.float32(0.5**0.5)
    below, above = np.nextafter(border, np.float32([0, 1]))
    np.testing.assert_array_equal(rounded(np.float32([below, above]), 5), [0.5, 1])


@pytest.mark.parametrize("shape", [(), (1,), (3, 5), (2, 0, 3), (7, 1, 2, 1)])
def test_any_shape_is_rounded_entry_by_entry(shape):
    weight = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    value = rounded(weight, 5)
    assert value.shape == shape
    np.testing.assert_array_equal(value, reference(weight, 5))


def test_bfloat16_weights_round_as_their_float32_values_do():
    weight = jnp.asarray(np.random.default_rng(0).normal(0, 0.1, (5, 7)), jnp.bfloat16)
    value = rounded(weight, 5)
    assert value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(value.astype(jnp.float32), reference(weight.astype(jnp.float32), 5))


def test_nan_stays_nan_and_infinities_take_the_largest_power():
    value = np.asarray(rounded(np.float32([np.nan, np.inf, -np.inf, 0.4]), 5))
    np.testing.assert_array_equal(value, np.float32([np.nan, 1, -1, 0.5]))


def test_the_gradient_passes_straight_through():
    weight = np.float32([-3, -0.3, 0, 1e-7, 0.6, 30])
    cotangent = np.float32([1, -2, 3, -4, 5, -6])
    gradient = jax.grad(lambda w: jnp.vdot(power_of_two(w), cotangent))(weight)
    np.testing.assert_array_equal(gradient, cotangent)


@pytest.mark.parametrize("function", [power_of_two, additive_power_of_two])
def test_forward_mode_is_straight_through_too(function):
    weight, tangent = np.float32([-0.3, 0.6]), np.float32([2, -5])
    value, derivative = jax.jvp(function, (weight,), (tangent,))
    np.testing.assert_array_equal(value, function(weight))
    np.testing.assert_array_equal(derivative, tangent)


def test_stochastic_rounding_has_a_straight_through_gradient_too():
    weight, cotangent = np.float32([-0.3, 0.6]), np.float32([2, -5])
    key = jax.random.key(0)
    gradient = jax.grad(lambda w: jnp.vdot(power_of_two(w, 5, "stochastic", key), cotangent))(weight)
    np.testing.assert_array_equal(gradient, cotangent)


DRAWS = 4000
stochastic_draws = jax.jit(
    lambda weight, key: jax.vmap(lambda key: power_of_two(weight, 5, "stochastic", key))(
        jax.random.split(key, DRAWS)
    )
)
IN_RANGE = np.float32([2**-14, 2**-14 * 1.3, -0.003, 0.02, -0.26, 0.3, 0.5, 0.7, -0.99, 1])


def test_stochastic_rounding_is_unbiased_in_the_range():
    draws = np.asarray(stochastic_draws(IN_RANGE, jax.random.key(0)), np.float64)
    standard_error = draws.std(axis=0) / np.sqrt(DRAWS)
    assert np.all(np.abs(draws.mean(axis=0) - IN_RANGE) <= 4 * standard_error + 1e-12)


def test_stochastic_rounding_takes_both_neighbours_and_no_other_value():
    draws = np.abs(stochastic_draws(IN_RANGE, jax.random.key(1)))
    exponent = np.log2(np.abs(IN_RANGE))
    for values, e in zip(draws.T, exponent, strict=True):
        np.testing.assert_array_equal(
            np.unique(values), np.unique(2.0 ** np.array([np.floor(e), np.ceil(e)]))
        )


def test_stochastic_rounding_keeps_zero_and_stays_in_the_range():
    weight = np.float32([0, 1e-9, 17, -3e38])
    draws = np.asarray(stochastic_draws(weight, jax.random.key(2)))
    np.testing.assert_array_equal(draws, np.tile(np.float32([0, 2**-14, 1, -1]), (DRAWS, 1)))


def test_equal_keys_draw_equal_weights_and_others_do_not():
    weight = np.random.default_rng(0).normal(size=100).astype(np.float32)
    first, again, other = (power_of_two(weight, 5, "stochastic", jax.random.key(seed)) for seed in (0, 0, 1))
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(first) != np.asarray(other))


@pytest.mark.parametrize("function", [power_of_two, power_of_two_codes])
def test_stochastic_rounding_needs_a_key(function):
    with pytest.raises(ValueError, match=r"random key: pass key=jax\.random\.key"):
        function(jnp.ones(3), rounding="stochastic")


@pytest.mark.parametrize("bits", [1, 9, 0, -3])
def test_weight_bits_outside_2_to_8_are_an_error(bits):
    with pytest.raises(ValueError, match=f"weight_bits must be between 2 and 8, got {bits}"):
        power_of_two(jnp.ones(3), bits)


def test_an_unknown_rounding_names_the_nearest():
    with pytest.raises(ValueError, match="unknown rounding 'stocastic'; did you mean 'stochastic'"):
        power_of_two(jnp.ones(3), rounding="stocastic")


def test_power_of_two_weight_is_the_rounded_sign_times_the_rounded_and_clipped_exponent():
    sign = np.float32([1, -1, 0.2, -0.7, 0, 1, 1])
    exponent = np.float32([0, -3, -1, -2.4, -5, 3, -40])
    expected = [1, -(2**-3), 0, -(2**-2), 0, 1, 2**-14]
    np.testing.assert_array_equal(power_of_two_weight(sign, exponent), expected)


def test_power_of_two_weight_is_float32_for_integer_codes():
    weight = power_of_two_weight(jnp.int8([1, -1, 0]), jnp.int8([-2, 0, 0]))
    assert weight.dtype == jnp.float32
    np.testing.assert_array_equal(weight, [0.25, -1, 0])


def test_power_of_two_weight_undoes_power_of_two_codes():
    weight = np.random.default_rng(0).normal(0, 0.1, (4, 9)).astype(np.float32)
    np.testing.assert_array_equal(power_of_two_weight(*coded(weight, 5)), reference(weight, 5))


def test_power_of_two_weight_has_the_authors_gradients():
    sign, exponent = np.float32([1, -1, 0, 1]), np.float32([-2.3, -1, -4, 3])
    cotangent = np.float32([1, 2, 3, 4])
    weight, pull_back = jax.vjp(power_of_two_weight, sign, exponent)
    grad_sign, grad_exponent = pull_back(jnp.asarray(cotangent))
    np.testing.assert_array_equal(grad_sign, cotangent)
    np.testing.assert_allclose(grad_exponent, cotangent * np.asarray(weight) * np.log(2), rtol=1e-6)


APOT_BITS = (3, 5, 7)


def apot_reference_levels(bits):
    terms = 2 ** ((bits - 1) // 2) - 1
    first = [0] + [4.0**-i for i in range(terms)]
    second = [0] + [4.0**-i / 2 for i in range(terms)]
    return np.array(sorted({2 / 3 * (a + b) for a in first for b in second}))


def test_forward_mode_of_power_of_two_weight_is_the_transpose_of_its_gradient():
    sign, exponent = np.float32([1, -1, 1]), np.float32([-1, -3, -20])
    value, derivative = jax.jvp(power_of_two_weight, (sign, exponent), (np.float32([2, 3, 5]),) * 2)
    expected = np.float32([2, 3, 5]) * (1 + np.log(2) * np.asarray(value))
    np.testing.assert_allclose(derivative, expected, rtol=1e-6)


@pytest.mark.parametrize("bits", APOT_BITS)
def test_apot_levels_are_all_sums_of_two_powers_scaled_to_one(bits):
    levels = additive_power_of_two_levels(bits)
    assert len(levels) == 2 ** (bits - 1)
    np.testing.assert_allclose(levels, apot_reference_levels(bits), rtol=1e-6)
    assert levels[-1] == 1


@given(WEIGHTS, st.sampled_from(APOT_BITS))
def test_apot_takes_the_nearest_level_by_brute_force(weight, bits):
    levels = apot_reference_levels(bits)
    distance = np.abs(np.abs(weight[:, None].astype(np.float64)) - levels)
    value = np.abs(np.asarray(rounded_additively(weight, bits), np.float64))
    taken = np.abs(np.abs(weight) - value)
    assert np.all(taken <= distance.min(axis=1) * (1 + 1e-6) + 1e-7)
    assert np.all(np.abs(value[:, None] - levels).min(axis=1) < 1e-6)


@pytest.mark.parametrize("bits", APOT_BITS)
def test_apot_codes_stand_for_the_value(bits):
    weight = np.random.default_rng(0).normal(0, 0.4, (6, 7)).astype(np.float32)
    weight[0, 0] = 0
    codes = additive_power_of_two_codes(weight, bits)
    assert all(code.dtype == jnp.int8 for code in codes)
    sign, sign_1, sign_2, exponent_1, exponent_2 = (np.asarray(code, np.float64) for code in codes)
    assert set(np.unique(sign_1)) | set(np.unique(sign_2)) <= {0, 1}
    value = sign * (sign_1 * 2 ** (2 * exponent_1) + sign_2 * 2 ** (2 * exponent_2 - 1)) * 2 / 3
    np.testing.assert_allclose(rounded_additively(weight, bits), value, rtol=1e-6)


def test_apot_keeps_zero_and_signs_and_clips_to_one():
    value = rounded_additively(np.float32([0, 0.9, -0.9, 5, -3e38, 1e-40]), 5)
    np.testing.assert_allclose(value, [0, 1, -1, 1, -1, 0])


def test_apot_keeps_bfloat16():
    weight = jnp.asarray([0.5, -0.24, 0.03], jnp.bfloat16)
    value = additive_power_of_two(weight)
    assert value.dtype == jnp.bfloat16
    np.testing.assert_array_equal(value, jnp.asarray([0.5, -0.25, 1 / 48], jnp.bfloat16))


def test_the_apot_gradient_passes_straight_through():
    weight, cotangent = np.float32([-3, -0.3, 0, 0.6]), np.float32([1, -2, 3, -4])
    gradient = jax.grad(lambda w: jnp.vdot(additive_power_of_two(w), cotangent))(weight)
    np.testing.assert_array_equal(gradient, cotangent)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_apot_needs_an_odd_number_of_bits(bits):
    with pytest.raises(ValueError, match=f"weight_bits 3, 5 or 7, got {bits}"):
        additive_power_of_two(jnp.ones(3), bits)


@pytest.mark.parametrize(("bits", "largest"), [(2, 1), (3, 6), (4, 96), (5, 96), (8, 96)])
def test_numbers_of_two_powers_are_all_sums_and_differences_in_range(bits, largest):
    powers = [2**exponent for exponent in range(min(2 ** (bits - 1) - 1, 7))]
    sums = {0, *powers} | {first + sign * second for first in powers for second in powers for sign in (1, -1)}
    limit = 1.5 * powers[-1]
    expected = sorted(number for number in sums if 0 <= number <= limit)
    assert two_power_numbers(bits).tolist() == expected
    assert expected[-1] == largest


def matrix(outputs, seed=0):
    return np.random.default_rng(seed).standard_t(4, (61, outputs)).astype(np.float32)


@pytest.mark.parametrize("bits", [3, 4, 5])
def test_two_powers_are_the_nearest_numbers_of_an_outputs_scale(bits):
    weight, numbers = matrix(33), two_power_numbers(bits).astype(np.float64)
    scale = 2.0 ** np.ceil(
        np.log2(np.abs(weight.astype(np.float64)).max(axis=0) / (1.625 * 2 ** (6 if bits > 3 else 2)))
    )
    nearest = numbers[np.abs(np.abs(weight / scale)[..., None] - numbers).argmin(axis=-1)]
    expected = np.sign(weight) * nearest * scale
    np.testing.assert_array_equal(two_powers_of_two(weight, bits), expected.astype(np.float32))


@pytest.mark.parametrize("bits", range(2, 9))
def test_two_powers_at_and_beside_every_border(bits):
    """A border is half way between two numbers, and goes up."""
    numbers = two_power_numbers(bits)
    borders = (numbers[1:] + numbers[:-1]) / 2
    beside = np.nextafter(borders, 0), borders, np.nextafter(borders, 1e9), numbers, numbers[-1:] * 7
    magnitude = np.concatenate(beside).astype(np.float32)
    expected = numbers[np.searchsorted(borders, magnitude, side="right")]
    for sign in (1, -1):
        np.testing.assert_array_equal(nearest_two_powers(sign * magnitude, bits), sign * expected)


def test_rounding_to_two_powers_twice_is_rounding_once():
    once = two_powers_of_two(matrix(50))
    np.testing.assert_array_equal(two_powers_of_two(once), once)


def test_two_powers_of_scaled_weights_are_scaled():
    weight = matrix(5)
    np.testing.assert_array_equal(two_powers_of_two(weight / 2**20), two_powers_of_two(weight) / 2**20)


def test_two_powers_keep_zeros_and_numbers_that_are_none():
    weight = matrix(4)
    weight[:, 1], weight[3, 2] = 0, np.nan
    rounded = np.asarray(two_powers_of_two(weight))
    assert not rounded[:, 1].any()
    assert np.isnan(rounded[3, 2])


def test_gaussian_weights_have_28_decibels_with_two_powers_and_14_with_one():
    weight = np.random.default_rng(0).normal(scale=0.1, size=(768, 64)).astype(np.float32)
    noise = [np.mean(np.square(function(weight) - weight)) for function in (power_of_two, two_powers_of_two)]
    decibels = 10 * np.log10(np.mean(np.square(weight)) / noise)
    np.testing.assert_allclose(decibels, [13.7, 28.4], atol=0.3)


def test_two_powers_have_a_straight_through_gradient():
    weight, cotangent = matrix(3), matrix(3, seed=1)
    gradient = jax.grad(lambda w: jnp.vdot(two_powers_of_two(w), cotangent))(weight)
    np.testing.assert_array_equal(gradient, cotangent)
