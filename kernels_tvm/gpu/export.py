"""Kernels as libraries for other machines: their launches are machine code, so that loading compiles nothing.

Without a GPU, TVM exports a library with CUDA source, which is compiled when the library is loaded. Here a
cubin takes the place of the source, in the same format.
"""

import os
import re
import struct
from collections.abc import Generator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

from tvm.runtime import _ffi_api

from kernels_tvm.gpu.build import compile_kernel
from kernels_tvm.gpu.library import emit, entry_name
from kernels_tvm.gpu.nvidia import Resources, compile_cubin, machine_code, nvcc
from kernels_tvm.gpu.targets import GpuTarget
from kernels_tvm.store import Kernel, can_link, save_entry

SYMBOL = "__tvm_ffi__library_bin"
FALLBACK = "TVM_COMPILE_FORCE_FALLBACK"
_KIND = b"cuda"


def export_kernel(kernel: Kernel, target: GpuTarget, folder: Path) -> tuple[Path, dict[str, Resources]]:
    """Write the kernel's library for ``target``; its path, and the resources of its launches by name.

    The file has the name and the ending of an entry of the cache. The resources are those that nvcc reports;
    without nvcc there are none.

    Raises:
      RuntimeError: there is no compiler, or it refuses the source.
      OSError: the library can't be linked or written.
    """
    with _launches_as_source():
        library = compile_kernel(emit(kernel, target), target)
    (launches,) = library.mod.imports
    code = launches.inspect_source()
    if nvcc():
        cubin, resources = compile_cubin(code, target.arch)
    else:
        cubin, resources = machine_code(code, target.arch), {}

    def pack(module, is_system_lib, prefix, folder):
        packed = _ffi_api.ModulePackImportsToC(module, is_system_lib, prefix)
        content = bytes(int(number, 16) for number in re.findall(r"0x([0-9a-f]{2})\b", packed))
        file = Path(folder) / "imports.c"
        file.write_text(_as_c(with_cubin(content, code.encode(), cubin)))
        return str(file)

    path = folder / f"{entry_name(kernel, target)}.so"
    export = partial(library.mod.export_library, fpack_imports=pack)
    if not can_link():
        raise OSError(f"{path} can't be linked: neither g++ nor clang++ is on the PATH")
    save_entry(export, path)
    return path, resources


@contextmanager
def _launches_as_source() -> Generator[None]:
    """A context in which TVM keeps launches as CUDA source, even on a machine with a GPU."""
    before = os.environ.get(FALLBACK)
    os.environ[FALLBACK] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[FALLBACK]
        else:
            os.environ[FALLBACK] = before


def with_cubin(content: bytes, code: bytes, cubin: bytes) -> bytes:
    """The imports of a library as TVM packs them, with a cubin in the place of CUDA source.

    Packed imports are the number of bytes that follow, the tree of modules, and the kind and bytes of each
    module. The bytes of a CUDA module are a format, facts of its functions, and the code. A string comes
    after its length.
    """
    head, rest = content[8:].split(_string(_KIND), 1)
    (size,) = struct.unpack_from("<Q", rest)
    module = rest[8:]
    format_and_facts = module.removesuffix(_string(code))
    if (
        size != len(module)
        or not format_and_facts.startswith(_string(b"cuda"))
        or len(format_and_facts) == size
    ):
        raise RuntimeError("TVM packs CUDA modules in another way than 0.27 does")
    facts = format_and_facts.removeprefix(_string(b"cuda"))
    body = head + _string(_KIND) + _string(_string(b"cubin") + facts + _string(cubin))
    return struct.pack("<Q", len(body)) + body


def _string(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _as_c(content: bytes) -> str:
    numbers = ",".join(map(str, content))
    return (
        f'extern "C" {{\nextern const unsigned char {SYMBOL}[];\n'
        f"const unsigned char {SYMBOL}[{len(content)}] = {{{numbers}}};\n}}\n"
    )
