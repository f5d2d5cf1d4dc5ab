import functools

import numpy as np
import pytest

from kernels_tvm.cpu import library, targets
from kernels_tvm.descriptions import joined

RUNNING = [target for target in targets.TARGETS if targets.runs_here(target)]


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


def as_taken(description, arrays):
    """x and a description's parameters, some of which CPU kernels take as one."""
    if not hasattr(description, "arguments"):
        return arrays
    x, *parameters = arrays
    starts, size = joined(description)
    separate, together = [x], np.zeros(size, np.float32)
    for (name, shape, _), array in zip(description.arguments(), parameters, strict=True):
        assert array.shape == shape
        if name in starts:
            together[starts[name] : starts[name] + array.size] = array.ravel()
        else:
            separate.append(array)
    return [*separate, together]


@pytest.fixture(scope="session")
def run_kernel():
    """(kernel, target, arrays, *outputs) -> arrays; an output is a shape and a dtype."""
    import tvm

    def run(kernel, target, arrays, *outputs, threads=2):
        results = [tvm.runtime.empty(shape, dtype) for shape, dtype in outputs]
        taken = as_taken(kernel.description, arrays)
        inputs = [tvm.runtime.tensor(np.ascontiguousarray(array)) for array in taken]
        compiled(kernel, target, threads)(*inputs, *results)
        arrays = [result.numpy() for result in results]
        return arrays if len(arrays) > 1 else arrays[0]

    return run
