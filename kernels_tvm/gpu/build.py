"""From TIR to what GPUs run: CUDA source and cubins, or OpenCL source."""

import functools
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import tvm
from tvm import tirx
from tvm.tirx import compilation_pipeline

from kernels_tvm.gpu.library import files_of_wheels
from kernels_tvm.gpu.targets import GpuTarget

HOST = {"kind": "llvm"}


def split(function, target: GpuTarget):
    """Return a kernel's TIR as two functions and more: ``main``, which launches, and what is launched."""
    bind = tirx.transform.BindTarget(tvm.target.Target(target.tvm, host=HOST))
    return tvm.ir.transform.Sequential([bind, *_lowering()])(tvm.IRModule({"main": function}))


def _lowering():
    return [
        tirx.transform.FlattenBuffer(),
        tirx.transform.StorageRewrite(),
        tirx.transform.StmtSimplify(),
        tirx.transform.AnnotateEntryFunc(),
        tirx.transform.SplitHostDevice(),
    ]


def _device_module(module, target):
    kernels = tirx.transform.Filter(lambda f: f.attrs["target"].kind.name == target.tvm["kind"])(
        tirx.transform.MakePackedAPI()(module)
    )
    kernels = compilation_pipeline.finalize_device_passes()(kernels)
    return tvm.get_global_func(f"target.build.{target.tvm['kind']}")(kernels, tvm.target.Target(target.tvm))


def _pipeline():
    # What the kernels need of TVM's default pipeline; the barriers are theirs, and so are the tiles.
    lower = tvm.ir.transform.Sequential([*_lowering(), tirx.transform.MakePackedAPI()])
    return lower, compilation_pipeline.finalize_host_passes, compilation_pipeline.finalize_device_passes


compilation_pipeline.PIPELINE_MAP["shiftaddvit_gpu"] = _pipeline


def compile_kernel(function, target: GpuTarget):
    """The library with the kernel ``main``, whose launches are CUDA source: see `provide_cubins`."""
    target = tvm.target.Target(target.tvm, host=HOST)
    return tvm.compile(tvm.IRModule({"main": function}), target=target, tir_pipeline="shiftaddvit_gpu")


def provide_cubins(compile_source: Callable[[str], bytes]) -> None:
    """Have TVM take from ``compile_source`` the machine code of every CUDA source that it loads."""
    tvm.register_global_func("tvm_callback_cuda_compile", compile_source, override=True)


def source(function, target: GpuTarget) -> str:
    """The CUDA or OpenCL source of a kernel's launches."""
    return _device_module(split(function, target), target).inspect_source()


@dataclass(frozen=True)
class Resources:
    """What ptxas says that a launch takes.

    Attributes:
      registers: of a thread.
      shared_memory: bytes of a block.
      stack: bytes of a thread: registers that are indexed at run time, or spilled.
      spills: bytes that a thread stores and loads since it lacks registers.
    """

    registers: int
    shared_memory: int
    stack: int
    spills: int


def nvcc() -> str | None:
    """The path of NVIDIA's compiler, None if it is not on this machine."""
    return shutil.which("nvcc")


def machine_code(code: str, arch: str) -> bytes:
    """CUDA source as machine code for ``arch``, by nvcc, or by NVRTC where there is none.

    Raises:
      RuntimeError: the compiler's message, or that there is none.
    """
    return compile_cubin(code, arch)[0] if nvcc() else _run_nvrtc(code, arch)


def compile_cubin(code: str, arch: str) -> tuple[bytes, dict[str, Resources]]:
    """CUDA source as machine code for ``arch``, and what each of its launches takes.

    Raises:
      RuntimeError: the compiler's message, or that there is none.
    """
    cubin, report = _run_nvcc(code, "-cubin", arch)
    return cubin, parse_resources(report)


def compile_ptx(code: str, arch: str) -> str:
    """CUDA source as PTX."""
    return _run_nvcc(code, "-ptx", arch)[0].decode()


def disassemble(cubin: bytes) -> str:
    """Machine code as text (SASS), by nvdisasm; empty where that is not on this machine."""
    nvdisasm = shutil.which("nvdisasm") or next(iter(files_of_wheels("*/bin/nvdisasm")), None)
    if nvdisasm is None:
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([nvdisasm, file.name], capture_output=True, text=True, check=True).stdout


@functools.cache
def _run_nvcc(code, output, arch):
    if nvcc() is None:
        raise RuntimeError("nvcc is not on the PATH; install the CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "kernel.cu", Path(folder) / "kernel.out"
        given.write_text(code)
        command = [nvcc(), output, f"-arch={arch}", "-O3", "-Xptxas=-v", "-o", made, given]
        finished = subprocess.run(command, capture_output=True, text=True)
        if finished.returncode:
            raise RuntimeError(f"nvcc failed for {arch}: {finished.stderr.strip()}")
        return made.read_bytes(), finished.stderr


def _run_nvrtc(code, arch):
    try:
        from cuda.bindings import nvrtc
    except ImportError as error:
        raise RuntimeError(
            "GPU kernels are compiled by nvcc, which is not on the PATH, or by NVRTC, which is not installed "
            "(pip install 'shiftaddvit-jax[gpu]')"
        ) from error

    includes = files_of_wheels("*/include")
    includes += [include / "cccl" for include in includes]
    options = [f"--gpu-architecture={arch}", "--disable-warnings", *(f"-I{path}" for path in includes)]
    _, program = nvrtc.nvrtcCreateProgram(code.encode(), b"kernel.cu", 0, None, None)
    (result,) = nvrtc.nvrtcCompileProgram(program, len(options), [option.encode() for option in options])
    if result != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        log = bytes(nvrtc.nvrtcGetProgramLogSize(program)[1])
        nvrtc.nvrtcGetProgramLog(program, log)
        raise RuntimeError(f"NVRTC failed for {arch}: {log.decode().strip()}")
    cubin = bytes(nvrtc.nvrtcGetCUBINSize(program)[1])
    nvrtc.nvrtcGetCUBIN(program, cubin)
    return cubin


_ENTRY = re.compile(
    r"Function properties for (?P<name>\w+)\s+(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill "
    r"stores, (?P<loads>\d+) bytes spill loads\s+ptxas info\s*: Used (?P<registers>\d+) registers(?P<rest>.*)"
)


def parse_resources(report: str) -> dict[str, Resources]:
    """What ``ptxas -v`` wrote, by the names of the launches."""
    resources = {}
    for entry in _ENTRY.finditer(report):
        smem = re.search(r"(\d+) bytes smem", entry["rest"])
        resources[entry["name"]] = Resources(
            int(entry["registers"]),
            int(smem[1]) if smem else 0,
            int(entry["stack"]),
            int(entry["stores"]) + int(entry["loads"]),
        )
    return resources
