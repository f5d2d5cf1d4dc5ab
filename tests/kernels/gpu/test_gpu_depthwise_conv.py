import numpy as np
import pytest
from scipy.special import erf

from kernels_tvm.descriptions import DepthwiseConvDescription
from kernels_tvm.store import Kernel


@pytest.mark.parametrize("gelu", [False, True], ids=["plain", "gelu"])
@pytest.mark.parametrize(
    ("shape", "taps"),
    [
        ((2, 14, 14, 64), (3, 3)),
        ((1, 1, 196, 64), (1, 9)),
        ((1, 9, 17, 5), (3, 5)),
        ((1, 3, 2, 36), (9, 7)),  # a kernel larger than the grid, whose tile has room for 16 channels alone
    ],
)
def test_depthwise_convolutions_are_sums_of_shifted_products(run_blocks, shape, taps, gelu):
    rng = np.random.default_rng(0)
    x = rng.normal(size=shape).astype(np.float32)
    weights = rng.normal(size=(*taps, shape[3])).astype(np.float32)
    bias = rng.normal(size=shape[3]).astype(np.float32)
    margins = [(0, 0), *((size // 2, size // 2) for size in taps), (0, 0)]
    padded = np.pad(x.astype(np.float64), margins)
    expected = sum(
        padded[:, i : i + shape[1], j : j + shape[2]] * weights[i, j] for i, j in np.ndindex(*taps)
    )
    if gelu:
        expected = expected + bias
        expected = expected * (1 + erf(expected / np.sqrt(2))) / 2
    kernel = Kernel("depthwise_conv", DepthwiseConvDescription(*shape[1:], taps, gelu))
    arrays = [x, weights.reshape(-1, shape[3]), *([bias] if gelu else [])]
    y = run_blocks(kernel, arrays, (shape, "float32"))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
