import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.linalg import hadamard

from kernels_tvm.descriptions import (
    BinarizeDescription,
    HadamardDescription,
    HammingProductDescription,
    MatAddDescription,
)
from kernels_tvm.store import Kernel

SEEDS = st.integers(0, 2**16)
BATCH, ROWS = st.integers(0, 3), st.integers(1, 20)
COLUMNS = pytest.mark.parametrize("columns", [1, 70])


@COLUMNS
@settings(max_examples=8)
@given(batch=BATCH, rows=ROWS, seed=SEEDS)
@example(batch=1, rows=1, seed=0)
def test_sums_of_int8_values_are_numpys_integers(run_kernel, tiled_target, columns, batch, rows, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-1, 2, (batch, rows, 13)).astype(np.int8)
    values = rng.integers(-128, 128, (batch, 13, columns)).astype(np.int8)
    kernel, output = (
        Kernel("matadd", MatAddDescription(13, columns, "int8")),
        ((batch, rows, columns), "int32"),
    )
    y = run_kernel(kernel, tiled_target, [codes, values], output)
    np.testing.assert_array_equal(y, codes.astype(np.int64) @ values)


def test_sums_of_the_largest_int8_values_do_not_saturate(run_kernel, tiled_target):
    codes, values = np.ones((1, 4, 999), np.int8), np.full((1, 999, 16), -128, np.int8)
    codes[0, 1], codes[0, 2, ::2] = -1, 0
    y = run_kernel(
        Kernel("matadd", MatAddDescription(999, 16, "int8")),
        tiled_target,
        [codes, values],
        ((1, 4, 16), "int32"),
    )
    np.testing.assert_array_equal(y, codes.astype(np.int64) @ values)


@COLUMNS
@settings(max_examples=8)
@given(batch=BATCH, rows=ROWS, seed=SEEDS)
@example(batch=1, rows=1, seed=0)
def test_sums_of_float_values_are_numpys_product(run_kernel, tiled_target, columns, batch, rows, seed):
    rng = np.random.default_rng(seed)
    codes = rng.integers(-1, 2, (batch, rows, 13)).astype(np.float32)
    values = rng.normal(size=(batch, 13, columns)).astype(np.float32)
    kernel, output = Kernel("matadd", MatAddDescription(13, columns)), ((batch, rows, columns), "float32")
    y = run_kernel(kernel, tiled_target, [codes, values], output)
    np.testing.assert_allclose(y, codes.astype(np.float64) @ values, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("length", [32, 75])
@settings(max_examples=8)
@given(batch=BATCH, rows=ROWS, others=st.integers(1, 40), seed=SEEDS)
@example(batch=1, rows=1, others=1, seed=0)
def test_hamming_products_are_numpys_integers(run_kernel, tiled_target, length, batch, rows, others, seed):
    rng = np.random.default_rng(seed)
    queries, keys = rng.choice([-1, 1], (batch, rows, length)), rng.choice([-1, 1], (batch, others, length))
    bits = [
        np.packbits(np.pad(codes == 1, ((0, 0), (0, 0), (0, -length % 32))), axis=-1, bitorder="little")
        for codes in (queries, keys)
    ]
    words = [part.view("<u4") for part in bits]
    arrays = [words[0], words[1].swapaxes(1, 2)]
    output = (batch, rows, others), "int32"
    y = run_kernel(Kernel("hamming_product", HammingProductDescription(length)), tiled_target, arrays, output)
    np.testing.assert_array_equal(y, queries @ keys.swapaxes(1, 2))


@pytest.mark.parametrize("channels", [16, 75])
@pytest.mark.parametrize("sample", [False, True], ids=["zero", "sample"])
@settings(max_examples=8)
@given(batch=BATCH, rows=ROWS, seed=SEEDS)
def test_codes_and_bits_are_numpys(run_kernel, tiled_target, channels, sample, batch, rows, seed):
    x = np.random.default_rng(seed).normal(size=(batch, rows, channels)).astype(np.float32)
    limit = x.mean(axis=(1, 2), keepdims=True, dtype=np.float64) if sample else 0
    kernel = Kernel("binarize", BinarizeDescription(channels, sample, -1, 1))
    codes = run_kernel(kernel, tiled_target, [x], (x.shape, "float32"))
    # NumPy's mean in float64 is another than ours in the last bits: so near to it, either code is right.
    clear = np.abs(x - limit) > 1e-6 if sample else np.ones_like(x, bool)
    above = np.where(clear, x > limit, codes > 0)
    np.testing.assert_array_equal(codes, np.where(above, 1, -1))
    words = -(-channels // 32)
    kernel = Kernel("binarize", BinarizeDescription(channels, sample, packed=True))
    packed = run_kernel(kernel, tiled_target, [x], ((batch, rows, words), "uint32"))
    bits = np.pad(above, ((0, 0), (0, 0), (0, -channels % 32)))
    np.testing.assert_array_equal(packed, np.packbits(bits, axis=-1, bitorder="little").view("<u4"))


# Less than a vector, two of them, and three passes over a row.
@pytest.mark.parametrize("size", [8, 32, 1024])
def test_sums_and_differences_are_scipys(run_kernel, tiled_target, size):
    x = np.random.default_rng(0).normal(size=(21, size)).astype(np.float32)
    y = run_kernel(Kernel("hadamard", HadamardDescription(size)), tiled_target, [x], (x.shape, "float32"))
    np.testing.assert_allclose(y, x.astype(np.float64) @ hadamard(size), rtol=1e-5, atol=1e-4)
