import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftaddvit_jax.ops import l2_normalize


@pytest.mark.parametrize("shape", [(1,), (5,), (3, 7), (2, 3, 1, 4)])
def test_it_divides_by_the_norm_of_the_last_axis(shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    expected = x / np.linalg.norm(x.astype(np.float64), axis=-1, keepdims=True)
    np.testing.assert_allclose(l2_normalize(x), expected, rtol=1e-6)


def test_a_vector_of_zeros_stays_zero_and_so_does_its_gradient():
    x = np.float32([[0, 0, 0], [3, 0, 4]])
    y, pull_back = jax.vjp(l2_normalize, x)
    np.testing.assert_allclose(y, [[0, 0, 0], [0.6, 0, 0.8]], rtol=1e-6)
    (gradient,) = pull_back(jnp.ones_like(y))
    np.testing.assert_array_equal(gradient[0], 0)
    # (I - y y^T) g / |x|
    np.testing.assert_allclose(gradient[1], (1 - np.float32([0.6, 0, 0.8]) * 1.4) / 5, rtol=1e-5)


@pytest.mark.parametrize("magnitude", [1e-40, 1e-30, 1e-20, 1e-14, 1e15])
def test_extreme_magnitudes_have_finite_values_and_gradients(magnitude):
    x = np.full((1, 3), magnitude, np.float32)
    y, pull_back = jax.vjp(l2_normalize, x)
    assert np.all(np.abs(y) <= 1)
    assert np.all(np.isfinite(pull_back(jnp.float32([[1, -2, 3]]))[0]))


def test_bfloat16_stays_bfloat16_and_is_normalised_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 300)), jnp.bfloat16)
    y = l2_normalize(x)
    assert y.dtype == jnp.bfloat16
    exact = np.asarray(x, np.float64)
    exact /= np.linalg.norm(exact, axis=-1, keepdims=True)
    np.testing.assert_allclose(np.asarray(y, np.float64), exact, rtol=2**-8)
