"""How fast the kernels and a ShiftAddViT are on this machine's GPU, beside XLA's dense ones.

XLA's products are timed in each format in which GPUs multiply what is given in float32: float32 itself,
TensorFloat-32 (10 bits of mantissa) and bfloat16.

Contestants take turns. A turn enqueues a program several times and waits for the last result; the report has
the turn's time over the number of calls, so that launches overlap as they do in use. The report's keys are
those of `shiftaddvit_jax.bench.models`.
"""

import math
import time
from collections.abc import Callable, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from shiftaddvit_jax.balance import router_biases, with_router_biases
from shiftaddvit_jax.bench.kernels import DENSE, normal
from shiftaddvit_jax.bench.rounds import summarize
from shiftaddvit_jax.bench.synthetic import random_variables
from shiftaddvit_jax.costs.shapes import PAPER_CONTEXTS, PAPER_LAYERS
from shiftaddvit_jax.models import create_model, model_arguments, model_row
from shiftaddvit_jax.models.registry import check_classifier
from shiftaddvit_jax.nn.moe import ShiftShare
from shiftaddvit_jax.ops import matadd, pack_weight, packed_product, power_of_two
from shiftaddvit_jax.ops.activations import Activations
from shiftaddvit_jax.ops.precision import Precision
from shiftaddvit_jax.pack import pack
from shiftaddvit_jax.progress import track

CALLS, WARM_UP = 20, 3
BATCHES = (1, 32)
# Of XLA's dense products: JAX's name of the precision of a product, and the dtype of its factors.
DENSE_FORMATS = {
    "float32": ("highest", jnp.float32),
    "TF32": ("tensorfloat32", jnp.float32),
    "bfloat16": ("default", jnp.bfloat16),
}

Program = Callable[[], jax.Array]  # enqueues


def bench_gpu_kernels(rounds: int) -> dict[str, Any]:
    """Times of MatShift and MatAdd at the paper's shapes, for 1 and 32 images, and of XLA's dense products.

    Raises:
      ValueError: JAX has no GPU here.
    """
    _check_gpu()
    rows = []
    cases = [(batch, shape) for batch in BATCHES for shape in PAPER_LAYERS + PAPER_CONTEXTS]
    for batch, shape in track(cases, "timing", len(cases)):
        if len(shape) == 3:
            name, contestants = "matshift", _layer_contestants(batch * shape[0], *shape[1:])
        else:
            name, contestants = "matadd", _context_contestants(batch, *shape)
        operations = 2 * batch * math.prod(shape)
        for row in _time(contestants, DENSE, rounds):
            row["giga_operations_a_second"] = operations / row["median_ms"] / 1e6
            row["name"] = f"{name} {'x'.join(map(str, shape))} batch {batch} {row['name']}"
            rows.append(row)
    return _report(rounds, rows)


def bench_gpu_model(
    name: str,
    *,
    rounds: int,
    batch: int,
    image_size: int | None,
    activations: Activations,
    precision: Precision,
    shift_share: ShiftShare,
    **kinds,
) -> dict[str, Any]:
    """Times of a packed ShiftAddViT on the kernels and on XLA, and of the dense models.

    Arguments are those of `bench_model`. Ratios are to the ShiftAddViT with TVM's kernels.

    Raises:
      ValueError: JAX has no GPU here, or a wrong name or number.
    """
    _check_gpu()
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    formats = {"activations": activations, "precision": precision}
    student = create_model(name, image_size=image_size, **formats, **kinds)
    check_classifier(student, "this benchmark")
    images = normal(batch, student.image_size, student.image_size, 3)
    variables = random_variables(student)
    biases = router_biases(student, variables, images, shift_share)
    packed = pack(student, with_router_biases(variables, biases))
    models = {
        f"ShiftAddViT {implementation}": (
            create_model(**model_arguments(student) | {"implementation": implementation}),
            packed,
        )
        for implementation in ("tvm", "xla")
    }
    for kind in ("msa", "sra"):
        if kind in model_row(name)["attention"]:
            for numbers, (_, dtype) in DENSE_FORMATS.items():
                dense = create_model(name, image_size=student.image_size, attention=kind, dtype=dtype)
                models[f"JAX {kind} {numbers}"] = dense, random_variables(dense)
    # What a ShiftAddViT multiplies on XLA, too, has the formats that its `precision` says.
    numbers = {contestant: contestant.split()[-1] for contestant in models}
    numbers = {name: found if found in DENSE_FORMATS else precision for name, found in numbers.items()}
    contestants = {
        contestant: _program(model.apply, variables, images, matmul=DENSE_FORMATS[numbers[contestant]][0])
        for contestant, (model, variables) in models.items()
    }
    rows = _time(contestants, "ShiftAddViT tvm", rounds)
    for row in rows:
        row["precision"] = numbers[row["name"]]
    about: dict[str, Any] = {"model": model_arguments(student), "batch": batch}
    about["shift_share"] = shift_share if biases else None
    return _report(rounds, rows) | about


