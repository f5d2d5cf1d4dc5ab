"""From TIR to machine code."""

import tvm
from tvm import tirx
from tvm.tirx import compilation_pipeline

from kernels_tvm.targets import Target


def compile_kernel(function, target: Target):
    """The library with the kernel ``main``, for ``target``."""
    return tvm.compile(
        tvm.IRModule({"main": function}),
        target=tvm.target.Target(dict(target.llvm)),
        tir_pipeline="shiftaddvit",
    )


def _pipeline():
    # What the kernels need of TVM's default pipeline: they are emitted as loops, so its scheduling passes have
    # nothing to do, and one of them, CompactBufferAllocation, loses buffers. LLVM simplifies.
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
