"""One vector with a number of each row, against NumPy."""

import operator

import numpy as np
import pytest

from kernels_tvm.cpu.targets import host_target

pytestmark = pytest.mark.skipif(host_target() is None, reason="no kernel runs on this machine")


@pytest.mark.parametrize("lanes_of_row", [8, 16])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 7, 8])
@pytest.mark.parametrize("fold", ["sum", "max"])
def test_each_lane_is_what_its_row_folds_to(fold, rows, lanes_of_row):
    import tvm
    from tvm.script.ir_builder import tirx as T

    from kernels_tvm.cpu.build import compile_kernel
    from kernels_tvm.cpu.emit import element, fold_rows, lanes
    from kernels_tvm.emit import Arguments, kernel

    combine = {"sum": operator.add, "max": T.max}[fold]

    def body(arguments: Arguments):
        x = arguments("x", (rows, lanes_of_row), "float32")
        y = arguments("y", (rows,), "float32")
        vectors = [T.bind(x[row, lanes(0, lanes_of_row)]) for row in range(rows)]
        folded = fold_rows(vectors, combine, count=lanes_of_row)
        for row in range(rows):
            T.buffer_store(y, element(folded, row), [row])

    # Whole numbers, so that the order of additions makes no difference.
    x = np.random.default_rng(rows).integers(-100, 100, (rows, lanes_of_row)).astype(np.float32)
    y = tvm.runtime.tensor(np.zeros(rows, np.float32))
    compile_kernel(kernel(body), host_target())["main"](tvm.runtime.tensor(x), y)
    np.testing.assert_array_equal(y.numpy(), getattr(np, fold)(x, axis=1))
