import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftaddvit_jax.ops import matadd

SHAPES = [
    ((1, 1), (1, 1)),
    ((5, 7), (7, 3)),
    ((2, 3, 5, 7), (2, 3, 7, 4)),
    ((2, 1, 5, 7), (3, 7, 4)),
    ((5, 7), (4, 7, 1)),
    ((6, 5, 9), (9, 2)),
]
LEVELS = pytest.mark.parametrize("levels", [(0, 1), (-1, 1)], ids=str)


def operands(codes_shape, values_shape, levels, dtype=np.float32):
    rng = np.random.default_rng(0)
    return rng.choice(levels, codes_shape).astype(dtype), rng.normal(size=values_shape).astype(np.float32)


@LEVELS
@pytest.mark.parametrize(("codes_shape", "values_shape"), SHAPES)
def test_it_is_numpys_matmul(implementation, codes_shape, values_shape, levels):
    codes, values = operands(codes_shape, values_shape, levels)
    expected = np.matmul(codes.astype(np.float64), values)
    np.testing.assert_allclose(matadd(codes, values, implementation), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [np.int8, np.int32, np.uint8, np.bool_])
def test_integer_codes_give_the_dtype_of_the_values(implementation, dtype):
    codes, values = operands((5, 7), (7, 3), (0, 1), dtype)
    y = matadd(codes, values, implementation)
    assert y.dtype == jnp.float32
    np.testing.assert_allclose(y, codes.astype(np.float64) @ values, rtol=1e-5, atol=1e-5)


@LEVELS
@pytest.mark.parametrize("codes_dtype", [np.int8, np.float32])
def test_sums_of_int8_values_are_numpys_int32(implementation, levels, codes_dtype):
    codes = operands((2, 5, 300), (300, 3), levels, codes_dtype)[0]
    values = np.random.default_rng(1).integers(-128, 128, (2, 300, 3)).astype(np.int8)
    values[..., 0] = -128  # sums beyond 16 bits
    y = matadd(codes, values, implementation)
    assert y.dtype == jnp.int32
    np.testing.assert_array_equal(y, codes.astype(np.int32) @ values.astype(np.int32))


def test_no_rows_give_no_sums(implementation):
    y = matadd(np.zeros((2, 0, 7), np.float32), np.ones((2, 7, 3), np.float32), implementation)
    assert y.shape == (2, 0, 3)


def test_bfloat16_values_stay_bfloat16(xla_implementation):
    codes, values = operands((5, 7), (7, 3), (-1, 1))
    values = jnp.asarray(values, jnp.bfloat16)
    y = matadd(codes, values, xla_implementation)
    assert y.dtype == jnp.bfloat16
    exact = codes.astype(np.float64) @ np.asarray(values, np.float64)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-7, atol=2**-5)


def test_codes_of_zeros_give_zeros(implementation):
    values = operands((5, 7), (7, 3), (0, 1))[1]
    np.testing.assert_array_equal(matadd(np.zeros((5, 7), np.float32), values, implementation), 0)


@LEVELS
def test_both_gradients_have_their_closed_form(implementation, levels):
    codes, values = operands((2, 5, 7), (2, 7, 3), levels)
    cotangent = np.random.default_rng(1).normal(size=(2, 5, 3)).astype(np.float32)
    _, pull_back = jax.vjp(lambda *operands: matadd(*operands, implementation), codes, values)
    grad_codes, grad_values = pull_back(jnp.asarray(cotangent))
    np.testing.assert_allclose(grad_codes, cotangent @ values.swapaxes(-1, -2), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(grad_values, codes.swapaxes(-1, -2) @ cotangent, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_broadcast_operand_sums_over_the_batch(implementation):
    codes, values = operands((4, 5, 7), (7, 3), (0, 1))
    gradient = jax.grad(lambda values: matadd(codes, values, implementation).sum())(values)
    expected = np.broadcast_to(codes.sum(axis=(0, 1))[:, None], values.shape)
    np.testing.assert_allclose(gradient, expected, rtol=1e-6)


@pytest.mark.parametrize(("codes_shape", "values_shape"), [((7,), (7, 3)), ((5, 7), (7,)), ((5, 6), (7, 3))])
def test_shapes_that_do_not_fit_are_named(codes_shape, values_shape):
    with pytest.raises(ValueError, match=r"matadd expects .* got \(") as error:
        matadd(jnp.ones(codes_shape), jnp.ones(values_shape))
    assert str(codes_shape) in str(error.value)
    assert str(values_shape) in str(error.value)
