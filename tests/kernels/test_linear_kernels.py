import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from linear_references import (
    assert_near,
    dense_parameters,
    in_bfloat16,
    int8_product,
    is_clear,
    lost_products,
    mixture,
    nearest_bfloat16,
    packed,
    powers,
    whole_tokens,
)

from kernels_tvm.descriptions import HeadDescription, LinearDescription
from kernels_tvm.store import Kernel

SIZES = pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (67, 150)])
SHIFTS = pytest.mark.parametrize("shifts", [False, True], ids=["products", "shifts"])
SEEDS = st.integers(0, 2**16)
ROWS = st.integers(1, 200)


def run(run_kernel, target, linear, x, parameters, **keywords):
    output = (len(x), linear.outputs), "float32"
    return run_kernel(Kernel("linear", linear), target, [x, *parameters], output, **keywords)


@SIZES
@SHIFTS
@settings(max_examples=8)
@given(rows=ROWS, seed=SEEDS)
@example(rows=1, seed=0)
@example(rows=1100, seed=0)
def test_int8_shift_layers_of_whole_tokens_are_numpys_integers(
    run_kernel, target, inputs, outputs, shifts, rows, seed
):
    rng = np.random.default_rng(seed)
    x, weight = whole_tokens(rng, rows, inputs), powers(rng, inputs, outputs, octaves=7)
    linear = LinearDescription("shift", inputs, outputs, 4, "int8", shifts)
    y = run(run_kernel, target, linear, x, packed(weight, 4))
    # 127 * 64 * inputs < 2^24: float32 holds every sum as it is, and so does float64.
    np.testing.assert_array_equal(y, x.astype(np.float64) @ weight)


@SHIFTS
@settings(max_examples=20)
@given(rows=ROWS, seed=SEEDS, magnitude=st.sampled_from([1e-20, 1e-3, 1, 50, 1e20]))
def test_int8_shift_layers_of_any_tokens_are_numpys_integers_times_their_scales(
    run_kernel, target, shifts, rows, seed, magnitude
):
    rng = np.random.default_rng(seed)
    x = rng.normal(0, magnitude, (rows, 67)).astype(np.float32)
    x[rng.random(rows) < 0.1] = 0
    weight = powers(rng, 67, 150, octaves=7)
    linear = LinearDescription("shift", 67, 150, 4, "int8", shifts)
    y = run(run_kernel, target, linear, x, packed(weight, 4))
    clear = is_clear(x)
    np.testing.assert_array_equal(y[clear], int8_product(x, weight)[clear])


@SHIFTS
def test_the_largest_int8_sums_do_not_saturate(run_kernel, target, shifts):
    signs = np.random.default_rng(0).choice([-1, 1], (64, 16))
    x, weight = np.full((3, 64), 127, np.float32), np.full((64, 16), 64, np.float32)
    x[1], x[2] = -127, 127 * signs[:, 0]
    weight[:, 0], weight[:, 1] = 64 * signs[:, 0], -64
    y = run(run_kernel, target, LinearDescription("shift", 64, 16, 4, "int8", shifts), x, packed(weight, 4))
    np.testing.assert_array_equal(y, x.astype(np.float64) @ weight)


@SHIFTS
def test_an_int8_row_with_a_number_that_is_not_finite_stays_so(run_kernel, target, shifts):
    rng = np.random.default_rng(0)
    x, weight = whole_tokens(rng, 4, 67), powers(rng, 67, 19, octaves=7)
    x[1, 5], x[2, 7] = np.nan, -np.inf
    linear = LinearDescription("shift", 67, 19, 4, "int8", shifts)
    y = run(run_kernel, target, linear, x, packed(weight, 4))
    assert not np.isfinite(y[1:3]).any()
    np.testing.assert_array_equal(y[[0, 3]], x[[0, 3]] @ weight)


@SHIFTS
def test_a_bias_is_added_once(run_kernel, target, shifts):
    rng = np.random.default_rng(0)
    x, weight, bias = whole_tokens(rng, 5, 20), powers(rng, 20, 19, octaves=7), rng.normal(size=19)
    linear = LinearDescription("shift", 20, 19, 4, "int8", shifts)
    y = run(run_kernel, target, linear, x, packed(weight, 4, bias))
    np.testing.assert_array_equal(y, (x @ weight) + bias.astype(np.float32))


@SIZES
@pytest.mark.parametrize(("bits", "octaves"), [(4, 7), (5, 15)])
@settings(max_examples=8)
@given(rows=ROWS, seed=SEEDS)
@example(rows=1, seed=0)
@example(rows=1100, seed=0)
def test_float_shift_layers_are_numpys_product(
    run_kernel, tiled_target, inputs, outputs, bits, octaves, rows, seed
):
    rng = np.random.default_rng(seed)
    x, bias = rng.normal(size=(rows, inputs)).astype(np.float32), rng.normal(size=outputs)
    weight = powers(rng, inputs, outputs, octaves) / 2**8
    y = run(
        run_kernel,
        tiled_target,
        LinearDescription("shift", inputs, outputs, bits),
        x,
        packed(weight, bits, bias),
    )
    assert_near(
        y, x.astype(np.float64) @ weight + bias, lost_products(tiled_target, np.abs(x) @ np.abs(weight))
    )


