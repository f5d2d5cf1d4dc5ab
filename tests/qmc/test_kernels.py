"""Kernels against Fourier and Walsh series in float64, Gram matrices against dense algebra in NumPy."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from shiftaddvit_jax import qmc
from shiftaddvit_jax.qmc.kernels import _fwht

SMOOTHNESS = (1, 2, 3, 4)
DIGITS = np.array([0, 1, 5 << 7, 1 << 20, 3 << 29, 1 << 31, (1 << 32) - 1, 0x9E3779B9], np.uint32)


def fourier_sum(x, smoothness):
    """The sum over k > 0 of 2 cos(2 pi k x) / k ** (2 smoothness); the closed form where it is slow."""
    if smoothness == 1:
        return 2 * np.pi**2 * (x**2 - x + 1 / 6)
    k = np.arange(1, 4000)[:, None]
    return np.sum(2 * np.cos(2 * np.pi * k * x) / k ** (2.0 * smoothness), axis=0)


def walsh_sum(digits, smoothness, most=64):
    """The sum over 0 < k < 2 ** most of wal_k weighted as Dick does, by the place of k's highest one."""
    signs = [None, *(1 - 2 * (int(digits) >> (32 - place) & 1) for place in range(1, 33)), *[1] * most]

    @functools.cache
    def below(highest, counted):  # the sum over 0 <= k < 2 ** highest, of which places that many count
        if counted == 0:
            return float(np.prod([1.0 + sign for sign in signs[1 : highest + 1]]))
        return 1 + sum(
            signs[place] * 2.0**-place * below(place - 1, counted - 1) for place in range(1, highest + 1)
        )

    if smoothness == 1:
        return sum(signs[place] * 2.0 ** (1 - 2 * place) * below(place - 1, 0) for place in range(1, most))
    return below(most, smoothness) - 1


@pytest.mark.parametrize("smoothness", SMOOTHNESS)
def test_shift_invariant_kernels_are_fourier_series(smoothness):
    ours = qmc.shift_invariant_kernel(DIGITS[:, None], np.zeros(1, np.uint32), smoothness)
    np.testing.assert_allclose(ours, 1 + fourier_sum(DIGITS / 2**32, smoothness), atol=1e-6)


@pytest.mark.parametrize("smoothness", SMOOTHNESS)
def test_digitally_shift_invariant_kernels_are_walsh_series(smoothness):
    ours = qmc.digitally_shift_invariant_kernel(DIGITS[:, None], np.zeros(1, np.uint32), smoothness)
    np.testing.assert_allclose(ours, [1 + walsh_sum(digits, smoothness) for digits in DIGITS], atol=1e-6)


def test_kernels_are_products_over_weighted_dimensions():
    x, z = (qmc.sobol(3).randomize(jax.random.key(seed)).integers(4) for seed in (0, 1))
    weights = np.array([1.0, 0.5, 0.1], np.float32)
    together = qmc.digitally_shift_invariant_kernel(x, z, 2, weights, 3.0)
    single = [qmc.digitally_shift_invariant_kernel(x[:, [i]], z[:, [i]], 2) - 1 for i in range(3)]
    expected = 3 * np.prod([1 + weight * one for weight, one in zip(weights, single, strict=True)], axis=0)
    np.testing.assert_allclose(together, expected, rtol=1e-6)


@pytest.mark.parametrize("smoothness", SMOOTHNESS)
def test_kernels_are_qmcpys(smoothness):
    qmcpy = pytest.importorskip("qmcpy")
    weights = np.array([0.5, 0.2])
    points = np.asarray(qmc.sobol(2).randomize(jax.random.key(2)).integers(16))
    theirs = {
        qmc.shift_invariant_kernel: (qmcpy.KernelShiftInvar, {}, points / 2**32),
        qmc.digitally_shift_invariant_kernel: (
            qmcpy.KernelDigShiftInvar,
            {"t": 32},
            points.astype(np.uint64),
        ),
    }
    for ours, (kernel, settings, x) in theirs.items():
        expected = kernel(2, lengthscales=weights, alpha=smoothness, **settings)(x[:, None], x[None])
        np.testing.assert_allclose(
            ours(points[:, None], points, smoothness, jnp.asarray(weights)), expected, rtol=1e-6, atol=1e-6
        )


