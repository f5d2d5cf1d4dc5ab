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
    where_compiled,
    where_it_runs,
    with_xla_gradient,
)
from shiftaddvit_jax.validation import check_choice

# "tvm_shift" is "tvm", but MatShift's int8 products use shifts and additions alone; on GPUs its float32
# products do too.
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
    """The result of an op on ``arrays``, from its TVM kernel or from its reference, which XLA runs.

    ``kernel`` and ``reference`` are functions of the arrays. `uses_tvm` describes the other arguments and the
    errors.
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
    """Whether ``op`` runs its TVM kernel.

    With ``None``, the kernel runs where it can and is the better choice; otherwise XLA runs.

    Args:
      op: the op's name, for messages.
      implementation: what the caller asked for.
      unsupported: why there is no kernel for these shapes or dtypes, None if there is one.
      prefer: whether the kernel is the better choice, for instance because weights are packed; by default,
        whether kernels run on a GPU.
      arrays: the op's inputs. If one is empty, XLA runs: no kernel takes empty arrays.

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
    """``kernel`` with the gradient of ``reference``, which XLA runs; both are functions of the same arrays.

    With ``None``, XLA runs what can't be compiled. On GPUs all training is XLA's: there, with ``None``, XLA
    also runs the forward pass of a gradient.
    """
    if implementation is None and on_gpu():
        return unless_differentiated(where_it_runs(kernel, reference), reference)
    if implementation is None:
        kernel = where_compiled(kernel, reference)
    return with_xla_gradient(kernel, reference)


def float32_only(*arrays: Array) -> str | None:
    """Why a kernel that computes in float32 can't take ``arrays``, None if it can."""
    others = [str(array.dtype) for array in arrays if array.dtype != jnp.float32]
    return f"its kernel computes in float32, not {others[0]}" if others else None


def check_implementation(implementation: Implementation) -> None:
    """Raise a ``ValueError`` for an unknown implementation."""
    if implementation is not None:
        check_choice("implementation", implementation, IMPLEMENTATIONS)
