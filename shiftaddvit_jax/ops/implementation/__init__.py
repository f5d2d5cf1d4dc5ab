"""Below every op: the choice between XLA and the TVM kernels, and the kernels as custom calls."""

from shiftaddvit_jax.ops.implementation.choice import (
    IMPLEMENTATIONS,
    Implementation,
    check_implementation,
    float32_only,
    run_op,
    uses_tvm,
    with_gradient,
)

__all__ = [
    "IMPLEMENTATIONS",
    "Implementation",
    "check_implementation",
    "float32_only",
    "run_op",
    "uses_tvm",
    "with_gradient",
]
