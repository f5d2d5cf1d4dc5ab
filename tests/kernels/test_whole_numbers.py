"""Weights that are whole numbers of 8 bits: sums and differences of two powers of two, and dense int8."""

import dataclasses

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from linear_references import (
    assert_near,
    dense_int8,
    is_clear,
    mixture_of_whole_numbers,
    packed,
    padded,
    powers,
    sums_of_two_powers,
    two_powers,
    whole_product,
    whole_tokens,
)
from numpy.lib.stride_tricks import sliding_window_view
from scipy.special import ndtr, softmax

from kernels_tvm.descriptions import (
    HeadDescription,
    LinearDescription,
    MlpDescription,
    PatchEmbedDescription,
    SoftmaxAttentionDescription,
)
from kernels_tvm.packing import read_numbers, write_numbers
from kernels_tvm.store import Kernel

SIZES = pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (67, 150)])
ROWS = st.integers(1, 200)
SEEDS = st.integers(0, 2**16)
KINDS = {
    "two powers": (two_powers, ("shift", 8, "int8", False)),
    "two shifts": (two_powers, ("shift", 8, "int8", True)),
    "dense": (dense_int8, ("dense", 5, "float", False, "int8")),
}
EVERY_KIND = pytest.mark.parametrize(("draw", "settings_"), KINDS.values(), ids=KINDS)


def described(settings_, inputs, outputs):
    kind, *rest = settings_
    return LinearDescription(kind, inputs, outputs, *rest)


def run(run_kernel, target, linear, x, parameters, **keywords):
    output = (len(x), linear.outputs), "float32"
    return run_kernel(Kernel("linear", linear), target, [x, *parameters], output, **keywords)


@EVERY_KIND
@SIZES
@settings(max_examples=8)
@given(rows=ROWS, seed=SEEDS, magnitude=st.sampled_from([1e-20, 1, 1e20]))
@example(rows=1, seed=0, magnitude=1)
@example(rows=1100, seed=0, magnitude=1)
def test_layers_are_numpys_int32_sums_times_their_scales(
    run_kernel, target, draw, settings_, inputs, outputs, rows, seed, magnitude
):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, magnitude, (rows, inputs)).astype(np.float32)
    x[rng.random(rows) < 0.1] = 0
    parameters, numbers, scale = draw(rng, inputs, outputs)
    y = run(run_kernel, target, described(settings_, inputs, outputs), x, parameters)
    clear = is_clear(x)
    np.testing.assert_array_equal(y[clear], whole_product(x, numbers, scale)[clear])


@SIZES
@settings(max_examples=8)
@given(rows=ROWS, seed=SEEDS)
@example(rows=1, seed=0)
@example(rows=1100, seed=0)
def test_two_powers_of_float_rows_are_numpys_product(run_kernel, tiled_target, inputs, outputs, rows, seed):
    rng = np.random.default_rng(seed)
    x, bias = rng.normal(size=(rows, inputs)).astype(np.float32), rng.normal(size=outputs)
    parameters, numbers, scale = two_powers(rng, inputs, outputs, bias)
    y = run(run_kernel, tiled_target, LinearDescription("shift", inputs, outputs, 8), x, parameters)
    assert_near(y, x.astype(np.float64) @ (numbers * scale.astype(np.float64)) + bias)


@EVERY_KIND
def test_the_largest_sums_are_exact(run_kernel, target, draw, settings_):
    largest, inputs = (127 if draw is dense_int8 else 96), 1000
    signs = np.random.default_rng(0).choice([-1, 1], (inputs, 16))
    numbers = np.full((inputs, 16), largest, np.int8)
    numbers[:, 0], numbers[:, 1] = largest * signs[:, 0], -largest
    x = np.full((3, inputs), 127, np.float32)
    x[1], x[2] = -127, 127 * signs[:, 0]
    scale = np.ones(16, np.float32) if draw is dense_int8 else np.zeros(16, np.int8)
    parameters = [write_numbers(numbers), scale, np.zeros(16, np.float32)]
    y = run(run_kernel, target, described(settings_, inputs, 16), x, parameters)
    # 127 * 127 * inputs < 2^24: float32 holds every sum as it is.
    np.testing.assert_array_equal(y, x.astype(np.int32) @ numbers.astype(np.int32))