def _check_gpu():
    if jax.default_backend() != "gpu":
        raise ValueError(
            "JAX finds no NVIDIA GPU here; run this where there is one (pip install 'shiftaddvit-jax[gpu]'), "
            "or see `shiftaddvit gpu-report`, which needs none"
        )


def _program(function, *arguments, matmul: str = "highest") -> Program:
    """``function`` of the arguments, compiled, its products in the precision of that name."""
    arguments = jax.device_put(arguments)
    with jax.default_matmul_precision(matmul):
        compiled = jax.jit(function).lower(*arguments).compile()
    return lambda: compiled(*arguments)


def _dense_products(a, b) -> dict[str, Program]:
    """XLA's products in every format, float32 by the name that others are compared with."""
    return {
        f"dense {numbers}": _program(jnp.matmul, a.astype(dtype), b.astype(dtype), matmul=matmul)
        for numbers, (matmul, dtype) in DENSE_FORMATS.items()
    }


def _layer_contestants(rows: int, inputs: int, outputs: int) -> dict[str, Program]:
    x, weight = normal(rows, inputs), normal(inputs, outputs)
    powers = power_of_two(jnp.asarray(weight / 16))

    def packed(implementation, activations):
        weight = pack_weight(powers, 4 if activations == "int8" else 5)
        return _program(
            lambda x, weight: packed_product(x, weight, outputs, activations, implementation), x, weight
        )

    return {
        **_dense_products(x, weight),
        "tvm": packed("tvm", "float"),
        "tvm_shift": packed("tvm_shift", "float"),
        "tvm int8": packed("tvm", "int8"),
        "tvm_shift int8": packed("tvm_shift", "int8"),
    }


def _context_contestants(
    batch: int, tokens: int, head_dim: int, codes: int, heads: int
) -> dict[str, Program]:
    rng = np.random.default_rng(0)
    k = rng.integers(0, 2, (batch * heads, codes, tokens)).astype(np.float32)
    v = normal(batch * heads, tokens, head_dim)
    integers = rng.integers(-127, 128, v.shape).astype(np.int8)
    return {
        **_dense_products(k, v),
        "tvm": _program(lambda k, v: matadd(k, v, "tvm"), k, v),
        "tvm int8": _program(lambda k, v: matadd(k, v, "tvm"), k.astype(np.int8), integers),
    }


def _time(contestants: dict[str, Program], reference: str, rounds: int) -> list[dict[str, Any]]:
    """A row for each contestant; contestants take turns."""
    times = {name: [] for name in contestants}
    for turn in range(-WARM_UP, rounds):
        for name, program in contestants.items():
            start = time.perf_counter()
            result = program()
            for _ in range(CALLS - 1):
                result = program()
            result.block_until_ready()
            if turn >= 0:
                times[name].append(1e3 * (time.perf_counter() - start) / CALLS)
    rows: list[dict[str, Any]] = [{"name": name, **summarize([found])} for name, found in times.items()]
    (expected,) = (row["median_ms"] for row in rows if row["name"] == reference)
    return [row | {"reference": reference, "ratio": row["median_ms"] / expected} for row in rows]


def _report(rounds: int, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    device = jax.devices()[0]
    machine = {"gpu": device.device_kind, "compute_capability": device.compute_capability}
    packages = ("jax", "jaxlib", "apache-tvm", "apache-tvm-ffi")
    versions = {package: metadata.version(package) for package in packages}
    return {"machine": machine, "versions": versions, "rounds": rounds, "rows": list(rows)}
