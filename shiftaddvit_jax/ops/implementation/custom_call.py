"""TVM kernels as JAX custom calls."""

import os
import warnings
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_tvm import store
from kernels_tvm.cpu import library
from kernels_tvm.gpu import library as gpu_library
from kernels_tvm.gpu.targets import GpuTarget, supporting_target
from kernels_tvm.runtime import once, provide_runtime
from kernels_tvm.store import Kernel
from shiftaddvit_jax.ops.implementation.partitioning import split_over_devices
from shiftaddvit_jax.optional import how_to_install


@cache
def unavailable() -> str | None:
    """Why no TVM kernel runs here, in one line; None if kernels run."""
    if jax.default_backend() not in ("cpu", "gpu"):
        return f"TVM kernels run on CPU and GPU, and JAX runs on {jax.default_backend()!r}"
    if not store.is_installed() and (on_gpu() or not library.is_provided()):
        return f"TVM is not installed ({how_to_install('tvm')})"
    if on_gpu() and gpu_target() is None:
        return "this GPU is not among the kernels' targets"
    if on_gpu():
        wanted = f"TVM finds no CUDA 13 runtime ({how_to_install('gpu')}; driver 580 or newer)"
        return None if gpu_library.has_runtime() else wanted
    if library.host_target() is None:
        return "this CPU is not among the kernels' targets"
    return None


def on_gpu() -> bool:
    """Whether kernels run on a GPU, or are recorded for one."""
    return recording_for_gpu() or jax.default_backend() == "gpu"


def recording_for_gpu() -> bool:
    """Whether `record_kernels` records GPU kernels, which needs no GPU here."""
    return _for_gpu.get()


def gpu_target() -> GpuTarget | None:
    """The target that this GPU's kernels are compiled for, None if no target supports it."""
    capability = getattr(jax.devices()[0], "compute_capability", None)
    return supporting_target(capability) if capability else None


def call_kernel(
    kernel: Kernel, outputs: Sequence[jax.ShapeDtypeStruct], *arguments: Array, batched: int = 1
) -> list[Array]:
    """The outputs of a kernel, without a gradient. Under vmap the kernel is called once for each element.

    The first axis of the outputs and of the first ``batched`` arguments is the batch. Where a program splits
    it over devices, each calls the kernel on its part; the other arguments are whole on each.
    """
    recorded = _recorded.get()
    if recorded is not None:
        shapes = [(array.shape, array.dtype.name) for array in (*arguments, *outputs)]
        recorded.setdefault(kernel, []).append(shapes)
        return [jnp.zeros(output.shape, output.dtype) for output in outputs]
    if on_gpu():
        name = _register_gpu(kernel, gpu_target())
    elif (portable := _portable.get()) is None:
        name = _register(kernel)
    else:
        name = portable_name(kernel.key)
        portable[name] = kernel

    def call(*arguments):
        batch = arguments[0].shape[0]
        between = gpu_library.scratch(kernel, *arguments[0].shape[:-1]) if on_gpu() else ()
        shapes = [
            *(jax.ShapeDtypeStruct(shape, dtype) for _, shape, dtype in between),
            *(jax.ShapeDtypeStruct((batch, *output.shape[1:]), output.dtype) for output in outputs),
        ]
        return jax.ffi.ffi_call(name, shapes, vmap_method="sequential")(*arguments)[len(between) :]

    return list(split_over_devices(call, batched)(*arguments))


_recorded: ContextVar[dict | None] = ContextVar("recorded", default=None)
_for_gpu: ContextVar[bool] = ContextVar("for_gpu", default=False)
_portable: ContextVar[dict | None] = ContextVar("portable", default=None)


@contextmanager
def record_kernels(
    for_gpu: bool = False,
) -> Generator[dict[Kernel, list[list[tuple[tuple[int, ...], str]]]]]:
    """Record kernels instead of calling them: for each call, shapes and dtypes of arguments and outputs.

    Kernels are in the order of their first calls. Arguments come first, then outputs. A recorded call returns
    zeros, so this is for tracing alone, as by `jax.eval_shape`. ``for_gpu`` records GPU kernels on any
    machine.
    """
    kernels = {}
    tokens = _recorded.set(kernels), _for_gpu.set(for_gpu)
    try:
        yield kernels
    finally:
        _recorded.reset(tokens[0])
        _for_gpu.reset(tokens[1])


