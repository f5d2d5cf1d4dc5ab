import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from linear_references import assert_near, int8_product, packed, powers, whole_tokens

from kernels_tvm.descriptions import LinearDescription
from kernels_tvm.gpu import build, library, nvidia
from kernels_tvm.gpu.targets import gpu_target
from kernels_tvm.store import Kernel
from shiftaddvit_jax.costs.shapes import PAPER_LAYERS

ODD = pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (67, 150), (36, 20)])
PAPER = pytest.mark.parametrize(("rows", "inputs", "outputs"), PAPER_LAYERS)
ROWS = st.integers(1, 200)
# Products of float32 numbers, and of int8 ones by tensor cores of either shape, by dp4a and by shifts.
SHIFTS = pytest.mark.parametrize("shifts", [False, True], ids=["products", "shifts"])
INT8 = pytest.mark.parametrize(
    ("shifts", "int8_mma"),
    [(False, (16, 8, 32)), (False, (8, 8, 16)), (False, None), (True, None)],
    ids=["m16n8k32", "m8n8k16", "dp4a", "shifts"],
)


def run(run_blocks, linear, x, parameters, **facts):
    return run_blocks(
        Kernel("linear", linear), [x, *parameters], ((len(x), linear.outputs), "float32"), **facts
    )


@ODD
@SHIFTS
@pytest.mark.parametrize(("bits", "octaves"), [(4, 7), (5, 15)])
@settings(max_examples=4)
@given(rows=ROWS)
@example(rows=130)
def test_float_layers_are_numpys_product(run_blocks, inputs, outputs, shifts, bits, octaves, rows):
    rng = np.random.default_rng(rows)
    x, bias = rng.normal(size=(rows, inputs)).astype(np.float32), rng.normal(size=outputs)
    x[rng.random(x.shape) < 0.1] = 0
    weight = powers(rng, inputs, outputs, octaves) / 2**8
    linear = LinearDescription("shift", inputs, outputs, bits, shifts=shifts)
    y = run(run_blocks, linear, x, packed(weight, bits, bias))
    assert_near(y, x.astype(np.float64) @ weight + bias)


@ODD
@INT8
@settings(max_examples=4)
@given(rows=ROWS)
@example(rows=130)
def test_int8_layers_of_whole_tokens_are_numpys_integers(run_blocks, inputs, outputs, shifts, int8_mma, rows):
    rng = np.random.default_rng(rows)
    x, weight = whole_tokens(rng, rows, inputs), powers(rng, inputs, outputs, octaves=7)
    linear = LinearDescription("shift", inputs, outputs, 4, "int8", shifts)
    y = run(run_blocks, linear, x, packed(weight, 4), int8_mma=int8_mma)
    # 127 * 64 * inputs < 2^24: float32 holds every sum as it is, and so does float64.
    np.testing.assert_array_equal(y, x.astype(np.float64) @ weight)


@INT8
@pytest.mark.parametrize("magnitude", [1e-20, 1, 1e20])
def test_int8_layers_of_any_tokens_are_numpys_integers_times_their_scales(
    run_blocks, shifts, int8_mma, magnitude
):
    rng = np.random.default_rng(0)
    x = rng.normal(0, magnitude, (90, 67)).astype(np.float32)
    x[rng.random(90) < 0.1] = 0
    weight = powers(rng, 67, 150, octaves=7)
    linear = LinearDescription("shift", 67, 150, 4, "int8", shifts)
    y = run(run_blocks, linear, x, packed(weight, 4), int8_mma=int8_mma)
    np.testing.assert_array_equal(y, int8_product(x, weight))


@INT8
def test_an_int8_row_with_a_number_that_is_not_finite_stays_so(run_blocks, shifts, int8_mma):
    rng = np.random.default_rng(0)
    x, weight = whole_tokens(rng, 4, 67), powers(rng, 67, 19, octaves=7)
    x[1, 5], x[2, 7] = np.nan, -np.inf
    linear = LinearDescription("shift", 67, 19, 4, "int8", shifts)
    y = run(run_blocks, linear, x, packed(weight, 4), int8_mma=int8_mma)
    assert not np.isfinite(y[1:3]).any()
    np.testing.assert_array_equal(y[[0, 3]], x[[0, 3]] @ weight)


