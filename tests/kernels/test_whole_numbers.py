"""Weights that are whole numbers of 8 bits: sums and differences of two powers of two, and dense int8."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from linear_references import assert_near, dense_int8, is_clear, two_powers, whole_product

from kernels_tvm.descriptions import LinearDescription
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
