import numpy as np
from scipy.special import erf

from kernels_tvm.descriptions import DepthwiseConvDescription
from kernels_tvm.store import Kernel


def run(run_kernel, target, x):
    """GELU alone: a convolution with one weight of 1 and a bias of 0."""
    kernel = Kernel("depthwise_conv", DepthwiseConvDescription(1, len(x), 1, (1, 1), gelu=True))
    one, zero = np.ones((1, 1), np.float32), np.zeros(1, np.float32)
    shape = (1, 1, len(x), 1)
    return run_kernel(kernel, target, [x.reshape(shape), one, zero], (shape, "float32")).ravel()


def test_gelu_is_scipys_to_3e_6(run_kernel, tiled_target):
    x = np.linspace(-6, 6, 4801, dtype=np.float32)
    exact = x * (1 + erf(x.astype(np.float64) / np.sqrt(2))) / 2
    np.testing.assert_allclose(run(run_kernel, tiled_target, x), exact, rtol=0, atol=3e-6)


def test_gelu_of_large_numbers_is_the_number_or_nothing(run_kernel, tiled_target):
    x = np.array([0, 6, 100, 1e9, 3e38, -100, -1e9, -3e38], np.float32)
    y = run(run_kernel, tiled_target, x)
    np.testing.assert_allclose(y[:5], x[:5], rtol=1e-6)
    np.testing.assert_allclose(y[5:] / x[5:], 0, atol=1e-6)


def test_gelu_of_infinity_is_infinity(run_kernel, tiled_target):
    assert run(run_kernel, tiled_target, np.array([np.inf], np.float32)) == np.inf


def test_gelu_of_no_number_is_none(run_kernel, tiled_target):
    assert np.isnan(run(run_kernel, tiled_target, np.array([np.nan], np.float32)))
