import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from shiftaddvit_jax.ops.precision import CONV_GENERAL_DILATED, DOT_GENERAL

LAST_WITH_FIRST = (((1,), (0,)), ((), ()))
IMAGES = ("NHWC", "HWIO", "NHWC")


def between_two(rng, *shape):
    """Numbers from 1 to 2 with 8 bits after the point: bfloat16 holds 7, so half of them lie between two."""
    return (1 + rng.integers(0, 256, shape) / 256).astype(np.float32)


def rounded(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def dot(x, weight, precision):
    return DOT_GENERAL[precision](x, weight, LAST_WITH_FIRST, precision=None)


def conv(x, weight, precision):
    return CONV_GENERAL_DILATED[precision](x, weight, (2, 2), "VALID", dimension_numbers=IMAGES)


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (1, 256, 10), (5, 67, 3), (49, 256, 256)])
def test_dots_in_bfloat16_are_numpys_of_the_nearest_numbers(rows, inputs, outputs):
    rng = np.random.default_rng(0)
    x, weight = between_two(rng, rows, inputs), between_two(rng, inputs, outputs)
    y = jax.jit(dot, static_argnums=2)(x, weight, "bfloat16")
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, rounded(x) @ rounded(weight), rtol=1e-6)


def test_rounding_survives_what_xla_fuses_it_with():
    rng = np.random.default_rng(0)
    x, weight = between_two(rng, 5, 67), between_two(rng, 67, 3)
    y = jax.jit(lambda x, weight: jnp.tanh(dot(2 * x, weight + 1, "bfloat16") / 400))(x, weight)
    expected = np.tanh(rounded(2 * x) @ rounded(weight + 1) / 400)
    np.testing.assert_allclose(y, expected, rtol=1e-6)


def test_convolutions_in_bfloat16_are_those_of_the_nearest_numbers():
    rng = np.random.default_rng(0)
    x, weight = between_two(rng, 2, 9, 7, 5), between_two(rng, 3, 3, 5, 4)
    y = jax.jit(conv, static_argnums=2)(x, weight, "bfloat16")
    assert y.dtype == jnp.float32
    windows = np.lib.stride_tricks.sliding_window_view(rounded(x), (3, 3), axis=(1, 2))[:, ::2, ::2]
    np.testing.assert_allclose(y, np.einsum("bhwcij,ijco->bhwo", windows, rounded(weight)), rtol=1e-6)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_int8_products_of_a_row_that_is_not_finite_are_not_finite(value):
    rng = np.random.default_rng(0)
    x, weight = between_two(rng, 3, 67), between_two(rng, 67, 3)
    x[1, 5] = value
    y = jax.jit(dot, static_argnums=2)(x, weight, "int8")
    np.testing.assert_array_equal(np.isfinite(y).all(axis=1), [True, False, True])
    assert not np.isfinite(y[1]).any()


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_int8_convolutions_of_an_image_that_is_not_finite_are_not_finite(value):
    rng = np.random.default_rng(0)
    x, weight = between_two(rng, 2, 9, 7, 5), between_two(rng, 3, 3, 5, 4)
    x[1, 4, 4, 0] = value
    finite = np.isfinite(jax.jit(conv, static_argnums=2)(x, weight, "int8"))
    assert finite[0].all()
    assert not finite[1].all()


def test_gradients_are_those_of_the_product_of_the_nearest_numbers():
    rng = np.random.default_rng(0)
    x, weight = between_two(rng, 5, 67), between_two(rng, 67, 3)
    gradients = jax.jit(jax.grad(lambda x, weight: jnp.sum(dot(x, weight, "bfloat16")), (0, 1)))(x, weight)
    assert [gradient.dtype for gradient in gradients] == [jnp.float32] * 2
    expected = np.ones((5, 3)) @ rounded(weight).T, rounded(x).T @ np.ones((5, 3))
    for gradient, exact in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, exact, rtol=2**-8)  # a gradient of bfloat16 numbers is one


def test_float32_is_jaxs_own_product():
    assert DOT_GENERAL["float32"] is jax.lax.dot_general
    assert CONV_GENERAL_DILATED["float32"] is jax.lax.conv_general_dilated


def int8(x, axis):
    """The nearest whole numbers from -127 to 127, and the scale: a weight's has 16 binary digits."""
    scale = np.abs(x.astype(np.float64)).max(axis=axis, keepdims=True) / 127
    if axis == 0:
        mantissa, exponent = np.frexp(scale)
        scale = np.ldexp(np.floor(mantissa * 2**16), exponent - 16)
    return np.clip(np.round(x / scale), -127, 127), scale


@pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (1, 256, 10), (5, 67, 3), (49, 1500, 30)])
def test_dots_in_int8_are_numpys_of_the_nearest_whole_numbers(rows, inputs, outputs):
    rng = np.random.default_rng(0)
    x, weight = (rng.normal(size=shape).astype(np.float32) for shape in ((rows, inputs), (inputs, outputs)))
    (whole, row), (numbers, column) = int8(x, -1), int8(weight, 0)
    y = jax.jit(dot, static_argnums=2)(x, weight, "int8")
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, (whole @ numbers) * row * column, rtol=1e-6)


@pytest.mark.parametrize(("padding", "pads"), [("VALID", 0), ([(1, 1), (1, 1)], 1)])
def test_convolutions_in_int8_scale_each_patch(padding, pads):
    rng = np.random.default_rng(0)
    x, weight = (rng.normal(size=shape).astype(np.float32) for shape in ((2, 9, 7, 5), (3, 3, 5, 4)))
    y = CONV_GENERAL_DILATED["int8"](x, weight, (2, 2), padding, dimension_numbers=IMAGES)
    x = np.pad(x, ((0, 0), (pads, pads), (pads, pads), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(x, (3, 3), axis=(1, 2))[:, ::2, ::2]
    rows = windows.transpose(0, 1, 2, 4, 5, 3).reshape(*windows.shape[:3], -1)
    (whole, row), (numbers, column) = int8(rows, -1), int8(weight.reshape(-1, 4), 0)
    np.testing.assert_allclose(y, (whole @ numbers) * row * column, rtol=1e-6)


def test_gradients_in_int8_are_those_of_the_product_of_the_rounded_factors():
    rng = np.random.default_rng(0)
    x, weight = (rng.normal(size=shape).astype(np.float32) for shape in ((5, 67), (67, 3)))
    (whole, row), (numbers, column) = int8(x, -1), int8(weight, 0)
    gradients = jax.grad(lambda x, weight: jnp.sum(dot(x, weight, "int8")), (0, 1))(x, weight)
    expected = (numbers * column).sum(axis=1), (whole * row).sum(axis=0)[:, None]
    for gradient, right in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(gradient, np.broadcast_to(right, gradient.shape), rtol=1e-5)
