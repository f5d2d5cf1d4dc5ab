"""GPU kernels by name and description: compiled once, then loaded from the cache, see `kernels_tvm.store`.

A kernel has two entries: its library, and the machine code of its launches, which is named by their CUDA
source and the architecture.
"""

import contextlib
import ctypes
import hashlib
from collections.abc import Callable
from pathlib import Path

from kernels_tvm import store
from kernels_tvm.gpu import nvidia
from kernels_tvm.gpu.targets import GpuTarget
from kernels_tvm.runtime import once
from kernels_tvm.store import Kernel

CUDART = "libcudart.so.13"


def builders() -> dict[str, Callable]:
    """The functions (target, description) -> TIR, by the names of their kernels. Imports TVM."""
    from kernels_tvm.gpu.binarize import binarize_kernel
    from kernels_tvm.gpu.depthwise_conv import depthwise_conv_kernel
    from kernels_tvm.gpu.hadamard import hadamard_kernel
    from kernels_tvm.gpu.hamming import hamming_product_kernel
    from kernels_tvm.gpu.matadd import matadd_kernel
    from kernels_tvm.gpu.matshift import linear_kernel
    from kernels_tvm.gpu.moe import moe_kernel

    return {
        "linear": lambda target, linear: (moe_kernel if linear.kind == "moe" else linear_kernel)(
            target, linear
        ),
        "matadd": matadd_kernel,
        "hamming_product": hamming_product_kernel,
        "hadamard": hadamard_kernel,
        "binarize": binarize_kernel,
        "depthwise_conv": depthwise_conv_kernel,
    }


def scratch(kernel: Kernel, *leading) -> list[tuple[str, tuple, str]]:
    """Name, shape and dtype of the arrays that pass from a kernel's launches to later ones.

    ``leading`` are the sizes of all axes of the kernel's first argument but the last, as numbers or symbols.
    The arrays are outputs of the kernel, before its results.
    """
    from kernels_tvm.gpu import binarize, matadd, matshift, moe

    module = {
        "linear": moe if getattr(kernel.description, "kind", None) == "moe" else matshift,
        "matadd": matadd,
        "binarize": binarize,
    }.get(kernel.name)
    return module.scratch(kernel.description, *leading) if module else []


def emit(kernel: Kernel, target: GpuTarget):
    """The kernel's TIR for ``target``."""
    return builders()[kernel.name](target, kernel.description)


def entry_name(kernel: Kernel, target: GpuTarget) -> str:
    """What identifies the compiled kernel, also as the name of a custom call."""
    return store.entry_name("gpu", kernel, target)


@once
def load(kernel: Kernel, target: GpuTarget):
    """The kernel's function on a machine with such a GPU, compiled now unless the cache has it."""
    from kernels_tvm.gpu.build import compile_kernel, provide_cubins

    provide_cubins(lambda code: cubin(code, target))
    return store.load_or_build(
        entry_name(kernel, target), lambda: compile_kernel(emit(kernel, target), target)
    )


def has_runtime() -> bool:
    """Whether TVM can launch on a GPU: its CUDA library is loaded, and the driver is new enough for it."""
    import tvm

    return load_cuda() and tvm.cuda().exist


def load_cuda() -> bool:
    """Load TVM's CUDA library unless it is loaded; whether it is loaded then.

    TVM tries to load the library when it is imported. That fails before `CUDART`, to which it is linked, is
    loaded: `CUDART` is in NVIDIA's wheel, where no loader looks, and JAX loads it when it looks for a GPU.
    """
    import tvm

    def loaded():
        return tvm.get_global_func("ffi.Module.load_from_bytes.cuda", allow_missing=True) is not None

    if not loaded():
        runtimes = nvidia.files_of_wheels(f"*/lib/{CUDART}")
        with contextlib.suppress(OSError):  # there is no runtime, or no driver
            for library in (*runtimes, Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"):
                ctypes.CDLL(str(library))
    return loaded()


def cubin(code: str, target: GpuTarget) -> bytes:
    """The machine code of CUDA source, compiled now unless the cache has it.

    Raises:
      RuntimeError: there is no compiler, or it refuses the source.
    """
    name = hashlib.sha256(f"{target.arch} {code}".encode()).hexdigest()[:32]
    path = store.cache_folder() / f"{name}.cubin"
    kept = store.read_entry(path)
    if kept is not None:
        return kept
    made = nvidia.machine_code(code, target.arch)
    store.try_to_save(lambda file: Path(file).write_bytes(made), path)
    return made
