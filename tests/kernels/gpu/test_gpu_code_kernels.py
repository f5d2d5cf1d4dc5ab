import numpy as np
import pytest
from linear_references import assert_near
from scipy.linalg import hadamard

from kernels_tvm.descriptions import (
    BinarizeDescription,
    HadamardDescription,
    HammingProductDescription,
    MatAddDescription,
)
from kernels_tvm.hadamard import conference_matrix
from kernels_tvm.store import Kernel


def packed_bits(codes):
    """Codes of -1 and 1 as bits, 32 in a word."""
    padded = np.pad(codes == 1, [(0, 0)] * (codes.ndim - 1) + [(0, -codes.shape[-1] % 32)])
    return np.packbits(padded, axis=-1, bitorder="little").view("<u4")


# Batch, rows, inner size, columns: a context k^T v and an output q (k^T v) of PVTv2-B0, and odd ones.
@pytest.mark.parametrize(
    "shape", [(1, 32, 3136, 32), (2, 784, 32, 32), (2, 33, 301, 70), (3, 5, 13, 3), (1, 1, 1, 1)]
)
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_matadd_is_numpys_product(run_blocks, shape, dtype):
    rng = np.random.default_rng(0)
    batch, rows, inner, columns = shape
    codes = rng.integers(-1, 2, (batch, rows, inner)).astype(dtype)
    values = rng.normal(size=(batch, inner, columns)).astype(np.float32)
    if dtype == "int8":
        values = rng.integers(-128, 128, values.shape).astype(np.int8)
    kernel = Kernel("matadd", MatAddDescription(inner, columns, dtype))
    sums = "int32" if dtype == "int8" else "float32"
    y = run_blocks(kernel, [codes, values], ((batch, rows, columns), sums))
    expected = codes.astype(np.float64) @ values
    (np.testing.assert_array_equal if dtype == "int8" else assert_near)(y, expected)


def test_a_code_of_zero_leaves_out_values_that_are_no_numbers(run_blocks):
    codes = np.array([[[0, 1, 0, 0]]], np.float32)
    values = np.array([np.nan, 2, np.inf, -np.inf], np.float32).reshape(1, 4, 1)
    y = run_blocks(Kernel("matadd", MatAddDescription(4, 1)), [codes, values], ((1, 1, 1), "float32"))
    assert y == 2


# Codes of 32 bits are those of PVTv2's heads; from 128 on tensor cores take over.
@pytest.mark.parametrize(
    ("batch", "rows", "others", "length"),
    [(2, 196, 49, 32), (2, 5, 70, 75), (1, 130, 70, 128), (1, 3, 65, 700), (1, 1, 1, 1)],
)
def test_hamming_products_are_numpys_integers(run_blocks, batch, rows, others, length):
    rng = np.random.default_rng(0)
    queries, keys = rng.choice([-1, 1], (batch, rows, length)), rng.choice([-1, 1], (batch, others, length))
    arrays = [packed_bits(queries), packed_bits(keys).swapaxes(1, 2)]
    y = run_blocks(
        Kernel("hamming_product", HammingProductDescription(length)), arrays, ((batch, rows, others), "int32")
    )
    np.testing.assert_array_equal(y, queries @ keys.swapaxes(1, 2))


@pytest.mark.parametrize("shape", [(2, 784, 32), (3, 7, 75)])
@pytest.mark.parametrize("sample", [False, True], ids=["zero", "sample"])
def test_codes_and_bits_are_numpys(run_blocks, shape, sample):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    limit = x.mean(axis=(1, 2), keepdims=True, dtype=np.float64) if sample else 0
    assert np.abs(x - limit).min() > 1e-6  # so that no rounding of the mean matters
    codes = run_blocks(
        Kernel("binarize", BinarizeDescription(shape[-1], sample, -1, 1)), [x], (shape, "float32")
    )
    np.testing.assert_array_equal(codes, np.where(x > limit, 1, -1))
    bits = packed_bits(np.where(x > limit, 1, -1))
    kernel = Kernel("binarize", BinarizeDescription(shape[-1], sample, packed=True))
    np.testing.assert_array_equal(run_blocks(kernel, [x], (bits.shape, "uint32")), bits)


# Rows that share a block, one that has more numbers than its threads, and 20 parts.
@pytest.mark.parametrize("shape", [(70, 64), (3, 2048), (9, 320)])
def test_sums_and_differences_are_numpys(run_blocks, shape):
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    y = run_blocks(Kernel("hadamard", HadamardDescription(shape[1])), [x], (shape, "float32"))
    matrix = hadamard(shape[1]) if shape[1] != 320 else np.kron(paley(20), hadamard(16))
    np.testing.assert_allclose(y, x.astype(np.float64) @ matrix, rtol=1e-5, atol=2e-4)


def paley(order):
    codes, identity = conference_matrix(order).astype(int), np.eye(order // 2)
    return np.block([[codes + identity, codes - identity], [codes - identity, -codes - identity]])


@pytest.mark.parametrize(
    ("kernel", "arguments", "output"),
    [
        (Kernel("matadd", MatAddDescription(200, 4)), [(0, 3, 200), (0, 200, 4)], (0, 3, 4)),
        (Kernel("hadamard", HadamardDescription(8)), [(0, 8)], (0, 8)),
        (Kernel("binarize", BinarizeDescription(8, True)), [(0, 3, 8)], (0, 3, 8)),
    ],
)
def test_an_empty_batch_launches_nothing(run_blocks, kernel, arguments, output):
    arrays = [np.zeros(shape, np.float32) for shape in arguments]
    assert run_blocks(kernel, arrays, (output, "float32")).shape == output
