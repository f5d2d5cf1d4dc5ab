import functools

import numpy as np
import pytest

from kernels_tvm import library, targets

RUNNING = [target for target in targets.TARGETS if targets._runs(target)]


@pytest.fixture(scope="session", params=RUNNING, ids=lambda target: target.name)
def target(request):
    """Every target that runs here."""
    return request.param


@pytest.fixture(
    scope="session",
    params=list({target.float_tile: target for target in RUNNING}.values()),
    ids=lambda target: target.name,
)
def tiled_target(request):
    """Every target that runs here and differs from the others in more than its int8 product."""
    return request.param


@functools.cache
def compiled(kernel, target, threads):
    return library.build(kernel, target, threads)["main"]


@pytest.fixture(scope="session")
def run_kernel():
    """(kernel, target, arrays, *outputs) -> arrays; an output is a shape and a dtype."""
    import tvm

    def run(kernel, target, arrays, *outputs, threads=2):
        results = [tvm.runtime.empty(shape, dtype) for shape, dtype in outputs]
        inputs = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in arrays]
        compiled(kernel, target, threads)(*inputs, *results)
        arrays = [result.numpy() for result in results]
        return arrays if len(arrays) > 1 else arrays[0]

    return run
