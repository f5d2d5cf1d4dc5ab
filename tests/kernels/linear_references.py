"""What linear layers compute, in NumPy, and the parameters that their kernels take."""

import ml_dtypes
import numpy as np
from scipy.special import expit

from kernels_tvm.descriptions import LinearDescription
from kernels_tvm.packing import write_numbers
from shiftaddvit_jax.ops import pack_weight


def powers(rng, inputs, outputs, octaves):
    """Zeros and signed powers of two, each output's within some octaves of its own."""
    exponent = rng.integers(-16, 3, outputs) + rng.integers(0, octaves, (inputs, outputs))
    return (rng.choice([-1, 0, 1], (inputs, outputs), p=[0.4, 0.2, 0.4]) * 2.0**exponent).astype(np.float32)


def padded(vector):
    return np.pad(vector, (0, -len(vector) % 16)).astype(np.float32)


def packed(weight, bits, bias=None):
    """A shift layer's parameters, as kernels take them."""
    bias = np.zeros(weight.shape[1]) if bias is None else bias
    return [*(np.asarray(part) for part in pack_weight(weight, bits)), padded(bias)]


def blocks(kernel):
    """A dense layer's weight, as kernels take it."""
    whole = np.pad(kernel, ((0, 0), (0, -kernel.shape[1] % 16)))
    return np.stack(np.split(whole, whole.shape[1] // 16, axis=1))


def dense_parameters(rng, inputs, outputs):
    kernel = rng.normal(0, 0.3, (inputs, outputs)).astype(np.float32)
    bias = rng.normal(size=outputs).astype(np.float32)
    return kernel, bias, [blocks(kernel), padded(bias)]


def in_bfloat16(kernel, bias):
    """Dense parameters, as kernels take them, rounded to bfloat16: the bits of such numbers."""
    return [kernel.astype(ml_dtypes.bfloat16).view(np.uint16), bias]


def nearest_bfloat16(x):
    return x.astype(ml_dtypes.bfloat16).astype(np.float64)


def whole_tokens(rng, rows, inputs):
    """Whole numbers, some of each row 127 or -127: int8 holds them as they are."""
    x = rng.integers(-127, 128, (rows, inputs))
    x[np.arange(rows), rng.integers(0, inputs, rows)] = rng.choice([-127, 127], rows)
    return x.astype(np.float32)


def quantized(x):
    """Whole numbers and scales in float32, as `dynamic_int8` says."""
    largest = np.abs(x).max(axis=1, keepdims=True)
    inverse = np.float32(127) / np.where(largest > 0, largest, np.float32(1))
    scale = np.where(largest > 0, largest * np.float32(1 / 127), np.float32(1))
    return np.rint(x * inverse).astype(np.int64), scale


def is_clear(x):
    """By row, whether all numbers become the same whole ones if a product is not rounded to float32 first.

    A kernel may round it, or not.
    """
    inverse = np.float32(127) / np.maximum(np.abs(x).max(axis=1, keepdims=True), np.float32(1e-30))
    return np.all(np.rint(x * inverse) == np.rint(x.astype(np.float64) * inverse), axis=1)


def int8_product(x, weight):
    """Sums of whole numbers, and only then one float32 product with the scales."""
    whole, scale = quantized(x)
    exponent = np.frexp(np.abs(weight).max(axis=0))[1] - 7.0
    numbers = (weight / 2.0**exponent).astype(np.int64)
    assert np.all(numbers * 2.0**exponent == weight)
    return (whole @ numbers).astype(np.float32) * (np.float32(2.0**exponent) * scale)


def lost_products(target, magnitudes):
    """What AMX loses of products of float32 numbers, by sums of their ``magnitudes``."""
    return 3 * 2**-18 * magnitudes if target.dot == "amx" else 0


def assert_near(y, expected, lost=0):
    tolerance = 1e-5 * np.abs(expected).max() + lost
    assert np.isclose(y, expected, rtol=1e-5, atol=tolerance).all(), np.abs(y - expected).max()


def mixture(rng, inputs, outputs, activations, router_bias, precision="float32"):
    """The parameters of a mixture of experts, and the function that NumPy computes with them."""
    router = rng.normal(size=(inputs, 2)).astype(np.float32)
    kernel, bias, dense = dense_parameters(rng, inputs, outputs)
    nearest = np.float64
    if precision == "bfloat16":
        nearest, dense = nearest_bfloat16, in_bfloat16(*dense)
    shift_bias = rng.normal(size=outputs).astype(np.float32)
    bits = 4 if activations == "int8" else 5
    weight = powers(rng, inputs, outputs, 7) / 2**8

    def reference(x):
        logit = x.astype(np.float64) @ (router[:, 0] - router[:, 1]) + (router_bias[0] - router_bias[1])
        shift = int8_product(x, weight) if activations == "int8" else x.astype(np.float64) @ weight
        chosen = np.where(logit[:, None] >= 0, nearest(x) @ nearest(kernel) + bias, shift + shift_bias)
        return expit(np.abs(logit))[:, None] * chosen

    parameters = [router, np.float32(router_bias), *dense, *packed(weight, bits, shift_bias)]
    return (
        LinearDescription("moe", inputs, outputs, bits, activations, precision=precision),
        parameters,
        reference,
    )


def sums_of_two_powers():
    """Every number +-2^a +- 2^b with exponents from 0 to 6 that int8 holds, and 0."""
    powers = [sign << exponent if sign > 0 else -(1 << exponent) for sign in (-1, 1) for exponent in range(7)]
    numbers = {0} | {a + b for a in powers for b in powers}
    return np.array(sorted(number for number in numbers if abs(number) <= 127), np.int8)


def two_powers(rng, inputs, outputs, bias=None):
    """The parameters of a shift layer with two powers of two a weight, its numbers, and its scales."""
    numbers = rng.choice(sums_of_two_powers(), (inputs, outputs))
    exponent = rng.integers(-16, 3, outputs)
    bias = np.zeros(outputs) if bias is None else bias
    parameters = [write_numbers(numbers), padded(exponent).astype(np.int8), padded(bias)]
    return parameters, numbers, np.float32(2.0) ** exponent.astype(np.float32)


def dense_int8(rng, inputs, outputs, bias=None):
    """The parameters of a dense layer in int8, its numbers, and its scales."""
    numbers = rng.integers(-127, 128, (inputs, outputs)).astype(np.int8)
    scale = rng.uniform(1e-4, 1e-2, outputs).astype(np.float32)
    bias = np.zeros(outputs) if bias is None else bias
    return [write_numbers(numbers), padded(scale), padded(bias)], numbers, scale


def whole_product(x, numbers, scale):
    """int32 sums of the rows' whole numbers with those of the weights, and only then float32 scales."""
    whole, row_scale = quantized(x)
    sums = whole.astype(np.int32) @ numbers.astype(np.int32)
    return sums.astype(np.float32) * (scale * row_scale)


def mixture_of_whole_numbers(rng, inputs, outputs, bits, activations, precision):
    """`mixture` with two powers of two a weight (8 bits), a dense expert in int8, or both."""
    router, router_bias = rng.normal(size=(inputs, 2)).astype(np.float32), np.float32([0.3, -0.2])
    dense_bias, shift_bias = rng.normal(size=(2, outputs))
    if precision == "int8":
        dense, dense_numbers, dense_scale = dense_int8(rng, inputs, outputs, dense_bias)
    else:
        kernel, dense_bias, dense = dense_parameters(rng, inputs, outputs)
    if bits == 8:
        shift, shift_numbers, shift_scale = two_powers(rng, inputs, outputs, shift_bias)
        weight = shift_numbers * shift_scale.astype(np.float64)
    else:
        weight = powers(rng, inputs, outputs, 7) / 2**8
        shift = packed(weight, bits, shift_bias)

    def reference(x):
        wide = x.astype(np.float64)
        logit = wide @ (router[:, 0] - router[:, 1]) + (router_bias[0] - router_bias[1])
        by_dense = (
            whole_product(x, dense_numbers, dense_scale) if precision == "int8" else wide @ kernel
        ) + dense_bias
        if activations == "float":
            by_shift = wide @ weight
        elif bits == 8:
            by_shift = whole_product(x, shift_numbers, shift_scale)
        else:
            by_shift = int8_product(x, weight)
        return expit(np.abs(logit))[:, None] * np.where(logit[:, None] >= 0, by_dense, by_shift + shift_bias)

    linear = LinearDescription("moe", inputs, outputs, bits, activations, precision=precision)
    return linear, [router, router_bias, *dense, *shift], reference
