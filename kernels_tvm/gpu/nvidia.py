"""NVIDIA's tools: CUDA source as machine code, what that takes of a GPU, and its text."""

import functools
import importlib.util
import re
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Resources:
    """The resources of a launch, as ptxas reports them.

    Attributes:
      registers: of a thread.
      shared_memory: bytes of a block.
      stack: bytes of a thread, for registers that are indexed at run time or spilled.
      spills: bytes that a thread stores and loads for lack of registers.
    """

    registers: int
    shared_memory: int
    stack: int
    spills: int


def nvcc() -> str | None:
    """The path of NVIDIA's compiler, None if it is not on the PATH."""
    return shutil.which("nvcc")


def machine_code(code: str, arch: str) -> bytes:
    """CUDA source as machine code for ``arch``, by nvcc, or by NVRTC if there is no nvcc.

    Raises:
      RuntimeError: there is no compiler, or it refuses the source.
    """
    return compile_cubin(code, arch)[0] if nvcc() else _run_nvrtc(code, arch)


def compile_cubin(code: str, arch: str) -> tuple[bytes, dict[str, Resources]]:
    """CUDA source as machine code for ``arch``, and the resources of its launches by name, by nvcc.

    Raises:
      RuntimeError: there is no nvcc, or it refuses the source.
    """
    cubin, report = _run_nvcc(code, "-cubin", arch)
    return cubin, parse_resources(report)


def compile_ptx(code: str, arch: str) -> str:
    """CUDA source as PTX for ``arch``, by nvcc.

    Raises:
      RuntimeError: there is no nvcc, or it refuses the source.
    """
    return _run_nvcc(code, "-ptx", arch)[0].decode()


def disassemble(cubin: bytes) -> str:
    """Machine code as text (SASS), by nvdisasm; empty if there is no nvdisasm."""
    nvdisasm = shutil.which("nvdisasm") or next(iter(files_of_wheels("*/bin/nvdisasm")), None)
    if nvdisasm is None:
        return ""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([nvdisasm, file.name], capture_output=True, text=True, check=True).stdout


@functools.cache
def _run_nvcc(code, output, arch):
    compiler = nvcc()
    if compiler is None:
        raise RuntimeError("nvcc is not on the PATH; install the CUDA toolkit")
    with tempfile.TemporaryDirectory() as folder:
        given, made = Path(folder) / "kernel.cu", Path(folder) / "kernel.out"
        given.write_text(code)
        command = [compiler, output, f"-arch={arch}", "-O3", "-Xptxas=-v", "-o", made, given]
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
            "(the packages cuda-bindings and nvidia-cuda-nvrtc)"
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
    """The resources of launches by name, from the text that ``ptxas -v`` writes."""
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


def files_of_wheels(pattern: str) -> list[Path]:
    """The paths in NVIDIA's installed wheels that match ``pattern``, such as ``*/include``."""
    spec = importlib.util.find_spec("nvidia")  # the package that the wheels share
    roots = spec.submodule_search_locations if spec else None
    return [path for root in roots or () for path in Path(root).glob(pattern)]
