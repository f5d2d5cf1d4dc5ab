"""The search for the fastest tile sizes of a kernel on this machine, one fact of the target at a time.

The schedules are written by hand around a few numbers, so only these are searched: each variant of a kernel
is compiled and timed in this process.
"""

import dataclasses
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from kernels_tvm.cpu.library import build, kernel_target, needed_target, user_records
from kernels_tvm.cpu.targets import Target, thread_count
from kernels_tvm.store import Kernel, replacing

# The values that are tried for each fact, beside the target's own.
CHOICES = {
    "avx2": {
        "float_tile": ((4, 16), (6, 16), (3, 32)),
        "int8_tile": ((3, 16), (4, 16), (6, 16)),
        "strip_bytes": (160 * 1024, 320 * 1024, 640 * 1024),
        "convolved_tokens": (1, 2, 4),
    },
    "avx512": {
        "float_tile": ((6, 64), (12, 32), (4, 96)),
        "int8_tile": ((6, 64), (12, 32)),
        "strip_bytes": (256 * 1024, 512 * 1024, 1024 * 1024),
        "convolved_tokens": (4, 7, 8),
    },
    # The shape of a matrix register is fixed.
    "amx": {"strip_bytes": (256 * 1024, 512 * 1024, 1024 * 1024), "convolved_tokens": (4, 7, 8)},
}
CHOICES |= {"avx_vnni": CHOICES["avx2"], "neon": CHOICES["avx2"], "avx512_vnni": CHOICES["avx512"]}
TILED = ("linear", "head", "mlp", "hamming_linear", "softmax_attention", "binary_softmax", "patch_embed")
ONLY_MLP = ("strip_bytes", "convolved_tokens")
CONFIRMATIONS = 3  # of a gain, measured in turns, since other work of the machine comes and goes

Shapes = Sequence[tuple[tuple[int, ...], str]]


def tune(kernel: Kernel, shapes: Shapes, trials: Callable[[], None]) -> tuple[dict, float, float]:
    """The facts that differ from the target's own, and seconds a call before and after.

    Args:
      kernel: what to tune.
      shapes: shape and dtype of its arguments and outputs, in order.
      trials: called once for each variant that was measured.
    """
    target, threads = kernel_target(kernel), thread_count()
    arrays = [_on_device(array) for array in random_arrays(shapes)]
    before = best = _seconds(kernel, target, threads, arrays)
    for name, values in _facts(kernel, target):
        for value in values:
            variant = dataclasses.replace(target, **{name: value})
            if variant == target:
                continue
            seconds = _seconds(kernel, variant, threads, arrays)
            trials()
            # A smaller gain is noise.
            if seconds < 0.97 * best:
                best, target = seconds, variant
    own, first = needed_target(), kernel_target(kernel)
    if target != first:
        turns = [
            [_seconds(kernel, variant, threads, arrays) for variant in (first, target)]
            for _ in range(CONFIRMATIONS)
        ]
        before, best = np.median(turns, axis=0).tolist()
        if best >= before:
            target, best = first, before
    fields = (field.name for field in dataclasses.fields(Target))
    changed = {name: getattr(target, name) for name in fields if getattr(target, name) != getattr(own, name)}
    return changed, before, best


def count_trials(kernel: Kernel) -> int:
    """How many variants `tune` measures at most."""
    return sum(len(values) for _, values in _facts(kernel, kernel_target(kernel)))


def save_record(kernel: Kernel, facts: dict) -> Path:
    """Write the facts that `tune` found to the user's records, which `library.load` reads."""
    path = user_records(needed_target())
    records = json.loads(path.read_text()) if path.is_file() else {}
    records[kernel.key] = facts
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(records, indent=1, sort_keys=True))
    return path


def _facts(kernel, target) -> Iterator[tuple[str, tuple]]:
    """The facts that the kernel's schedule reads, and the values to try for each."""
    if kernel.name not in TILED:
        return
    int8 = '"int8"' in kernel.key
    for name, values in CHOICES[target.name].items():
        if (kernel.name == "mlp" or name not in ONLY_MLP) and (int8 or name != "int8_tile"):
            yield name, values


def random_arrays(shapes: Shapes) -> list[np.ndarray]:
    """Arguments and outputs to time a kernel with, always the same."""
    rng = np.random.default_rng(0)
    arrays = []
    for shape, dtype in shapes:
        if dtype == "float32":
            array = rng.standard_normal(shape).astype(dtype) * 0.1
        else:
            limits = (-127, 128) if dtype == "int8" else (0, 255)
            array = rng.integers(*limits, shape).astype(dtype)
        arrays.append(array)
    return arrays


def _on_device(array):
    import tvm

    return tvm.runtime.tensor(array)


def _seconds(kernel, target, threads, arrays):
    """The median of short runs, after one to warm up."""
    import tvm

    library = build(kernel, target, threads)
    library["main"](*arrays)
    timer = library.mod.time_evaluator("main", tvm.cpu(), number=3, repeat=15)
    return float(np.median(timer(*arrays).results))
