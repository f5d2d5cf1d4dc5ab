"""A model's own kernels beside what the machine could do at best: the roofline (Williams et al., 2009).

A kernel's bound is the longer of two times: of its products at the peak of a large product in their number
format, and of its bytes, each array once, at the rate at which memory is copied. Both peaks are measured in
the same rounds.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from typing import Any

import jax
import numpy as np

from kernels_tvm.cpu.tuning import random_arrays
from kernels_tvm.descriptions import (
    VALUE_TAPS,
    AttentionDescription,
    BinarySoftmaxDescription,
    DepthwiseConvDescription,
    HammingLinearDescription,
    HeadDescription,
    LinearDescription,
    MlpDescription,
    PatchEmbedDescription,
    SoftmaxAttentionDescription,
)
from kernels_tvm.store import Kernel
from shiftaddvit_jax.bench.kernels import DENSE, KERNELS, Run
from shiftaddvit_jax.bench.rounds import Contestant, time_contestants, versions_of
from shiftaddvit_jax.compile import kernel_calls
from shiftaddvit_jax.models import create_model, model_arguments
from shiftaddvit_jax.ops.implementation.custom_call import call_kernel

COPIED_BYTES = 2**28  # many times a cache
SECONDS_A_KERNEL = 0.2
# The contestants that show the peaks of products in a format, the fastest of which counts.
PEAKS = {"float32": (DENSE,), "int8": ("int8 xla", "int8 onnxruntime")}

Shapes = Sequence[tuple[Sequence[int], str]]


def model_kernel_rows(
    model: Any, *, batch: int, threads: int, rounds: int, shift_share: float
) -> dict[str, Any]:
    """Times, products, bytes and bounds of a model's kernels, in the order of their first calls.

    Args:
      model: on the kernels, with linear layers that they compute.
      batch: images at a time.
      threads: how many each contestant uses.
      rounds: turns of each contestant.
      shift_share: of the tokens that a mixture's shift expert computes; the others are dense products.

    Returns:
      ``versions`` of the installed packages that take part.
      ``peaks``: products a second by number format, and ``memory``, bytes a second.
      ``kernels``: rows with ``name``, ``calls`` in a forward pass, ``median_ms`` of a call, ``products`` by
      number format and ``bytes`` of a call, ``bound_ms``, what it is ``bound_by``, and ``of_bound``, the
      bound over the time. Times hold in caches: a bound by memory can be beaten there.

    Raises:
      ValueError: TVM can't run here, or a contestant's process fails.
    """
    calls = kernel_calls(model, batch)
    arguments, shape = model_arguments(model), KERNELS["peak"].shapes[0]
    kernels = [
        Contestant(
            describe(kernel, index),
            {"runtime": "model_kernel", "model": arguments, "batch": batch, "index": index},
            process="kernels",
        )
        for index, kernel in enumerate(calls)
    ]
    peaks = [
        Contestant(name, {"runtime": "kernel", "kernel": "peak", "contestant": name, "shape": shape}, name)
        for names in PEAKS.values()
        for name in names
    ]
    memory = Contestant("memory", {"runtime": "copy", "bytes": COPIED_BYTES})
    rows = time_contestants([*kernels, *peaks, memory], threads, rounds, SECONDS_A_KERNEL)
    times = {row["name"]: row["median_ms"] for row in rows if "refused" not in row}
    found = {
        number: math.prod(shape) / min(times[name] for name in names if name in times) * 1e3
        for number, names in PEAKS.items()
    }
    # A copy reads and writes.
    found["memory"] = 2 * COPIED_BYTES / times["memory"] * 1e3
    described = []
    for row, (kernel, each) in zip(rows, calls.items(), strict=False):
        if "refused" in row:
            raise ValueError(f"{row['name']} does not run here: {row['refused']}")
        counted = products(kernel, each[-1], shift_share)
        size = sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in each[-1])
        bounds = {number: 1e3 * count / found[number] for number, count in counted.items()}
        # Products of several formats take their times one after the other.
        compute, moved = sum(bounds.values()), 1e3 * size / found["memory"]
        by = max(bounds, key=lambda number: bounds[number]) if compute > moved else "memory"
        described.append(
            {
                "name": row["name"],
                "calls": len(each),
                "median_ms": row["median_ms"],
                "products": dict(counted),
                "bytes": size,
                "bound_ms": max(compute, moved),
                "bound_by": by,
                "of_bound": max(compute, moved) / row["median_ms"],
            }
        )
    return {"versions": versions_of(rows), "peaks": found, "kernels": described}


def products(kernel: Kernel, shapes: Shapes, shift_share: float) -> Counter[str]:
    """The multiply-accumulates, or additions in their place, of one call, by their number format.

    ``"bfloat16"`` counts as float32, which CPUs without AMX make of it; additions of codes' values too.
    """
    first, _ = shapes[0]
    count: Counter[str] = Counter()
    what = kernel.description
    if isinstance(what, LinearDescription):
        return _linear(what, math.prod(first[:-1]), shift_share)
    if isinstance(what, MlpDescription):
        rows = first[0] * what.tokens
        count += _linear(what.fc1, rows, shift_share) + _linear(what.fc2, rows, shift_share)
        count["float32"] += 9 * rows * what.fc1.outputs if what.grid else 0
    elif isinstance(what, AttentionDescription):
        rows = first[0] * what.tokens
        count += _linear(what.qkv, rows, shift_share) + _linear(what.proj, rows, shift_share)
        if isinstance(what, HammingLinearDescription):
            each = 2 * what.head_dim + VALUE_TAPS
        elif isinstance(what, BinarySoftmaxDescription):
            each = what.tokens  # weights times values; products of codes are bits
        else:
            assert isinstance(what, SoftmaxAttentionDescription)
            each = 2 * what.tokens
        count["float32"] += rows * what.channels * each
    elif isinstance(what, PatchEmbedDescription):
        count += _linear(what.projection, first[0] * math.prod(what.grid), shift_share)
    elif isinstance(what, HeadDescription):
        count += _linear(what.projection, first[0], shift_share)
    elif isinstance(what, DepthwiseConvDescription):
        count["float32"] += math.prod(first) * math.prod(what.kernel)
    return count


def _linear(linear, rows, shift_share) -> Counter[str]:
    """The products of a linear layer by the formats of its experts."""
    every = rows * linear.inputs * linear.outputs
    shares = {"dense": 1 - shift_share, "shift": shift_share} if linear.kind == "moe" else {linear.kind: 1}
    count: Counter[str] = Counter()
    for kind, share in shares.items():
        int8 = linear.precision == "int8" if kind == "dense" else linear.activations == "int8"
        count["int8" if int8 else "float32"] += round(share * every)
    return count


def describe(kernel: Kernel, index: int) -> str:
    """A kernel for people: its place in the model, its name and its sizes."""
    what: Any = kernel.description
    if isinstance(what, MlpDescription):
        sizes = what.tokens, what.fc1.inputs, what.fc1.outputs
    elif isinstance(what, AttentionDescription):
        sizes = what.tokens, what.channels
    elif isinstance(what, PatchEmbedDescription):
        sizes = math.prod(what.grid), what.projection.inputs, what.projection.outputs
    elif isinstance(what, HeadDescription):
        sizes = what.projection.inputs, what.projection.outputs
    elif isinstance(what, LinearDescription):
        sizes = what.inputs, what.outputs
    else:
        sizes = ()
    return f"{index + 1} {kernel.name} {'x'.join(map(str, sizes))}".rstrip()


@cache
def _calls(model: str, batch: int):
    return list(kernel_calls(create_model(**json.loads(model)), batch).items())


def model_kernel(model: Mapping[str, Any], batch: int, index: int) -> Run:
    """A run of a model's kernel on random arrays."""
    kernel, calls = _calls(json.dumps(model, sort_keys=True), batch)[index]
    *arguments, output = random_arrays(calls[-1])
    arguments = [jax.numpy.asarray(array) for array in arguments]
    made = [jax.ShapeDtypeStruct(output.shape, output.dtype)]
    program = jax.jit(lambda *arrays: call_kernel(kernel, made, *arrays)[0]).lower(*arguments).compile()
    return lambda: program(*arguments).block_until_ready()


def copy(size: int, threads: int) -> Run:
    """A copy of so many bytes, each thread its part, as kernels read and write them."""
    parts = [np.zeros(size // threads, np.uint8) for _ in range(threads)]
    copies, pool = [np.zeros_like(part) for part in parts], ThreadPoolExecutor(threads)

    def run():
        list(pool.map(np.copyto, copies, parts))

    return run
