"""GPU kernels by name and description."""

from collections.abc import Callable

from kernels_tvm.gpu.targets import GpuTarget
from kernels_tvm.library import Kernel


def builders() -> dict[str, Callable]:
    """The functions (target, description) -> TIR, by the names of their kernels. Imports TVM."""
    from kernels_tvm.gpu.binarize import binarize_kernel
    from kernels_tvm.gpu.depthwise_conv import depthwise_conv_kernel
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
        "binarize": binarize_kernel,
        "depthwise_conv": depthwise_conv_kernel,
    }


def scratch(kernel: Kernel, *leading) -> list[tuple[str, tuple, str]]:
    """Name, shape and dtype of what a kernel's launches hand on, for its first argument's axes but the last.

    Their sizes are numbers or symbols. What is handed on are outputs of the kernel, ahead of its results.
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
