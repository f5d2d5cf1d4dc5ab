import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard as sylvester

from kernels_tvm.hadamard import conference_matrix
from shiftaddvit_jax.ops import hadamard, rotate

# Powers of two on both sides of a vector's 16 lanes and of the four vectors that are combined at once, and
# sizes of 12, 20 and 28.
POWERS = (1, 2, 8, 16, 32, 64, 256, 1024)
OTHERS = (12, 40, 112, 192, 320)


def values(*shape, seed=0):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


@pytest.mark.parametrize("size", POWERS)
def test_a_power_of_two_has_sylvesters_matrix(implementation, size):
    x = values(3, size)
    expected = x.astype(np.float64) @ sylvester(size) / np.sqrt(size)
    np.testing.assert_allclose(hadamard(x, implementation), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("size", OTHERS)
def test_the_matrix_is_orthonormal_symmetric_and_of_equal_magnitudes(implementation, size):
    matrix = np.asarray(hadamard(np.eye(size, dtype=np.float32), implementation), np.float64)
    np.testing.assert_allclose(np.abs(matrix), size**-0.5, rtol=1e-6)
    np.testing.assert_array_equal(matrix, matrix.T)
    np.testing.assert_allclose(matrix @ matrix, np.eye(size), atol=1e-6)


@pytest.mark.parametrize(("size", "order"), [(24, 12), (320, 20), (112, 28)])
def test_other_sizes_have_the_kronecker_product_with_sylvesters_matrix(implementation, size, order):
    x, codes, identity = values(3, size), conference_matrix(order).astype(int), np.eye(order // 2)
    paley = np.block([[codes + identity, codes - identity], [codes - identity, -codes - identity]])
    expected = x @ np.kron(paley, sylvester(size // order)) / np.sqrt(size)
    np.testing.assert_allclose(hadamard(x, implementation), expected, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("order", [12, 20, 28])
def test_a_conference_matrix_is_symmetric_with_orthogonal_rows(order):
    codes = conference_matrix(order).astype(int)
    np.testing.assert_array_equal(codes, codes.T)
    np.testing.assert_array_equal(codes @ codes, (order // 2 - 1) * np.eye(order // 2))


def test_whole_numbers_of_a_power_of_four_are_exact(implementation):
    x = np.random.default_rng(0).integers(-1000, 1000, (5, 256)).astype(np.float32)
    expected = x.astype(int) @ sylvester(256) / 16
    np.testing.assert_array_equal(hadamard(x, implementation), expected)
    np.testing.assert_array_equal(hadamard(hadamard(x, implementation), implementation), x)


@pytest.mark.parametrize("leading", [(), (1,), (3, 5, 7), (0,), (2, 0, 3)], ids=str)
def test_leading_axes_of_any_number_are_kept(implementation, leading):
    x = values(*leading, 48)
    y = hadamard(x, implementation)
    assert y.shape == x.shape
    rows = [hadamard(row, "xla") for row in x.reshape(-1, 48)]
    np.testing.assert_allclose(
        np.asarray(y).reshape(-1, 48), np.reshape(rows, (-1, 48)), rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("size", [64, 48])
def test_the_gradient_is_the_transform_of_the_cotangent(implementation, size):
    x, cotangent = values(3, size), values(3, size, seed=1)
    _, pull_back = jax.vjp(lambda x: hadamard(x, implementation), x)
    (gradient,) = pull_back(jnp.asarray(cotangent))
    np.testing.assert_allclose(gradient, hadamard(cotangent, "xla"), rtol=1e-5, atol=1e-6)


def test_under_jit_and_vmap_it_is_the_same(implementation):
    x = values(2, 3, 40)
    y = jax.jit(jax.vmap(lambda x: hadamard(x, implementation)))(x)
    np.testing.assert_allclose(y, hadamard(x, "xla"), rtol=1e-5, atol=1e-6)


def test_bfloat16_is_rounded_once(xla_implementation):
    x = jnp.asarray(values(4, 512), jnp.bfloat16)
    y = hadamard(x, xla_implementation)
    assert y.dtype == jnp.bfloat16
    expected = np.asarray(x, np.float64) @ sylvester(512) / np.sqrt(512)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=2**-8, atol=1e-6)


def test_a_power_of_two_is_multiplied_by_its_scale_alone():
    text = str(jax.make_jaxpr(lambda x: hadamard(x, "xla"))(values(3, 64)))
    assert text.count("= mul ") == 1
    assert "length=6" in text
    assert "dot_general" not in text


@pytest.mark.parametrize(
    ("size", "nearest"), [(0, "1"), (3, "2 or 4"), (36, "32 or 40"), (60, "56 or 64"), (100, "96 or 112")]
)
def test_a_size_without_a_matrix_is_answered_with_the_nearest(size, nearest):
    with pytest.raises(
        ValueError, match=rf"no Hadamard matrix of size {size} here; .*12, 20, 28: {nearest}$"
    ):
        hadamard(np.zeros((2, size), np.float32))


def test_whole_numbers_are_refused():
    # The annotation refuses them too, where the tests check annotations.
    with pytest.raises(TypeError, match="floating-point numbers, got int32; convert"):
        hadamard.__wrapped__(jnp.zeros((2, 4), jnp.int32))


def test_no_kernel_holds_more_numbers_than_fit_into_shared_memory():
    x = np.ones((1, 16384), np.float32)
    assert hadamard(x)[0, 0] == 128
    with pytest.raises(ValueError, match="at most 8192 numbers, not 16384"):
        hadamard(x, "tvm")


def test_rotations_keep_products_of_rows_each(implementation):
    x, signs = values(5, 48), np.random.default_rng(1).choice([-1, 1], (3, 2, 48)).astype(np.int8)
    rotated = np.asarray(rotate(x, signs, implementation), np.float64)
    assert rotated.shape == (5, 3 * 48)
    for part in np.split(rotated, 3, axis=-1):
        np.testing.assert_allclose(part @ part.T, x.astype(np.float64) @ x.T, rtol=1e-4, atol=1e-4)


def test_a_rotation_is_two_rounds_of_signs_and_the_transform(implementation):
    x, signs = values(3, 16), np.random.default_rng(1).choice([-1, 1], (1, 2, 16)).astype(np.int8)
    expected = x * signs[0, 0] @ sylvester(16) * signs[0, 1] @ sylvester(16) / 16
    np.testing.assert_allclose(rotate(x, signs, implementation), expected, rtol=1e-5, atol=1e-6)


def test_a_rotation_spreads_an_outlier():
    x = np.zeros((1, 64), np.float32)
    x[0, 7] = 1
    signs = np.random.default_rng(1).choice([-1, 1], (1, 2, 64)).astype(np.int8)
    assert np.abs(rotate(x, signs)).max() < 0.6