@contextmanager
def portable_calls() -> Generator[dict[str, Kernel]]:
    """Call CPU kernels by names that hold on any machine; the kernels by these names.

    A program that is traced here can be written to a file, and run where `register_provided` was called.
    """
    kernels = {}
    token = _portable.set(kernels)
    try:
        yield kernels
    finally:
        _portable.reset(token)


def portable_name(key: str) -> str:
    """The name in such a program of the custom call of the kernel with this key."""
    return f"shiftaddvit.{store.portable_name(key)}"


@once
def register_provided(key: str) -> str:
    """The name of the custom call of a provided kernel, which programs can call from now on."""
    _choose_waiting()
    return _register_function(store.portable_name(key), library.load_provided(key), platform="cpu")


def provide_kernels(libraries: Mapping[str, Path], threads: int, runtime: Path) -> None:
    """Have this process run CPU kernels that came with a model, see `kernels_tvm.cpu.library.provide`.

    Args:
      libraries: a library by each kernel's key.
      threads: for how many they were compiled.
      runtime: the folder with what they call, for where TVM is not installed.
    """
    provide_runtime(runtime)
    library.provide(libraries, threads)
    unavailable.cache_clear()


@once
def _register(kernel: Kernel) -> str:
    if library.is_provided(kernel.key):
        return register_provided(kernel.key)
    _choose_waiting()
    function = library.load(kernel)
    entry = library.entry_name(kernel, library.kernel_target(kernel), library.thread_count())
    return _register_function(entry, function, platform="cpu")


def _choose_waiting() -> None:
    """Let TVM's waiting threads stay awake longer if one thread calls all kernels.

    With ``jax_cpu_enable_async_dispatch`` off, a program's kernels run in the thread that calls it. TVM's
    threads then stay awake for a millisecond, ready for the next call. `runtime.start` sets the time of other
    programs; a time from the environment is kept.
    """
    if not jax.config.read("jax_cpu_enable_async_dispatch"):
        os.environ.setdefault("TVM_THREAD_POOL_SPIN_COUNT", "2000")


@once
def _register_gpu(kernel: Kernel, target: GpuTarget) -> str:
    # A call does nothing but launch on JAX's stream, so a CUDA graph may record it.
    entry, function = gpu_library.entry_name(kernel, target), gpu_library.load(kernel, target)
    return _register_function(entry, function, platform="gpu", allow_cuda_graph=True)


def _register_function(entry, function, **settings):
    import jax_tvm_ffi

    name = f"shiftaddvit.{entry}"
    jax_tvm_ffi.register_ffi_target(name, function, ["args", "rets"], **settings)
    return name


def unless_differentiated(kernel: Callable, reference: Callable) -> Callable:
    """``kernel`` where its result is not differentiated, ``reference`` alone where it is.

    Both are functions of the same arrays. XLA thus runs a whole training step, and forward mode too.
    """
    function = jax.custom_jvp(kernel)
    function.defjvp(lambda arguments, tangents: jax.jvp(reference, arguments, tangents))
    return function


def where_it_runs(kernel: Callable, reference: Callable) -> Callable:
    """``kernel`` on an NVIDIA GPU, ``reference`` on other devices and where the kernel can't be compiled."""
    return partial(jax.lax.platform_dependent, cuda=where_compiled(kernel, reference), default=reference)


def where_compiled(kernel: Callable, reference: Callable) -> Callable:
    """``kernel``, or ``reference`` and a warning where the kernel can't be compiled."""

    def compiled(*arguments):
        try:
            return kernel(*arguments)
        except RuntimeError as error:  # the compiler failed or is missing; nothing has run yet
            warnings.warn(f"XLA computes what TVM has a kernel for: {error}", stacklevel=2)
            return reference(*arguments)

    return compiled


def with_xla_gradient(forward: Callable, reference: Callable) -> Callable:
    """``forward`` with the derivatives of ``reference``, a function of the same arrays that XLA runs.

    Derivatives work in forward and in reverse mode. The value always comes from ``forward``; ``reference``
    runs only for derivatives.
    """
    function = jax.custom_jvp(forward)

    @function.defjvp
    def derivative(arguments, tangents):
        return function(*arguments), jax.jvp(reference, arguments, tangents)[1]

    return function