@SIZES
@settings(max_examples=8)
@given(rows=ROWS, seed=SEEDS)
@example(rows=1100, seed=0)
def test_dense_layers_are_numpys_product(run_kernel, tiled_target, inputs, outputs, rows, seed):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    kernel, bias, parameters = dense_parameters(rng, inputs, outputs)
    y = run(run_kernel, tiled_target, LinearDescription("dense", inputs, outputs), x, parameters)
    assert_near(
        y, x.astype(np.float64) @ kernel + bias, lost_products(tiled_target, np.abs(x) @ np.abs(kernel))
    )


@SIZES
@settings(max_examples=8)
@given(rows=ROWS, seed=SEEDS)
@example(rows=1, seed=0)
@example(rows=1100, seed=0)
def test_dense_layers_in_bfloat16_are_numpys_product_of_the_nearest_numbers(
    run_kernel, tiled_target, inputs, outputs, rows, seed
):
    rng = np.random.default_rng(seed)
    # Of 8 bits after the point bfloat16 holds 7: half of the numbers lie between two.
    x = rng.choice([-1, 1], (rows, inputs)) * (1 + rng.integers(0, 256, (rows, inputs)) / 256)
    kernel, bias, parameters = dense_parameters(rng, inputs, outputs)
    linear = LinearDescription("dense", inputs, outputs, precision="bfloat16")
    y = run(run_kernel, tiled_target, linear, x.astype(np.float32), in_bfloat16(*parameters))
    assert_near(y, nearest_bfloat16(x) @ nearest_bfloat16(kernel) + bias)


@SIZES
@pytest.mark.parametrize(
    ("activations", "precision"), [("float", "float32"), ("int8", "float32"), ("int8", "bfloat16")]
)
@settings(max_examples=8)
@given(rows=ROWS, seed=SEEDS)
@example(rows=1, seed=0)
@example(rows=1100, seed=0)
def test_mixtures_compute_each_row_with_its_expert(
    run_kernel, target, inputs, outputs, activations, precision, rows, seed
):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    linear, parameters, reference = mixture(rng, inputs, outputs, activations, (0.3, -0.2), precision)
    clear = is_clear(x)
    lost = lost_products(target, np.abs(x[clear]).sum(axis=1, keepdims=True))  # hardly a weight is above 1
    y = run(run_kernel, target, linear, x, parameters)
    assert_near(y[clear], reference(x)[clear], lost)


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("bias", [(100, -100), (-100, 100)], ids=["all dense", "all shift"])
def test_one_expert_may_take_all_rows(run_kernel, target, activations, bias):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(77, 67)).astype(np.float32)
    linear, parameters, reference = mixture(rng, 67, 19, activations, bias)
    assert_near(run(run_kernel, target, linear, x, parameters), reference(x))


@pytest.mark.parametrize("inputs", [700, 4200], ids=["a few together", "one by one"])
def test_rows_are_routed_whatever_their_width(run_kernel, target, inputs):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(29, inputs)).astype(np.float32)
    linear, parameters, reference = mixture(rng, inputs, 19, "int8", (0.3, -0.2))
    clear = is_clear(x)
    assert_near(run(run_kernel, target, linear, x, parameters)[clear], reference(x)[clear])


@pytest.mark.parametrize("threads", [1, 3, 16])
@pytest.mark.parametrize("rows", [1, 40, 1100])
def test_any_number_of_threads_computes_the_same(run_kernel, target, threads, rows):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, 67)).astype(np.float32)
    linear, parameters, _ = mixture(rng, 67, 19, "int8", (0.3, -0.2))
    y = run(run_kernel, target, linear, x, parameters, threads=threads)
    np.testing.assert_array_equal(y, run(run_kernel, target, linear, x, parameters))


@pytest.mark.parametrize("images", [1, 3, 130])
@pytest.mark.parametrize(("tokens", "inputs", "outputs"), [(1, 16, 1), (49, 80, 150), (13, 48, 19)])
def test_a_head_is_the_product_of_the_normalized_tokens_mean(
    run_kernel, tiled_target, inputs, outputs, tokens, images
):
    rng = np.random.default_rng(0)
    x = rng.normal(1, 2, (images, tokens, inputs)).astype(np.float32)
    scale, shift = rng.normal(size=(2, inputs)).astype(np.float32)
    kernel, bias, parameters = dense_parameters(rng, inputs, outputs)
    head = Kernel("head", HeadDescription(LinearDescription("dense", inputs, outputs), tokens, 1e-3))
    y = run_kernel(head, tiled_target, [x, scale, shift, *parameters], ((images, outputs), "float32"))
    centred = x.astype(np.float64) - x.mean(axis=-1, keepdims=True, dtype=np.float64)
    normalized = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-3) * scale + shift
    assert_near(y, normalized.mean(axis=1) @ kernel + bias)


def test_no_rows_are_no_work(run_kernel, target):
    weight = powers(np.random.default_rng(0), 20, 19, octaves=7)
    x = np.zeros((0, 20), np.float32)
    y = run(run_kernel, target, LinearDescription("shift", 20, 19, 4, "int8"), x, packed(weight, 4))
    assert y.shape == (0, 19)
