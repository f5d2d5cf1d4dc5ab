"""TVM kernels as JAX custom calls."""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache

import jax
import jax.numpy as jnp
from jaxtyping import Array

from kernels_tvm import library


@cache
def unavailable() -> str | None:
    """Why no TVM kernel runs here, in one line; None if they do."""
    if jax.default_backend() != "cpu":
        return f"TVM kernels run on CPU, and JAX runs on {jax.default_backend()!r}"
    if not library.is_installed():
        return "TVM is not installed (pip install 'shiftaddvit-jax[tvm]')"
    if library.host_target() is None:
        return "this CPU is not among the kernels' targets"
    return None


def call_kernel(
    kernel: library.Kernel, outputs: Sequence[jax.ShapeDtypeStruct], *arguments: Array
) -> list[Array]:
    """The outputs of a kernel. No gradient; under vmap it is called once for each element."""
    recorded = _recorded.get()
    if recorded is not None:
        recorded[kernel] = [(array.shape, array.dtype.name) for array in (*arguments, *outputs)]
        return [jnp.zeros(output.shape, output.dtype) for output in outputs]
    return jax.ffi.ffi_call(_register(kernel), list(outputs), vmap_method="sequential")(*arguments)


_recorded: ContextVar[dict | None] = ContextVar("recorded", default=None)


@contextmanager
def record_kernels() -> Iterator[dict[library.Kernel, list[tuple[tuple[int, ...], str]]]]:
    """Within it, calls are noted instead of made: kernels, with the shapes and dtypes they are called with.

    Outputs follow arguments. For tracing alone, as by `jax.eval_shape`.
    """
    kernels = {}
    token = _recorded.set(kernels)
    try:
        yield kernels
    finally:
        _recorded.reset(token)


@cache
def _register(kernel: library.Kernel) -> str:
    # The bridge imports torch, where it is installed, for conversions that nothing here needs.
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")
    import jax_tvm_ffi

    function = library.load(kernel)
    name = "shiftaddvit." + library.entry_name(kernel, library.kernel_target(kernel), library.thread_count())
    jax_tvm_ffi.register_ffi_target(name, function, ["args", "rets"], platform="cpu")
    return name


def with_xla_gradient(forward: Callable, reference: Callable) -> Callable:
    """``forward``, with the gradient of ``reference``: a function of the same arrays that XLA runs."""

    @jax.custom_vjp
    def function(*arguments):
        return forward(*arguments)

    def backward(arguments, gradient):
        return jax.vjp(reference, *arguments)[1](gradient)

    function.defvjp(lambda *arguments: (forward(*arguments), arguments), backward)
    return function
