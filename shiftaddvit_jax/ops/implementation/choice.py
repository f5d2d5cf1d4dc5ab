"""The choice between the XLA reference and the TVM kernels, the same for every op."""

from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from shiftaddvit_jax.names import IMPLEMENTATIONS
from shiftaddvit_jax.ops.implementation.custom_call import (
    on_gpu,
    recording_for_gpu,
    unavailable,
    unless_differentiated,
    where_it_runs,
    with_xla_gradient,
)
from shiftaddvit_jax.validation import check_choice

# "tvm_shift" is "tvm" with MatShift's products made of shifts and additions alone: its int8 products, and on
# GPUs its float32 ones too.
Implementation = Literal["xla", "tvm", "tvm_shift"] | None


def run_op(
    op: str,
    implementation: Implementation,
    kernel: Callable,
    reference: Callable,
    *arrays: PyTree,
    unsupported: str | None = None,
    prefer: bool | None = None,
) -> Any:
    """What an op computes from ``arrays``: by its TVM kernel, or by its reference, which XLA runs.

    Both are functions of the arrays. The other arguments, and the errors, are those of `uses_tvm`.
    """
    if not uses_tvm(op, implementation, unsupported, prefer, arrays):
        return reference(*arrays)
    return with_gradient(implementation, kernel, reference)(*arrays)


def uses_tvm(
    op: str,
    implementation: Implementation,
    unsupported: str | None = None,
    prefer: bool | None = None,
    arrays: PyTree = (),
) -> bool:
    """Whether ``op`` is to run its TVM kernel.

    ``None`` takes it where it is the better choice and runs here, and XLA otherwise.

    Args:
      op: its name, for messages.
      implementation: what the caller asked for.
      unsupported: why there is no kernel for these shapes or dtypes, None if there is one.
      prefer: whether the kernel is the better choice, as where weights are packed; by default it is on GPUs.
      arrays: what the op computes from. Empty ones are left to XLA: no kernel takes them.

    Raises:
      ValueError: an unknown implementation, or TVM asked for where it can't run.
    """
    check_implementation(implementation)
    prefer = on_gpu() if prefer is None else prefer
    if implementation == "xla" or (implementation is None and not prefer):
        return False
    reason = unsupported or (None if recording_for_gpu() else unavailable())
    if reason and implementation is not None:
        raise ValueError(f"{op} can't run on TVM here: {reason}; use implementation='xla' or None")
    empty = any(array.size == 0 for array in jax.tree.leaves(arrays))
    return reason is None and not empty


def with_gradient(implementation: Implementation, kernel: Callable, reference: Callable) -> Callable:
    """``kernel``, a function of arrays, with the gradient of ``reference``, which is XLA's.

    ``None`` leaves the forward pass that a gradient needs to XLA too, on GPUs, where training is XLA's.
    """
    if implementation is None and on_gpu():
        return unless_differentiated(where_it_runs(kernel, reference), reference)
    return with_xla_gradient(kernel, reference)


def float32_only(*arrays: Array) -> str | None:
    """Why arrays have no kernel that computes in float32, None if they have one."""
    others = [str(array.dtype) for array in arrays if array.dtype != jnp.float32]
    return f"its kernel computes in float32, not {others[0]}" if others else None


def check_implementation(implementation: Implementation) -> None:
    """Raise a ``ValueError`` for an unknown implementation."""
    if implementation is not None:
        check_choice("implementation", implementation, IMPLEMENTATIONS)