@INT8
def test_a_bias_is_added_once(run_blocks, shifts, int8_mma):
    rng = np.random.default_rng(0)
    x, weight, bias = whole_tokens(rng, 5, 20), powers(rng, 20, 19, octaves=7), rng.normal(size=19)
    linear = LinearDescription("shift", 20, 19, 4, "int8", shifts)
    y = run(run_blocks, linear, x, packed(weight, 4, bias), int8_mma=int8_mma)
    np.testing.assert_array_equal(y, (x @ weight) + bias.astype(np.float32))


@PAPER
def test_float_layers_of_the_papers_shapes(run_blocks, rows, inputs, outputs):
    rng = np.random.default_rng(0)
    x, weight = rng.normal(size=(rows, inputs)).astype(np.float32), powers(rng, inputs, outputs, 15) / 2**8
    y = run(run_blocks, LinearDescription("shift", inputs, outputs), x, packed(weight, 5))
    assert_near(y, x.astype(np.float64) @ weight)


@PAPER
def test_int8_layers_of_the_papers_shapes(run_blocks, rows, inputs, outputs):
    rng = np.random.default_rng(0)
    x, weight = whole_tokens(rng, rows, inputs), powers(rng, inputs, outputs, 7)
    y = run(
        run_blocks,
        LinearDescription("shift", inputs, outputs, 4, "int8"),
        x,
        packed(weight, 4),
        int8_mma=None,
    )
    np.testing.assert_array_equal(y, x.astype(np.float64) @ weight)


@pytest.mark.parametrize(
    "linear", [LinearDescription("shift", 20, 19), LinearDescription("shift", 20, 19, 4, "int8")]
)
def test_no_rows_launch_nothing(run_blocks, linear):
    weight = powers(np.random.default_rng(0), 20, 19, octaves=7)
    assert run(run_blocks, linear, np.zeros((0, 20), np.float32), packed(weight, linear.bits)).shape == (
        0,
        19,
    )


def test_magnitudes_of_any_float_shift_as_they_multiply(run_blocks):
    magnitudes = 2.0 ** np.arange(-126, 112, dtype=np.float32)
    x = np.diag(magnitudes * np.where(np.arange(238) % 2, -1.5, 1)).astype(np.float32)
    weight = np.full((238, 3), 1, np.float32) * np.float32([0.25, -1, 2])
    y = run(run_blocks, LinearDescription("shift", 238, 3, 5, shifts=True), x, packed(weight, 5))
    normal = np.abs(x @ weight) >= np.finfo(np.float32).tiny
    np.testing.assert_array_equal(y[normal], (x @ weight)[normal])


def test_without_nvcc_nvrtc_compiles(monkeypatch):
    pytest.importorskip("cuda.bindings", reason="NVRTC is not installed (pip install 'shiftaddvit-jax[gpu]')")
    monkeypatch.setattr(nvidia, "nvcc", lambda: None)
    target = gpu_target("cuda-sm_86")
    source = build.source(
        library.emit(Kernel("linear", LinearDescription("shift", 64, 512, 4, "int8")), target), target
    )
    assert nvidia.machine_code(source, target.arch).startswith(b"\x7fELF")
    with pytest.raises(RuntimeError, match=r"NVRTC failed for sm_86: .*error: "):
        nvidia.machine_code("no CUDA", target.arch)


@pytest.mark.parametrize(
    "linear",
    [
        LinearDescription("shift", 64, 512),
        LinearDescription("shift", 67, 150, 4),
        LinearDescription("shift", 64, 512, shifts=True),
        LinearDescription("shift", 64, 512, 4, "int8"),
        LinearDescription("shift", 67, 150, 4, "int8", shifts=True),
        LinearDescription("moe", 64, 512, 4, "int8"),
        LinearDescription("moe", 67, 150),
    ],
    ids=str,
)
def test_linear_layers_compile_without_spills(architecture, linear):
    source = build.source(library.emit(Kernel("linear", linear), architecture), architecture)
    cubin, launches = nvidia.compile_cubin(source, architecture.arch)
    assert cubin.startswith(b"\x7fELF")
    assert source.count("__global__ void") == 2 * len(launches)  # declared, and defined
    for launch in launches.values():
        assert (launch.spills, launch.stack) == (0, 0)
        assert launch.shared_memory <= architecture.shared_memory
