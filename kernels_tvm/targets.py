"""The choice of a target by its name, for CPUs and for GPUs."""

from collections.abc import Sequence


def choose_target(name: str, targets: Sequence):
    """The one of ``targets`` that has that name.

    Raises:
      ValueError: no target has it.
    """
    for target in targets:
        if target.name == name:
            return target
    raise ValueError(f"unknown target {name!r}; choose among {', '.join(t.name for t in targets)}")
