"""From TIR to machine code."""

import tvm
from tvm import tirx
from tvm.tirx import compilation_pipeline

from kernels_tvm.targets import Target


def compile_kernel(function, target: Target):
    """The library with the kernel ``main``, for ``target``."""
    module, facts = tvm.IRModule({"main": function}), dict(target.llvm)
    try:
        return tvm.compile(module, target=tvm.target.Target(facts), tir_pipeline="shiftaddvit")
    except tvm.error.InternalError as error:
        if "does not dominate all uses" not in str(error):
            raise
        # Of some kernels for very few channels, whose loops vanish, LLVM's optimizations make an invalid
        # program. What such kernels compute is soon done without them, too.
        plain = tvm.target.Target(facts | {"opt-level": 0})
        return tvm.compile(module, target=plain, tir_pipeline="shiftaddvit")


def _pipeline():
    # What the kernels need of TVM's default pipeline: they are emitted as loops, so its scheduling passes
    # have nothing to do, and one of them, CompactBufferAllocation, loses buffers.
    lower = tvm.ir.transform.Sequential(
        [
            tirx.transform.FlattenBuffer(),
            tirx.transform.StorageRewrite(),
            tirx.transform.StmtSimplify(),
            tirx.transform.AnnotateEntryFunc(),
            tirx.transform.SplitHostDevice(),
            tirx.transform.MakePackedAPI(),
        ]
    )
    return lower, compilation_pipeline.finalize_host_passes, compilation_pipeline.finalize_device_passes


compilation_pipeline.PIPELINE_MAP["shiftaddvit"] = _pipeline
