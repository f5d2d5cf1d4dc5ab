"""Weights that are whole numbers of 8 bits: sums and differences of two powers of two, and dense int8."""

import numpy as np
import pytest
from linear_references import (
    assert_near,
    dense_int8,
    mixture_of_whole_numbers,
    sums_of_two_powers,
    two_powers,
    whole_product,
)

from kernels_tvm.descriptions import LinearDescription
from kernels_tvm.gpu import build, library, nvidia
from kernels_tvm.packing import write_numbers
from kernels_tvm.store import Kernel

ODD = pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (67, 150), (36, 20)])
TWO_POWERS, TWO_SHIFTS = ("shift", 8, "int8", False), ("shift", 8, "int8", True)
DENSE = ("dense", 5, "float", False, "int8")
# By tensor cores of either shape, by dp4a and by shifts.
KINDS = {
    "m16n8k32": (two_powers, TWO_POWERS, (16, 8, 32)),
    "m8n8k16": (two_powers, TWO_POWERS, (8, 8, 16)),
    "dp4a": (two_powers, TWO_POWERS, None),
    "shifts": (two_powers, TWO_SHIFTS, None),
    "dense m16n8k32": (dense_int8, DENSE, (16, 8, 32)),
    "dense dp4a": (dense_int8, DENSE, None),
}
EVERY_KIND = pytest.mark.parametrize(("draw", "settings", "int8_mma"), KINDS.values(), ids=KINDS)


def described(settings, inputs, outputs):
    kind, *rest = settings
    return LinearDescription(kind, inputs, outputs, *rest)


def run(run_blocks, linear, x, parameters, **facts):
    output = (len(x), linear.outputs), "float32"
    return run_blocks(Kernel("linear", linear), [x, *parameters], output, **facts)


@ODD
@EVERY_KIND
def test_layers_are_numpys_int32_sums_times_their_scales(
    run_blocks, draw, settings, int8_mma, inputs, outputs
):
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (130, inputs)).astype(np.float32)
    x[rng.random(130) < 0.1] = 0
    parameters, numbers, scale = draw(rng, inputs, outputs)
    y = run(run_blocks, described(settings, inputs, outputs), x, parameters, int8_mma=int8_mma)
    np.testing.assert_array_equal(y, whole_product(x, numbers, scale))


def test_every_sum_of_two_powers_is_two_shifts(run_blocks):
    numbers = sums_of_two_powers()[None]
    linear = LinearDescription("shift", 1, numbers.size, 8, "int8", shifts=True)
    zeros = np.zeros(-(-numbers.size // 16) * 16)
    parameters = [write_numbers(numbers), zeros.astype(np.int8), zeros.astype(np.float32)]
    x = np.float32([[127], [-127]])
    np.testing.assert_array_equal(run(run_blocks, linear, x, parameters), x @ numbers)


@ODD
@pytest.mark.parametrize("shifts", [False, True], ids=["products", "shifts"])
def test_two_powers_of_float_rows_are_numpys_product(run_blocks, inputs, outputs, shifts):
    rng = np.random.default_rng(0)
    x, bias = rng.normal(size=(130, inputs)).astype(np.float32), rng.normal(size=outputs)
    parameters, numbers, scale = two_powers(rng, inputs, outputs, bias)
    y = run(run_blocks, LinearDescription("shift", inputs, outputs, 8, shifts=shifts), x, parameters)
    assert_near(y, x.astype(np.float64) @ (numbers * scale.astype(np.float64)) + bias)


@pytest.mark.parametrize(
    ("bits", "activations", "precision"),
    [(8, "int8", "int8"), (4, "int8", "int8"), (8, "float", "int8"), (8, "int8", "float32")],
)
def test_mixtures_compute_each_row_with_its_expert(run_blocks, bits, activations, precision):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(129, 67)).astype(np.float32)
    linear, parameters, reference = mixture_of_whole_numbers(rng, 67, 150, bits, activations, precision)
    assert_near(run(run_blocks, linear, x, parameters), reference(x))


@pytest.mark.parametrize(
    "linear",
    [
        LinearDescription("shift", 64, 512, 8),
        LinearDescription("shift", 64, 512, 8, "int8"),
        LinearDescription("shift", 67, 150, 8, "int8", shifts=True),
        LinearDescription("dense", 67, 150, precision="int8"),
        LinearDescription("moe", 64, 512, 8, "int8", precision="int8"),
    ],
    ids=str,
)
def test_linear_layers_compile_without_spills(architecture, linear):
    source = build.source(library.emit(Kernel("linear", linear), architecture), architecture)
    _, launches = nvidia.compile_cubin(source, architecture.arch)
    for launch in launches.values():
        assert (launch.spills, launch.stack) == (0, 0)
        assert launch.shared_memory <= architecture.shared_memory
