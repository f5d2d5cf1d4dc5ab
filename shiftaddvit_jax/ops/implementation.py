"""The choice between the XLA reference and the TVM kernels, the same for every op."""

from typing import Literal

from shiftaddvit_jax.validation import check_choice

Implementation = Literal["xla", "tvm"] | None


def check_implementation(op: str, implementation: Implementation) -> None:
    """Raise a ``ValueError`` unless ``implementation`` can run ``op`` here.

    ``None`` always can: it stands for the best implementation available, today the XLA path.
    """
    if implementation is None:
        return
    check_choice("implementation", implementation, ("xla", "tvm"))
    if implementation == "tvm":
        raise ValueError(f"{op} has no TVM kernel in this version; use implementation='xla' or None")
