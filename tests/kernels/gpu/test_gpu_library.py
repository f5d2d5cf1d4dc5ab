"""The cache of machine code, and the CUDA runtime that TVM is linked to."""

import importlib.util
import subprocess
import sys
import warnings

import pytest
from driver import needs_cudart

from kernels_tvm.gpu import library, nvidia
from kernels_tvm.gpu.targets import gpu_target
from kernels_tvm.store import cache_folder

TARGET = gpu_target("cuda-sm_86")


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """What has been compiled so far, with an empty cache; machine code is the source backwards."""
    sources = []

    def compile_source(code, arch):
        sources.append((code, arch))
        return code[::-1].encode()

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(nvidia, "machine_code", compile_source)
    return sources


def test_machine_code_is_compiled_once_for_each_architecture(compiled):
    for target in (TARGET, TARGET, gpu_target("cuda-sm_75")):
        assert library.cubin("source", target) == b"ecruos"
    assert compiled == [("source", "sm_86"), ("source", "sm_75")]


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:-1],
        lambda content: b"X" + content[1:],
        lambda content: content[:-32],
    ],
    ids=["empty", "a byte less", "a changed byte", "no hash"],
)
def test_damaged_machine_code_is_compiled_again(compiled, damage):
    library.cubin("source", TARGET)
    (entry,) = cache_folder().iterdir()
    entry.write_bytes(damage(entry.read_bytes()))
    assert library.cubin("source", TARGET) == b"ecruos"
    assert library.cubin("source", TARGET) == b"ecruos"
    assert len(compiled) == 2


def test_a_folder_that_cannot_be_written_is_done_without(compiled, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="is compiled at every start"):
        library.cubin("source", TARGET)
    with warnings.catch_warnings(action="error"):
        assert library.cubin("source", TARGET) == b"ecruos"


# TVM is imported before there is a driver, so it goes without its CUDA library.
LOADING = """
import ctypes, sys
import tvm
from kernels_tvm.gpu.library import has_runtime, load_cuda
print(load_cuda())
ctypes.CDLL(sys.argv[1])
print(load_cuda(), has_runtime())
(runtime,) = {line.split()[-1] for line in open("/proc/self/maps") if "libcudart" in line}
print(runtime)
"""


@needs_cudart
def test_tvm_gets_the_cuda_runtime_of_nvidias_wheel(driver):
    command = [sys.executable, "-c", LOADING, driver / "libcuda.so.1"]
    finished = subprocess.run(command, capture_output=True, text=True)
    without_driver, loaded, has_runtime, runtime = finished.stdout.split()
    assert (without_driver, loaded) == ("False", "True")
    assert has_runtime == "False"  # no GPU answers behind this driver
    (wheel,) = importlib.util.find_spec("nvidia.cu13").submodule_search_locations
    assert runtime == f"{wheel}/lib/libcudart.so.13"
