import ctypes
import hashlib
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest

from kernels_tvm.descriptions import MatAdd
from kernels_tvm.gpu import build
from kernels_tvm.gpu.export import SYMBOL, export_kernel
from kernels_tvm.gpu.library import entry_name
from kernels_tvm.gpu.targets import gpu_target
from kernels_tvm.library import Kernel

# What TVM's CUDA runtime takes from NVIDIA's driver; each refuses, as where there is no GPU.
DRIVER = """
int cuDeviceGetName(void) { return 100; }
int cuFuncSetAttribute(void) { return 100; }
int cuGetErrorName(void) { return 100; }
int cuGetErrorString(void) { return 100; }
int cuLaunchKernelEx(void) { return 100; }
int cuModuleGetFunction(void) { return 100; }
int cuModuleLoadData(void) { return 100; }
int cuModuleUnload(void) { return 100; }
int cuTensorMapEncodeTiled(void) { return 100; }
"""

LOAD = """
import ctypes, sys
from pathlib import Path
import tvm
library = Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"
ctypes.CDLL(library, ctypes.RTLD_GLOBAL)
kernel = tvm.runtime.load_module(sys.argv[1])
assert kernel["main"] is not None
(launches,) = kernel.imports
assert launches.kind == "cuda"
print("loaded")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A library, and what its launches take."""
    if build.nvcc() is None:
        pytest.skip("nvcc is not on the PATH (CUDA toolkit 13)")
    folder = tmp_path_factory.mktemp("exported")
    return export_kernel(Kernel("matadd", MatAdd(300, 4)), gpu_target("cuda-sm_86"), folder)


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


def test_a_library_is_an_entry_of_the_cache(exported):
    path, _ = exported
    kernel, target = Kernel("matadd", MatAdd(300, 4)), gpu_target("cuda-sm_86")
    assert path.name == f"{entry_name(kernel, target)}.so"
    content = path.read_bytes()
    assert hashlib.sha256(content[:-32]).digest() == content[-32:]


def test_a_library_loads_without_a_compiler(exported, tmp_path):
    toolkit = Path(shutil.which("nvcc")).resolve().parents[1]
    runtime = next(iter(toolkit.rglob("libcudart.so.13")), None)
    if runtime is None:
        pytest.skip("libcudart.so.13 is not beside nvcc")
    (tmp_path / "driver.c").write_text(DRIVER)
    driver = tmp_path / "libcuda.so.1"
    subprocess.run(["gcc", "-shared", "-o", driver, tmp_path / "driver.c"], check=True)
    environment = {"PATH": "", "LD_LIBRARY_PATH": f"{tmp_path}:{runtime.parent}"}
    command = [sys.executable, "-c", LOAD, exported[0]]
    finished = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert finished.stdout == "loaded\n", finished.stderr
