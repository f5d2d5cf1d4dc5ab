"""GPU kernels by name and description."""

from collections.abc import Callable

from kernels_tvm.gpu.targets import GpuTarget
from kernels_tvm.library import Kernel


def builders() -> dict[str, Callable]:
    """The functions (target, description) -> TIR, by the names of their kernels. Imports TVM."""
    from kernels_tvm.gpu.matadd import matadd_kernel
    from kernels_tvm.gpu.matshift import linear_kernel

    return {"linear": linear_kernel, "matadd": matadd_kernel}


def emit(kernel: Kernel, target: GpuTarget):
    """The kernel's TIR for ``target``."""
    return builders()[kernel.name](target, kernel.description)
