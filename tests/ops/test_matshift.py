import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftaddvit_jax.ops import dynamic_int8, fixed_point, matshift, quantize_activations, shift_product

INPUTS, OUTPUTS = 7, 5
IMPLEMENTATIONS = (None, "xla", "tvm", "tvm_shift")
ACTIVATIONS = ("float", "fixed_point", "int8")
EVERY_FORMAT = pytest.mark.parametrize(
    ("implementation", "activations"),
    [
        (implementation, activations)
        for implementation in IMPLEMENTATIONS
        for activations in ACTIVATIONS
        if implementation in (None, "xla") or activations != "fixed_point"
    ],
)
LEADING = pytest.mark.parametrize("leading", [(), (3,), (2, 5), (0,)], ids=str)


@pytest.fixture(scope="session", params=IMPLEMENTATIONS, ids=str)
def implementation(request):
    return request.param


def tokens(leading, scale=1.0):
    return np.random.default_rng(0).normal(0, scale, (*leading, INPUTS)).astype(np.float32)


def weight_codes():
    rng = np.random.default_rng(1)
    sign = rng.choice([-1, 0, 1], (INPUTS, OUTPUTS)).astype(np.int8)
    return sign, rng.integers(-14, 1, (INPUTS, OUTPUTS)).astype(np.int8)


def dense(sign, exponent):
    return sign * 2.0 ** exponent.astype(np.float64)


def octaves(weight):
    """Of each output's powers of two, those from its largest to 1/64 of it; the others go to the nearest."""
    smallest = np.abs(weight).max(axis=0) / 64
    return np.sign(weight) * np.select(
        [np.abs(weight) >= smallest, np.abs(weight) >= smallest / 2], [np.abs(weight), smallest], 0
    )


def quantized_tokens(x, activations):
    x = x.astype(np.float64)
    if activations == "fixed_point":
        return np.clip(np.floor(x * 2**16) / 2**16, -(2**15), 2**15 - 1)
    if activations == "int8":
        largest = np.abs(x).max(axis=-1, keepdims=True)
        scale = np.where(largest > 0, largest / 127, 1)
        return np.round(x / scale) * scale
    return x


def quantized_weight(sign, exponent, activations):
    return octaves(dense(sign, exponent)) if activations == "int8" else dense(sign, exponent)


@LEADING
@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.float32])
def test_it_is_the_product_with_sign_times_power_in_float64(implementation, leading, dtype):
    x, (sign, exponent) = tokens(leading), weight_codes()
    y = matshift(x, sign.astype(dtype), exponent.astype(dtype), implementation=implementation)
    assert y.shape == (*leading, OUTPUTS)
    # Tokens are of the order of 1, and so are the sums that may cancel.
    np.testing.assert_allclose(y, x @ dense(sign, exponent), rtol=1e-5, atol=1e-5)


@LEADING
@EVERY_FORMAT
def test_tokens_and_weights_are_quantized_as_in_numpy(implementation, leading, activations):
    x, codes = tokens(leading, 3.0), weight_codes()
    y = matshift(x, *codes, activations=activations, implementation=implementation)
    expected = quantized_tokens(x, activations) @ quantized_weight(*codes, activations)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rows", [1, 2, 37])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (67, 35)], ids=str)
def test_int8_products_of_whole_tokens_are_numpys_integers(implementation, rows, inputs, outputs):
    rng = np.random.default_rng(0)
    x = rng.integers(-127, 128, (rows, inputs)).astype(np.float32)
    x[:, -1] = 127  # the scale is 1
    sign, exponent = rng.integers(-1, 2, (inputs, outputs)), rng.integers(-6, 1, (inputs, outputs))
    sign[0], exponent[0] = 1, 0  # no output has more than seven octaves
    y = matshift(x, sign, exponent, activations="int8", implementation=implementation)
    integers = x.astype(np.int32) @ (sign * 2 ** (exponent + 6)).astype(np.int32)
    np.testing.assert_array_equal(y, integers / 64)


def test_bfloat16_tokens_stay_bfloat16(xla_implementation):
    x, (sign, exponent) = jnp.asarray(tokens((3,)), jnp.bfloat16), weight_codes()
    y = matshift(x, sign, exponent, implementation=xla_implementation)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64) @ dense(sign, exponent)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-7, atol=2**-6)


def test_exponents_are_clipped_to_the_range_of_weight_bits(implementation):
    x = np.eye(INPUTS, dtype=np.float32)
    sign, exponent = weight_codes()
    y = matshift(x, sign, exponent, weight_bits=3, implementation=implementation)
    np.testing.assert_array_equal(y, dense(sign, np.maximum(exponent, -2)))


def test_an_output_of_int8_is_within_half_a_step_a_weight_of_the_exact_one(implementation):
    x, weight = tokens((4, 9), 10.0), octaves(dense(*weight_codes()))
    y = matshift(x, *weight_codes(), activations="int8", implementation=implementation)
    half_step = np.abs(x).max(axis=-1, keepdims=True) / 254
    assert np.all(np.abs(y - x @ weight) <= half_step * np.abs(weight).sum(axis=0) * (1 + 1e-5))


