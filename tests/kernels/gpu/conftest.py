import dataclasses
import functools
import subprocess

import pytest
from driver import DRIVER
from pocl import Program

from kernels_tvm.gpu import library, nvidia
from kernels_tvm.gpu.targets import GPU_TARGETS, OPENCL

BY_DEFAULT = ("sm_75", "sm_86")  # the others take `-m all_architectures`


@pytest.fixture(scope="session")
def driver(tmp_path_factory):
    """A folder with a stand-in for NVIDIA's driver, for a process's LD_LIBRARY_PATH."""
    folder = tmp_path_factory.mktemp("driver")
    (folder / "driver.c").write_text(DRIVER)
    command = [
        "gcc",
        "-shared",
        "-Wl,-soname,libcuda.so.1",
        "-o",
        folder / "libcuda.so.1",
        folder / "driver.c",
    ]
    subprocess.run(command, check=True)
    return folder


@functools.cache
def program(kernel, target):
    return Program(library.emit(kernel, target), target)


@pytest.fixture(scope="session")
def run_blocks():
    """(kernel, arrays, *outputs) -> arrays, through PoCL; an output is a shape and a dtype.

    ``with_scratch`` adds what launches hand on; other keywords are facts of the target.
    """

    def run(kernel, arrays, *outputs, with_scratch=False, **facts):
        scratch = [(shape, dtype) for _, shape, dtype in library.scratch(kernel, *arrays[0].shape[:-1])]
        results = program(kernel, dataclasses.replace(OPENCL, **facts))(arrays, *scratch, *outputs)
        if with_scratch:
            return results
        return results[len(scratch) :] if len(outputs) > 1 else results[-1]

    return run


@pytest.fixture(
    scope="session",
    params=[
        pytest.param(target, marks=() if target.arch in BY_DEFAULT else pytest.mark.all_architectures)
        for target in GPU_TARGETS
    ],
    ids=lambda target: target.arch,
)
def architecture(request):
    """Every compute capability; the test is skipped where NVIDIA's compiler is missing."""
    if nvidia.nvcc() is None:
        pytest.skip("nvcc is not on the PATH (CUDA toolkit 13)")
    return request.param
