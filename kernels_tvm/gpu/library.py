"""GPU kernels by name and description."""

from collections.abc import Callable

from kernels_tvm.gpu.targets import GpuTarget
from kernels_tvm.library import Kernel


def builders() -> dict[str, Callable]:
    """The functions (target, description) -> TIR, by the names of their kernels. Imports TVM."""
    from kernels_tvm.gpu.matshift import linear_kernel
    from kernels_tvm.gpu.moe import moe_kernel

    return {
        "linear": lambda target, linear: (moe_kernel if linear.kind == "moe" else linear_kernel)(
            target, linear
        )
    }


def scratch(kernel: Kernel, rows) -> list[tuple[str, tuple, str]]:
    """Name, shape and dtype of what a kernel's launches hand on, for a number or a symbol of rows.

    They are outputs of the kernel, ahead of its results.
    """
    from kernels_tvm.gpu import matshift, moe

    if kernel.name != "linear":
        return []
    return (moe if kernel.description.kind == "moe" else matshift).scratch(kernel.description, rows)


def emit(kernel: Kernel, target: GpuTarget):
    """The kernel's TIR for ``target``."""
    return builders()[kernel.name](target, kernel.description)
