import ctypes
import hashlib
import os
import struct
import subprocess
import sys

import pytest
from driver import needs_cudart

from kernels_tvm.descriptions import MatAddDescription
from kernels_tvm.gpu import nvidia
from kernels_tvm.gpu.export import FALLBACK, SYMBOL, export_kernel
from kernels_tvm.gpu.library import entry_name
from kernels_tvm.gpu.targets import gpu_target
from kernels_tvm.store import Kernel

LOAD = """
import sys
import tvm
from kernels_tvm.gpu.library import load_cuda
assert load_cuda()
kernel = tvm.runtime.load_module(sys.argv[1])
assert kernel["main"] is not None
(launches,) = kernel.imports
assert launches.kind == "cuda"
print("loaded")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A library, and what its launches take."""
    if nvidia.nvcc() is None:
        pytest.skip("nvcc is not on the PATH (CUDA toolkit 13)")
    folder = tmp_path_factory.mktemp("exported")
    return export_kernel(Kernel("matadd", MatAddDescription(300, 4)), gpu_target("cuda-sm_86"), folder)


def test_a_library_holds_machine_code_and_no_source(exported):
    path, resources = exported
    assert set(resources) == {"main_kernel", "main_kernel_1"}
    library = ctypes.CDLL(str(path))
    content = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, SYMBOL)), 8)
    (size,) = struct.unpack("<Q", content)
    content = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, SYMBOL)), 8 + size)
    assert b"cubin" in content
    assert content.count(b"\x7fELF") == 1
    assert b"__global__" not in path.read_bytes()


def test_what_exporting_tells_tvm_is_taken_back(exported):
    assert FALLBACK not in os.environ


def test_a_library_is_an_entry_of_the_cache(exported):
    path, _ = exported
    kernel, target = Kernel("matadd", MatAddDescription(300, 4)), gpu_target("cuda-sm_86")
    assert path.name == f"{entry_name(kernel, target)}.so"
    content = path.read_bytes()
    assert hashlib.sha256(content[:-32]).digest() == content[-32:]


@needs_cudart
def test_a_library_loads_without_a_compiler(exported, driver):
    command = [sys.executable, "-c", LOAD, exported[0]]
    environment = {"PATH": "", "LD_LIBRARY_PATH": str(driver)}
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.stdout == "loaded\n", finished.stderr
