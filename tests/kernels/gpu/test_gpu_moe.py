import numpy as np
import pytest
from linear_references import assert_near, mixture

from kernels_tvm.gpu import library
from kernels_tvm.store import Kernel

FORMATS = pytest.mark.parametrize("activations", ["float", "int8"])


def run(run_blocks, linear, x, parameters):
    return run_blocks(Kernel("linear", linear), [x, *parameters], ((len(x), linear.outputs), "float32"))


@FORMATS
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 1), (67, 150), (64, 64)])
@pytest.mark.parametrize("rows", [1, 129, 1100])
def test_mixtures_compute_each_row_with_its_expert(run_blocks, inputs, outputs, activations, rows):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(rows, inputs)).astype(np.float32)
    linear, parameters, reference = mixture(rng, inputs, outputs, activations, (0.3, -0.2))
    assert_near(run(run_blocks, linear, x, parameters), reference(x))


@FORMATS
@pytest.mark.parametrize("bias", [(100, -100), (-100, 100)], ids=["all dense", "all shift"])
def test_one_expert_may_take_all_rows(run_blocks, activations, bias):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(177, 67)).astype(np.float32)
    linear, parameters, reference = mixture(rng, 67, 19, activations, bias)
    assert_near(run(run_blocks, linear, x, parameters), reference(x))


def test_rows_are_sorted_by_expert_and_none_is_lost(run_blocks):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(40_000, 5)).astype(np.float32)
    linear, parameters, _ = mixture(rng, 5, 3, "float", (0.3, -0.2))
    kernel = Kernel("linear", linear)
    results = run_blocks(kernel, [x, *parameters], ((len(x), 3), "float32"), with_scratch=True)
    names = [name for name, *_ in library.scratch(kernel, len(x))]
    made = dict(zip(names, results, strict=False))
    dense = np.flatnonzero(made["logit"] >= 0)
    assert made["dense_rows"][0] == len(dense)
    np.testing.assert_array_equal(made["order"], np.r_[dense, np.flatnonzero(made["logit"] < 0)])
