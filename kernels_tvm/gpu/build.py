"""The compilation of TIR to the source that GPUs' compilers take: CUDA, or OpenCL."""

from collections.abc import Callable

import tvm
from tvm import tirx
from tvm.tirx import compilation_pipeline

from kernels_tvm.gpu.targets import GpuTarget

HOST = {"kind": "llvm"}


def split(function, target: GpuTarget):
    """Split a kernel's TIR into ``main``, which launches, and a function for each launch."""
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
    # The passes of TVM's default pipeline that the kernels need: they place their barriers and tiles
    # themselves.
    lower = tvm.ir.transform.Sequential([*_lowering(), tirx.transform.MakePackedAPI()])
    return lower, compilation_pipeline.finalize_host_passes, compilation_pipeline.finalize_device_passes


compilation_pipeline.PIPELINE_MAP["shiftaddvit_gpu"] = _pipeline


def compile_kernel(function, target: GpuTarget):
    """The library with the kernel ``main``; its launches are CUDA source, see `provide_cubins`."""
    compiled_for = tvm.target.Target(target.tvm, host=HOST)
    return tvm.compile(tvm.IRModule({"main": function}), target=compiled_for, tir_pipeline="shiftaddvit_gpu")


def provide_cubins(compile_source: Callable[[str], bytes]) -> None:
    """Make TVM call ``compile_source`` for the machine code of every CUDA source that it loads."""
    tvm.register_global_func("tvm_callback_cuda_compile", compile_source, override=True)


def source(function, target: GpuTarget) -> str:
    """The CUDA or OpenCL source of a kernel's launches."""
    return _device_module(split(function, target), target).inspect_source()
