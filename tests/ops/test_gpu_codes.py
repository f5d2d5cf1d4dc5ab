"""Ops on codes, and depthwise convolutions, by GPU kernels: the same as by XLA. Needs a GPU."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftaddvit_jax.ops import (
    binarize,
    depthwise_conv_1d,
    depthwise_conv_2d,
    depthwise_conv_gelu,
    hadamard,
    hamming_product,
    matadd,
    pack_codes,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="JAX finds no NVIDIA GPU here"),
]


def assert_same(function, *arrays):
    """``function(*arrays, implementation)`` is the same on TVM's kernels as on XLA."""
    with jax.default_matmul_precision("highest"):  # XLA's own products would be of TensorFloat-32 numbers
        y, expected = (
            jax.jit(lambda *arrays, chosen=chosen: function(*arrays, chosen))(*arrays)
            for chosen in ("tvm", "xla")
        )
    assert y.dtype == expected.dtype
    if jnp.issubdtype(y.dtype, jnp.integer):
        np.testing.assert_array_equal(y, expected)
    else:
        atol = 1e-5 * float(jnp.abs(expected).max())
        np.testing.assert_allclose(y, expected, rtol=1e-5, atol=atol)


def normal(*shape):
    return jax.random.normal(jax.random.key(0), shape)


@pytest.mark.parametrize("shape", [(2, 32, 3136, 32), (2, 784, 32, 32), (3, 5, 13, 3)])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_matadd(shape, dtype):
    batch, rows, inner, columns = shape
    codes = jax.random.randint(jax.random.key(1), (batch, rows, inner), -1, 2).astype(dtype)
    values = (30 * normal(batch, inner, columns)).astype(dtype)
    assert_same(matadd, codes, values)


@pytest.mark.parametrize("length", [32, 75, 256, 700])  # the last two by tensor cores
def test_hamming_products(length):
    queries, keys = (pack_codes(normal(2, tokens, length), "zero", "xla") for tokens in (196, 70))
    assert_same(lambda q, k, chosen: hamming_product(q, k, length, chosen), queries, keys)


@pytest.mark.parametrize("shape", [(2, 784, 32), (3, 7, 75)])
@pytest.mark.parametrize("threshold", ["zero", "sample"])
def test_codes_and_bits(shape, threshold):
    x = normal(*shape)
    assert_same(lambda x, chosen: binarize(x, threshold, (-1, 1), chosen), x)
    assert_same(lambda x, chosen: pack_codes(x, threshold, chosen), x)


@pytest.mark.parametrize("shape", [(2, 196, 64), (3, 7, 320), (5, 8192)])
def test_hadamard(shape):
    assert_same(hadamard, normal(*shape))


@pytest.mark.parametrize(("grid", "channels"), [((56, 56), 256), ((5, 7), 13)])
def test_depthwise_convolutions(grid, channels):
    x, kernel, bias = normal(2, *grid, channels), normal(3, 3, channels), normal(channels)
    assert_same(depthwise_conv_2d, x, kernel)
    assert_same(depthwise_conv_gelu, x, kernel, bias)
    assert_same(depthwise_conv_1d, x[:, 0], normal(9, channels))
