"""The compilation of TIR to a CPU's machine code."""

import tvm
import tvm_ffi
from tvm import tirx
from tvm.tirx import compilation_pipeline

from kernels_tvm.cpu.targets import Target


def compile_kernel(function, target: Target):
    """The library with the kernel ``main``, for ``target``."""
    module, facts = tvm.IRModule({"main": function}), dict(target.llvm)
    try:
        return tvm.compile(module, target=tvm.target.Target(facts), tir_pipeline="shiftaddvit")
    except tvm.error.InternalError as error:
        if "does not dominate all uses" not in str(error):
            raise
        # LLVM's optimizations make an invalid program of some kernels for very few channels, whose loops
        # vanish. Such kernels have little to compute and are fast without optimizations, too.
        plain = tvm.target.Target(facts | {"opt-level": 0})
        return tvm.compile(module, target=plain, tir_pipeline="shiftaddvit")


@tirx.transform.prim_func_pass(opt_level=0)
def _keep_local_on_stack(function, module, context):
    """Keep local buffers on the stack, where LLVM makes registers of them.

    TVM allocates all buffers but small global ones on the heap.
    """

    def keep(allocation):
        if allocation.buffer.scope() != "local":
            return allocation
        return tirx.AllocBuffer(allocation.buffer, {"disable_lower_builtin": tirx.const(1, "int32")})

    return tvm_ffi.structural_map(function, (tirx.AllocBuffer, keep))


def _pipeline():
    # The passes of TVM's default pipeline that the kernels need. They are emitted as loops, so its scheduling
    # passes have nothing to do, and one of those, CompactBufferAllocation, loses buffers.
    lower = tvm.ir.transform.Sequential(
        [
            tirx.transform.FlattenBuffer(),
            tirx.transform.StorageRewrite(),
            _keep_local_on_stack,
            tirx.transform.StmtSimplify(),
            tirx.transform.AnnotateEntryFunc(),
            tirx.transform.SplitHostDevice(),
            tirx.transform.MakePackedAPI(),
        ]
    )
    return lower, compilation_pipeline.finalize_host_passes, compilation_pipeline.finalize_device_passes


compilation_pipeline.PIPELINE_MAP["shiftaddvit"] = _pipeline
