import numpy as np
import pytest
from linear_references import assert_near, packed, powers

from kernels_tvm.descriptions import Linear
from kernels_tvm.gpu import build, library
from kernels_tvm.library import Kernel

ODD = pytest.mark.parametrize(("rows", "inputs", "outputs"), [(1, 1, 1), (77, 67, 150), (130, 36, 20)])


@ODD
@pytest.mark.parametrize(("bits", "octaves"), [(4, 7), (5, 15)])
def test_float_matshift_is_numpys_product(run_blocks, rows, inputs, outputs, bits, octaves):
    rng = np.random.default_rng(0)
    x, bias = rng.normal(size=(rows, inputs)).astype(np.float32), rng.normal(size=outputs)
    weight = powers(rng, inputs, outputs, octaves) / 2**8
    kernel = Kernel("linear", Linear("shift", inputs, outputs, bits))
    y = run_blocks(kernel, [x, *packed(weight, bits, bias)], ((rows, outputs), "float32"))
    assert_near(y, x.astype(np.float64) @ weight + bias)


def test_no_rows_launch_nothing(run_blocks):
    weight = powers(np.random.default_rng(0), 20, 19, octaves=7)
    x = np.zeros((0, 20), np.float32)
    y = run_blocks(Kernel("linear", Linear("shift", 20, 19)), [x, *packed(weight, 5)], ((0, 19), "float32"))
    assert y.shape == (0, 19)


def test_matshift_compiles_with_no_spills(architecture):
    kernel = Kernel("linear", Linear("shift", 64, 512))
    source = build.source(library.emit(kernel, architecture), architecture)
    cubin, launches = build.compile_cubin(source, architecture.arch)
    assert cubin.startswith(b"\x7fELF")
    assert [(launch.spills, launch.stack) for launch in launches.values()] == [(0, 0)]
