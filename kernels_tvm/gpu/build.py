"""From TIR to what GPUs run: CUDA source and cubins, or OpenCL source."""

from collections.abc import Callable

import tvm
from tvm import tirx
from tvm.tirx import compilation_pipeline

from kernels_tvm.gpu.targets import GpuTarget

HOST = {"kind": "llvm"}


def split(function, target: GpuTarget):
    """Return a kernel's TIR as two functions and more: ``main``, which launches, and what is launched."""
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
    # What the kernels need of TVM's default pipeline; the barriers are theirs, and so are the tiles.
    lower = tvm.ir.transform.Sequential([*_lowering(), tirx.transform.MakePackedAPI()])
    return lower, compilation_pipeline.finalize_host_passes, compilation_pipeline.finalize_device_passes


compilation_pipeline.PIPELINE_MAP["shiftaddvit_gpu"] = _pipeline


def compile_kernel(function, target: GpuTarget):
    """The library with the kernel ``main``, whose launches are CUDA source: see `provide_cubins`."""
    target = tvm.target.Target(target.tvm, host=HOST)
    return tvm.compile(tvm.IRModule({"main": function}), target=target, tir_pipeline="shiftaddvit_gpu")


def provide_cubins(compile_source: Callable[[str], bytes]) -> None:
    """Have TVM take from ``compile_source`` the machine code of every CUDA source that it loads."""
    tvm.register_global_func("tvm_callback_cuda_compile", compile_source, override=True)


def source(function, target: GpuTarget) -> str:
    """The CUDA or OpenCL source of a kernel's launches."""
    return _device_module(split(function, target), target).inspect_source()
