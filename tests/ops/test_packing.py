import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftaddvit_jax.ops import pack_weight, packed_product, two_powers_of_two, unpack_weight
from shiftaddvit_jax.ops.int8 import block_int8, packed_int8_product, unblock_int8
from shiftaddvit_jax.ops.packing import round_to_octaves

SIZES = pytest.mark.parametrize(
    ("inputs", "outputs"), [(1, 1), (4, 16), (5, 17), (3, 40), (50, 15), (130, 33)], ids=str
)
BITS = pytest.mark.parametrize("bits", [4, 5])
OCTAVES = {4: 7, 5: 15}


def powers(inputs, outputs, octaves, seed=0):
    """Zeros and signed powers of two, each output's within some octaves of its own."""
    rng = np.random.default_rng(seed)
    exponent = rng.integers(-20, 3, outputs) + rng.integers(0, octaves, (inputs, outputs))
    return (rng.choice([-1, 0, 1], (inputs, outputs)) * 2.0**exponent).astype(np.float32)


def decode(packed, inputs, outputs):
    """The weight that the bytes stand for, one after the other, as `kernels_tvm.packing` describes them."""
    codes, exponent = (np.asarray(part) for part in packed)
    bits = {32: 4, 40: 5}[codes.shape[-1]]
    weight = np.zeros((inputs, outputs))
    for k, n in np.ndindex(inputs, outputs):
        tile = [int(byte) for byte in codes[n // 16, k // 4]]
        number = 4 * (n % 16) + k % 4
        half = tile[number] % 16 if number < 32 else tile[number - 32] // 16
        if bits == 4:
            code, negative = half % 8, half >= 8
        else:
            code, negative = half, tile[32 + number // 8] >> number % 8 & 1
        if code:
            weight[k, n] = (-1) ** negative * 2.0 ** (code - 1 + int(exponent[n]))
    return weight


def octaves(weight, count):
    """What ``count`` octaves hold of each output: half of the smallest goes up, what is below becomes 0."""
    smallest = np.abs(weight).max(axis=0) / 2 ** (count - 1)
    magnitude = np.maximum(np.abs(weight), smallest)
    return np.where(np.abs(weight) >= smallest / 2, np.sign(weight) * magnitude, 0)


@BITS
@SIZES
def test_the_bytes_are_those_that_are_described(bits, inputs, outputs):
    weight = powers(inputs, outputs, OCTAVES[bits])
    packed = pack_weight(weight, bits)
    assert packed.bits == bits
    assert packed.codes.dtype == jnp.uint8
    assert packed.exponent.dtype == jnp.int8
    assert packed.codes.shape == (-(-outputs // 16), -(-inputs // 4), {4: 32, 5: 40}[bits])
    assert packed.exponent.shape == (-(-outputs // 16) * 16,)
    np.testing.assert_array_equal(decode(packed, inputs, outputs), weight)


@BITS
@SIZES
def test_weights_within_the_octaves_come_back_as_they_were(bits, inputs, outputs):
    weight = powers(inputs, outputs, OCTAVES[bits])
    unpacked = unpack_weight(pack_weight(weight, bits), inputs, outputs)
    assert unpacked.dtype == jnp.float32
    np.testing.assert_array_equal(unpacked, weight)


@BITS
def test_weights_of_more_octaves_are_rounded_by_the_rule(bits):
    weight = powers(67, 35, octaves=22)
    packed = pack_weight(weight, bits)
    expected = octaves(weight, OCTAVES[bits])
    assert np.any(expected != weight)
    np.testing.assert_array_equal(unpack_weight(packed, 67, 35), expected)
    np.testing.assert_array_equal(decode(packed, 67, 35), expected)


@BITS
def test_half_of_the_smallest_goes_up_and_a_quarter_becomes_zero(bits):
    smallest = 2.0 ** -(OCTAVES[bits] - 1)
    weight = np.float32([[1], [smallest], [-smallest / 2], [smallest / 4], [-smallest / 8], [0]])
    expected = [[1], [smallest], [-smallest], [0], [0], [0]]
    np.testing.assert_array_equal(unpack_weight(pack_weight(weight, bits), 6, 1), expected)


@BITS
def test_an_output_of_zeros_stays_zeros_beside_others(bits):
    weight = powers(9, 5, octaves=7)
    weight[:, [0, 3]] = 0
    np.testing.assert_array_equal(unpack_weight(pack_weight(weight, bits), 9, 5), weight)
    np.testing.assert_array_equal(decode(pack_weight(weight, bits), 9, 5), weight)


@BITS
def test_what_pads_the_tiles_is_zero(bits):
    weight = powers(5, 17, octaves=7)
    weight[weight == 0] = 1
    padded = np.zeros((8, 32))
    padded[:5, :17] = octaves(weight, OCTAVES[bits])
    np.testing.assert_array_equal(decode(pack_weight(weight, bits), 8, 32), padded)


@pytest.mark.parametrize("bits", [3, 6])
def test_other_numbers_of_bits_are_an_error(bits):
    with pytest.raises(ValueError, match=f"bits must be 4, 5 or 8, got {bits}"):
        pack_weight(np.ones((4, 4), np.float32), bits)


@SIZES
def test_two_powers_in_eight_bits_are_the_bytes_that_are_described(inputs, outputs):
    weight = two_powers_of_two(np.random.default_rng(2).normal(size=(inputs, outputs)).astype(np.float32))
    packed = pack_weight(weight, 8)
    codes, exponent = (np.asarray(part) for part in packed)
    assert packed.bits == 8
    assert codes.dtype == exponent.dtype == np.int8
    assert codes.shape == (-(-outputs // 16), -(-inputs // 4), 64)
    expected = [
        codes[n // 16, k // 4, 4 * (n % 16) + k % 4] * 2.0 ** exponent[n]
        for k, n in np.ndindex(inputs, outputs)
    ]
    np.testing.assert_array_equal(np.reshape(expected, (inputs, outputs)), weight)


@SIZES
def test_two_powers_come_back_as_they_were(inputs, outputs):
    weight = two_powers_of_two(np.random.default_rng(3).normal(size=(inputs, outputs)).astype(np.float32))
    for xp in (np, jnp):
        unpacked = unpack_weight(pack_weight(np.asarray(weight), 8, xp), inputs, outputs, xp)
        np.testing.assert_array_equal(unpacked, weight)


@SIZES
def test_dense_weights_in_int8_are_numpys_nearest_of_each_output(inputs, outputs):
    weight = np.random.default_rng(4).standard_t(5, (inputs, outputs)).astype(np.float32)
    weight[:, 0] = 0
    tiles, scale = block_int8(weight)
    expected_scale = np.where(weight.any(axis=0), np.abs(weight.astype(np.float64)).max(axis=0) / 127, 1)
    np.testing.assert_allclose(scale[:outputs], expected_scale, rtol=2**-15)
    rounded = unblock_int8(tiles, scale, inputs, outputs)
    assert np.all(np.abs(rounded - weight) <= 0.504 * expected_scale)
    for again, first in zip(block_int8(rounded), (tiles, scale), strict=True):
        np.testing.assert_array_equal(again, first)


@pytest.mark.parametrize("implementation", ["xla", "tvm", None])
@SIZES
def test_packed_products_in_int8_are_exact_sums_of_whole_numbers(inputs, outputs, implementation):
    rng = np.random.default_rng(5)
    weight, x = (rng.normal(size=shape).astype(np.float32) for shape in ((inputs, outputs), (2, 3, inputs)))
    tiles, scale = block_int8(weight)
    row = np.abs(x).max(axis=-1, keepdims=True) * np.float32(1 / 127)
    whole = np.clip(np.round(x * (127 / np.abs(x).max(axis=-1, keepdims=True))), -127, 127)
    numbers = np.asarray(unblock_int8(tiles, np.ones_like(scale), inputs, outputs))
    sums = (whole.astype(np.int32) @ numbers.astype(np.int32)).astype(np.float32)
    y = jax.jit(packed_int8_product, static_argnums=(3, 4))(x, tiles, scale, outputs, implementation)
    np.testing.assert_allclose(y, sums * (np.asarray(scale)[:outputs] * row), rtol=3e-7)


def test_rounding_to_octaves_is_what_four_bits_hold_with_a_straight_through_gradient():
    weight, cotangent = powers(20, 6, octaves=12), np.float32(np.random.default_rng(1).normal(size=(20, 6)))
    rounded, pull_back = jax.vjp(round_to_octaves, weight)
    np.testing.assert_array_equal(rounded, octaves(weight, 7))
    np.testing.assert_array_equal(pull_back(jnp.asarray(cotangent))[0], cotangent)


@pytest.mark.parametrize(("bits", "activations"), [(5, "float"), (4, "float"), (4, "int8")])
@pytest.mark.parametrize("leading", [(), (3,), (2, 5), (0,)], ids=str)
def test_a_packed_product_is_that_of_the_weight(implementation, leading, bits, activations):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(*leading, 7)).astype(np.float32), powers(7, 5, OCTAVES[bits])
    y = packed_product(x, pack_weight(weight, bits), 5, activations, implementation)
    assert y.shape == (*leading, 5)
    if activations == "int8":
        scale = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64) / 127
        x = np.round(x / scale) * scale
    np.testing.assert_allclose(y, x.astype(np.float64) @ weight, rtol=1e-5, atol=1e-5)


def test_the_gradient_of_a_packed_product_reaches_the_tokens(implementation):
    x, weight = np.float32(np.random.default_rng(0).normal(size=(3, 7))), powers(7, 5, 15)
    cotangent = np.float32(np.random.default_rng(1).normal(size=(3, 5)))
    packed = pack_weight(weight, 5)
    loss = lambda x: jnp.vdot(packed_product(x, packed, 5, "float", implementation), cotangent)  # noqa: E731
    np.testing.assert_allclose(jax.grad(loss)(x), cotangent @ weight.T, rtol=1e-5, atol=1e-6)