def test_the_int8_scale_of_a_token_does_not_depend_on_the_others(implementation):
    x, (sign, exponent) = tokens((3,)), weight_codes()
    loud = x.copy()
    loud[1:] *= 1000
    y, with_loud = (
        matshift(part, sign, exponent, activations="int8", implementation=implementation)
        for part in (x, loud)
    )
    np.testing.assert_array_equal(y[0], with_loud[0])


@EVERY_FORMAT
def test_a_token_of_zeros_gives_zeros(implementation, activations):
    x = tokens((3,))
    x[1] = 0
    y = matshift(x, *weight_codes(), activations=activations, implementation=implementation)
    np.testing.assert_array_equal(y[1], 0)
    assert np.all(np.isfinite(y))


@EVERY_FORMAT
def test_the_gradient_to_the_tokens_passes_straight_through(implementation, activations):
    x, codes = tokens((2, 5)), weight_codes()
    cotangent = np.random.default_rng(2).normal(size=(2, 5, OUTPUTS)).astype(np.float32)
    gradient = jax.grad(
        lambda x: jnp.vdot(
            matshift(x, *codes, activations=activations, implementation=implementation), cotangent
        )
    )(x)
    expected = cotangent @ quantized_weight(*codes, activations).T
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-6)


def test_floating_codes_have_gradients(implementation):
    x, codes = tokens((3,)), [code.astype(np.float32) for code in weight_codes()]
    cotangent = np.random.default_rng(2).normal(size=(3, OUTPUTS)).astype(np.float32)
    _, pull_back = jax.vjp(lambda *codes: matshift(x, *codes, implementation=implementation), *codes)
    grad_sign, grad_exponent = pull_back(jnp.asarray(cotangent))
    grad_weight = x.T @ cotangent
    np.testing.assert_allclose(grad_sign, grad_weight, rtol=1e-5, atol=1e-6)
    expected = grad_weight * dense(*weight_codes()) * np.log(2)
    np.testing.assert_allclose(grad_exponent, expected, rtol=1e-5, atol=1e-6)


def test_shift_product_takes_the_weight_itself(implementation):
    x, weight = tokens((2, 5)), np.float32([[0.125], [-0.5], [0], [1], [0.25], [-1], [2**-14]])
    y = shift_product(x, weight, implementation=implementation)
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight, rtol=1e-5, atol=1e-5)


def test_shift_product_takes_sums_of_two_powers_on_xla(xla_implementation):
    x, weight = tokens((2, 5)), np.float32([[0.75], [-0.625], [0], [1], [0.25], [-1.5], [2**-14]])
    y = shift_product(x, weight, implementation=xla_implementation)
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight, rtol=1e-5, atol=1e-6)


def test_fixed_point_rounds_down_and_clips():
    x = np.float32([0, 2**-17, -(2**-17), 1.25, 4e4, -4e4, 2**15 - 1])
    expected = [0, 0, -(2**-16), 1.25, 2**15 - 1, -(2**15), 2**15 - 1]
    np.testing.assert_array_equal(fixed_point(x), expected)


def test_fixed_point_takes_other_widths():
    x = np.float32([0.3, -0.3, 9, -9])
    np.testing.assert_array_equal(fixed_point(x, integer_bits=4, fraction_bits=2), [0.25, -0.5, 7, -8])


def test_dynamic_int8_gives_whole_numbers_that_reach_127():
    whole, scale = dynamic_int8(tokens((4, 3), 20.0))
    assert whole.shape == (4, 3, INPUTS)
    assert scale.shape == (4, 3, 1)
    np.testing.assert_array_equal(whole, np.round(whole))
    np.testing.assert_array_equal(np.abs(whole).max(axis=-1), 127)


def test_dynamic_int8_of_zeros_is_zeros_with_the_scale_one():
    whole, scale = dynamic_int8(jnp.zeros((2, 3)))
    np.testing.assert_array_equal(whole, 0)
    np.testing.assert_array_equal(scale, 1)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_dynamic_int8_of_a_row_that_is_not_finite_is_not_finite_either(value):
    x = np.random.default_rng(0).normal(size=(2, 67, 67)).astype(np.float32)
    x[1, range(67), range(67)] = value  # wherever in a row it is
    whole, scale = jax.jit(dynamic_int8)(x)
    assert np.isfinite(scale[0]).all()
    assert not np.isfinite(scale[1]).any()
    assert not np.isfinite(whole * scale)[1].any()


@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 3e38])
def test_int8_survives_extreme_magnitudes(magnitude):
    x = np.float32([[magnitude, -magnitude, 0]])
    assert np.all(np.isfinite(quantize_activations(x, "int8")))


def test_shapes_that_do_not_fit_are_named():
    sign, exponent = weight_codes()
    with pytest.raises(ValueError, match=r"one shape, got \(7, 5\) and \(7, 4\)"):
        matshift(tokens(()), sign, exponent[:, :4])
    with pytest.raises(ValueError, match=r"expects .* got \(2, 6\) and \(7, 5\)"):
        matshift(jnp.ones((2, 6)), sign, exponent)
    with pytest.raises(ValueError, match=r"got \(2, 7\) and \(7,\)"):
        shift_product(jnp.ones((2, 7)), jnp.ones(7))


def test_an_unknown_number_format_names_the_nearest():
    with pytest.raises(ValueError, match="unknown activations 'int4'; did you mean 'int8'"):
        matshift(tokens(()), *weight_codes(), activations="int4")