@pytest.mark.parametrize("shifts", [False, True], ids=["products", "shifts"])
def test_every_sum_of_two_powers_is_itself(run_kernel, target, shifts):
    numbers = sums_of_two_powers()[None]
    linear = LinearDescription("shift", 1, numbers.size, 8, "int8", shifts)
    parameters = [write_numbers(numbers), padded(np.zeros(numbers.size)).astype(np.int8)]
    x = np.float32([[127], [-127]])
    y = run(run_kernel, target, linear, x, [*parameters, padded(np.zeros(numbers.size))])
    np.testing.assert_array_equal(y, x @ numbers)


@EVERY_KIND
def test_a_bias_is_added_once(run_kernel, target, draw, settings_):
    rng = np.random.default_rng(0)
    x, bias = whole_tokens(rng, 5, 20), rng.normal(size=19).astype(np.float32)
    parameters, numbers, scale = draw(rng, 20, 19, bias)
    y = run(run_kernel, target, described(settings_, 20, 19), x, parameters)
    assert_near(y, whole_product(x, numbers, scale) + bias)


@pytest.mark.parametrize(
    ("bits", "activations", "precision"),
    [(8, "int8", "int8"), (4, "int8", "int8"), (5, "float", "int8"), (8, "float", "float32")],
)
@pytest.mark.parametrize("rows", [1, 40, 1100])
def test_mixtures_compute_each_row_with_its_expert(run_kernel, target, bits, activations, precision, rows):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 67)).astype(np.float32)
    linear, parameters, reference = mixture_of_whole_numbers(rng, 67, 150, bits, activations, precision)
    clear = is_clear(x)
    assert_near(run(run_kernel, target, linear, x, parameters)[clear], reference(x)[clear])


@EVERY_KIND
@pytest.mark.parametrize("rows", [1, 40, 1100])
def test_any_number_of_threads_computes_the_same(run_kernel, target, draw, settings_, rows):
    rng = np.random.default_rng(0)
    x, (parameters, _, _) = rng.normal(size=(rows, 67)).astype(np.float32), draw(rng, 67, 150)
    linear = described(settings_, 67, 150)
    y = run(run_kernel, target, linear, x, parameters, threads=5)
    np.testing.assert_array_equal(y, run(run_kernel, target, linear, x, parameters))


@pytest.mark.parametrize("bits", [4, 8])
def test_shifts_of_signed_rows_are_numpys_product(run_kernel, target, bits):
    # Rows of ARM's dot product have no offset. Its shifts need none of its instructions.
    signed = dataclasses.replace(target, dot="sdot_128")
    rng = np.random.default_rng(0)
    x = whole_tokens(rng, 9, 67)
    if bits == 8:
        parameters, numbers, scale = two_powers(rng, 67, 150)
        weight = numbers * scale
    else:
        weight = powers(rng, 67, 150, octaves=7)
        parameters = packed(weight, 4)
    y = run(run_kernel, signed, LinearDescription("shift", 67, 150, bits, "int8", True), x, parameters)
    np.testing.assert_array_equal(y, x.astype(np.float64) @ weight)


def test_numbers_are_read_as_they_were_written():
    numbers = np.random.default_rng(0).integers(-127, 128, (67, 150)).astype(np.int8)
    np.testing.assert_array_equal(read_numbers(write_numbers(numbers), 67, 150), numbers)


class Layer:
    """A layer of whole numbers with a bias: its description, its parameters, and NumPy's results."""

    def __init__(self, rng, kind, inputs, outputs):
        draw, settings_ = KINDS[kind]
        self.bias = rng.normal(size=outputs).astype(np.float32)
        self.parameters, self.numbers, scale = draw(rng, inputs, outputs, self.bias)
        # So that results are about as large as inputs.
        self.scale = np.full_like(scale, 2.0**-10)
        self.parameters[1] = (
            padded(np.full(outputs, -10)).astype(np.int8) if kind != "dense" else padded(self.scale)
        )
        self.description = described(settings_, inputs, outputs)

    def __call__(self, x):
        rows = x.reshape(-1, x.shape[-1]).astype(np.float32)
        return (whole_product(rows, self.numbers, self.scale) + self.bias).reshape(*x.shape[:-1], -1)


def normalized(x, scale, shift):
    x = x.astype(np.float64)
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6) * scale + shift


def assert_nearly_all_near(y, expected):
    """A number between two whole ones may be rounded either way, and then changes its row a little."""
    error, size = np.abs(y - expected), np.abs(expected).max()
    assert np.mean(error < 1e-5 * size) > 0.98
    assert error.max() < 0.02 * size


