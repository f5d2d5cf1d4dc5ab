"""The choice between the XLA reference and the TVM kernels, the same for every op."""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array

from shiftaddvit_jax.ops.custom_call import recording_for_gpu, unavailable
from shiftaddvit_jax.validation import check_choice

# "tvm_shift" is "tvm" with MatShift's products made of shifts and additions alone: its int8 products, and on
# GPUs its float32 ones too.
Implementation = Literal["xla", "tvm", "tvm_shift"] | None
IMPLEMENTATIONS = ("xla", "tvm", "tvm_shift")


def uses_tvm(
    op: str, implementation: Implementation, unsupported: str | None = None, prefer: bool = False
) -> bool:
    """Whether ``op`` is to run its TVM kernel.

    ``None`` takes it where ``prefer`` says that it is the better choice (weights are packed, so this is
    inference) and it runs here, and XLA otherwise.

    Args:
      op: its name, for messages.
      implementation: what the caller asked for.
      unsupported: why there is no kernel for these shapes or dtypes, None if there is one.
      prefer: whether the kernel is what None stands for.

    Raises:
      ValueError: an unknown implementation, or TVM asked for where it can't run.
    """
    check_implementation(implementation)
    if implementation == "xla" or (implementation is None and not prefer):
        return False
    reason = unsupported or (None if recording_for_gpu() else unavailable())
    if reason and implementation is not None:
        raise ValueError(f"{op} can't run on TVM here: {reason}; use implementation='xla' or None")
    return reason is None


def float32_only(*arrays: Array) -> str | None:
    """Why arrays have no kernel that computes in float32, None if they have one."""
    others = [str(array.dtype) for array in arrays if array.dtype != jnp.float32]
    return f"its kernel computes in float32, not {others[0]}" if others else None


def check_implementation(implementation: Implementation) -> None:
    """Raise a ``ValueError`` for an unknown implementation."""
    if implementation is not None:
        check_choice("implementation", implementation, IMPLEMENTATIONS)