def test_fourier_transforms_take_values_in_bit_reversed_order():
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8)).astype(np.float32)
    reversed_order = [0, 4, 2, 6, 1, 5, 3, 7]
    transformed = qmc.fftbr(x)
    np.testing.assert_allclose(transformed, np.fft.fft(x[:, reversed_order], norm="ortho"), atol=1e-6)
    np.testing.assert_allclose(qmc.ifftbr(transformed), x, atol=1e-6)


def test_the_walsh_transform_is_hadamards_matrix():
    x = np.random.default_rng(1).normal(size=(3, 16)).astype(np.float32)
    np.testing.assert_allclose(_fwht(x), x @ scipy.linalg.hadamard(16) / 4, atol=1e-6)


@pytest.fixture(params=["net", "lattice"])
def dense(request):
    """A Gram matrix on 64 points, the same by all its elements with noise, and a right-hand side."""
    make, kernel = {
        "net": (qmc.sobol, qmc.digitally_shift_invariant_kernel),
        "lattice": (qmc.lattice, qmc.shift_invariant_kernel),
    }[request.param]
    sequence = make(3).randomize(jax.random.key(3))
    weights = jnp.asarray([0.5, 0.3, 0.1])

    def gram(noise):
        return qmc.gram(sequence, 64, 2, weights, 2.0, noise=noise)

    points = sequence.integers(64)
    with jax.enable_x64(True):
        matrix = np.asarray(kernel(points[:, None], points, 2, weights.astype(float), 2.0))
    return gram, matrix, np.random.default_rng(4).normal(size=64)


def test_products_are_the_dense_matrix_times_a_vector(dense):
    gram, matrix, y = dense
    np.testing.assert_allclose(gram(0.0).product(y.astype(np.float32)), matrix @ y, rtol=1e-4, atol=1e-4)


def test_solves_with_noise_are_those_of_the_dense_matrix(dense):
    gram, matrix, y = dense
    expected = np.linalg.solve(matrix + 0.01 * np.eye(64), y)
    solved = gram(0.01).solve(y.astype(np.float32))
    np.testing.assert_allclose(solved, expected, atol=3e-3 * np.abs(expected).max())


def test_solves_in_float64_need_no_noise(dense):
    gram, matrix, y = dense
    with jax.enable_x64(True):
        solved = np.asarray(gram(0.0).solve(y))
    assert solved.dtype == np.float64
    np.testing.assert_allclose(matrix @ solved, y, atol=1e-9)


def test_the_likelihood_is_the_normal_density(dense):
    gram, matrix, y = dense
    expected = scipy.stats.multivariate_normal(np.zeros(64), matrix + 0.1 * np.eye(64)).logpdf(y)
    np.testing.assert_allclose(gram(0.1).log_likelihood(y.astype(np.float32)), expected, rtol=1e-4)


def test_the_likelihood_has_a_gradient_to_the_noise(dense):
    gram, matrix, y = dense
    slope = jax.grad(lambda noise: gram(noise).log_likelihood(y.astype(np.float32)))(0.1)
    inverse = np.linalg.inv(matrix + 0.1 * np.eye(64))
    np.testing.assert_allclose(slope, 0.5 * (np.sum((inverse @ y) ** 2) - np.trace(inverse)), rtol=1e-3)


def test_a_likelihood_is_one_program(dense):
    gram, _, y = dense
    y = y.astype(np.float32)
    compiled = jax.jit(lambda noise: gram(noise).log_likelihood(y))
    np.testing.assert_allclose(compiled(0.1), gram(0.1).log_likelihood(y), rtol=1e-5)


@pytest.mark.parametrize(("count", "nearest"), [(48, "take 32 or 64"), (0, "take 1 or 2")])
def test_a_number_of_points_that_is_no_power_of_two_is_refused(count, nearest):
    with pytest.raises(ValueError, match=f"must be a power of two, got {count}; {nearest}"):
        qmc.gram(qmc.sobol(2), count, 1, noise=0.1)


def test_halton_points_have_no_fast_kernel():
    with pytest.raises(TypeError, match=r"no kernel is fast on Halton points; take qmc.sobol or qmc.lattice"):
        qmc.gram(qmc.halton(2), 16, 1, noise=0.1)


def test_another_smoothness_is_refused():
    with pytest.raises(ValueError, match="smoothness must be 1, 2, 3 or 4, got 5"):
        qmc.gram(qmc.sobol(2), 16, 5, noise=0.1)