@pytest.mark.parametrize(
    ("grid", "channels"), [((9, 8), 16), ((3, 7), 48), (None, 16)], ids=["strips", "columns", "no grid"]
)
def test_an_mlp_is_its_formula(run_kernel, target, grid, channels):
    rng, (height, width), hidden, images = np.random.default_rng(0), grid or (9, 8), 80, 2
    x = rng.normal(size=(images, height * width, channels)).astype(np.float32)
    norm = rng.normal(size=(2, channels)).astype(np.float32)
    fc1, fc2 = Layer(rng, "two powers", channels, hidden), Layer(rng, "dense", hidden, channels)
    taps, bias = rng.normal(size=(9, hidden)).astype(np.float32), rng.normal(size=hidden).astype(np.float32)
    inner = fc1(normalized(x, *norm))
    if grid:
        image = np.pad(inner.reshape(images, height, width, hidden), ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = sliding_window_view(image, (3, 3), axis=(1, 2))
        inner = np.einsum("bhwcij,ijc->bhwc", windows, taps.reshape(3, 3, hidden)) + bias
        inner = inner.reshape(images, height * width, hidden)
    expected = x + fc2(inner * ndtr(inner))
    mlp = MlpDescription(fc1.description, fc2.description, 1e-6, height * width, grid)
    arrays = [x, *norm, *fc1.parameters, *([taps, bias] if grid else []), *fc2.parameters]
    assert_nearly_all_near(run_kernel(Kernel("mlp", mlp), target, arrays, (x.shape, "float32")), expected)


@pytest.mark.parametrize("kind", ["two powers", "dense"])
def test_softmax_attention_is_its_formula(run_kernel, target, kind):
    rng, images, tokens, channels, heads = np.random.default_rng(0), 2, 35, 48, 3
    x = rng.normal(size=(images, tokens, channels)).astype(np.float32)
    norm = rng.normal(size=(2, channels)).astype(np.float32)
    qkv, proj = Layer(rng, kind, channels, 3 * channels), Layer(rng, kind, channels, channels)
    q, k, v = np.moveaxis(qkv(normalized(x, *norm)).reshape(images, tokens, 3, heads, -1), (2, 3), (0, 2))
    scores = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(channels // heads), axis=-1)
    expected = x + proj((scores @ v).swapaxes(1, 2).reshape(x.shape))
    attention = SoftmaxAttentionDescription(qkv.description, proj.description, heads, tokens, 1e-6)
    arrays = [x, *norm, *qkv.parameters, *proj.parameters]
    y = run_kernel(Kernel("softmax_attention", attention), target, arrays, (x.shape, "float32"))
    assert_nearly_all_near(y, expected)


@pytest.mark.parametrize(
    ("patch", "stride", "epsilon"), [(7, 4, 1e-6), (3, 2, 1e-6), (4, 4, 1e-6), (4, 4, None)]
)
def test_a_patch_embedding_in_int8_is_its_formula(run_kernel, target, patch, stride, epsilon):
    rng, height, width, features = np.random.default_rng(0), 12, 16, 32
    x = rng.normal(size=(2, height, width, 3)).astype(np.float32)
    norm = rng.normal(size=(2, features)).astype(np.float32)
    projection = Layer(rng, "dense", patch * patch * 3, features)
    embed = PatchEmbedDescription(projection.description, height, width, 3, patch, stride, epsilon)
    margin = patch // 2 if patch > stride else 0
    windows = sliding_window_view(
        np.pad(x, ((0, 0), (margin, margin), (margin, margin), (0, 0))), (patch, patch), axis=(1, 2)
    )[:, ::stride, ::stride]
    patches = windows.transpose(0, 1, 2, 4, 5, 3).reshape(2, -1, patch * patch * 3)
    expected, arrays = projection(patches), [x.reshape(2, -1), *projection.parameters]
    if epsilon is not None:
        expected, arrays = normalized(expected, *norm), [*arrays, *norm]
    y = run_kernel(Kernel("patch_embed", embed), target, arrays, (expected.shape, "float32"))
    assert_nearly_all_near(y, expected)


def test_a_head_in_int8_is_its_formula(run_kernel, target):
    rng = np.random.default_rng(0)
    x, norm = rng.normal(1, 2, (3, 13, 48)).astype(np.float32), rng.normal(size=(2, 48)).astype(np.float32)
    projection = Layer(rng, "dense", 48, 19)
    expected = projection(normalized(x, *norm).mean(axis=1))
    head = Kernel("head", HeadDescription(projection.description, 13, 1e-6))
    y = run_kernel(head, target, [x, *norm, *projection.parameters], (expected.shape, "float32"))
    assert_nearly_all_near(y, expected)
