"""How fast a ShiftAddViT is here, beside its dense model in JAX and in other runtimes.

`bench_model`, `bench_kernels` and `bench_model_kernels` return, and ``shiftaddvit bench --json`` writes,

- ``machine``: ``cpu``, ``system``, ``cores``, ``threads``, see `describe_machine`;
- ``versions`` of the installed packages that take part;
- ``rounds`` and ``seconds_a_turn``: how it was measured, see `shiftaddvit_jax.bench.rounds`;
- for a model: ``model``, the arguments of `create_model` for the ShiftAddViT; ``batch``; and ``shift_share``,
  one number or one for each MoE layer, null without MoE layers; ``unit``, ``"image"`` or ``"ray"``;
  ``best_rivals``, see `best_rivals`;
- ``rows``, see `time_contestants`: ``name``, ``task``, ``start_s``, and either ``refused`` or ``runs``,
  ``median_ms``, ``p10_ms``, ``p90_ms``, ``reference`` and ``ratio``. A model's row adds ``precision``. A
  dense model's row adds ``logit_error``, the largest difference of its logits from JAX's over the largest of
  JAX's. A kernel's row adds ``giga_operations_a_second``, which counts a multiply-accumulate as two.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np

from shiftaddvit_jax.balance import router_biases
from shiftaddvit_jax.bench.kernels import KERNELS, kernel_contestants
from shiftaddvit_jax.bench.roofline import model_kernel_rows
from shiftaddvit_jax.bench.rounds import Contestant, describe_machine, time_contestants, versions_of
from shiftaddvit_jax.bench.synthetic import random_examples, random_variables
from shiftaddvit_jax.checkpoints import save_onnx, save_safetensors
from shiftaddvit_jax.models import (
    PyramidVisionTransformerV2,
    create_model,
    model_arguments,
    model_row,
)
from shiftaddvit_jax.models.inspect import by_name
from shiftaddvit_jax.models.pyramid import reductions
from shiftaddvit_jax.models.variables import example_batch, variable_shapes
from shiftaddvit_jax.names import IMPLEMENTATIONS, SHIFT_SHARE
from shiftaddvit_jax.nn.moe import ShiftShare
from shiftaddvit_jax.ops.activations import Activations
from shiftaddvit_jax.ops.precision import Precision
from shiftaddvit_jax.optional import require
from shiftaddvit_jax.validation import check_choice

# The packages that a peer needs.
PEERS = {
    "onnxruntime": ("onnxruntime", "onnx"),
    "onnxruntime-int8": ("onnxruntime", "onnx"),
    "openvino": ("openvino", "onnx"),
    "openvino-int8": ("openvino", "nncf", "onnx"),
    "torch": ("torch", "transformers"),
}
SECONDS_A_TURN, SECONDS_A_KERNEL = 0.4, 0.1
LARGEST_LOGIT_ERROR = 1e-3  # in float32; a runtime that is further off computes something else


def bench_model(
    name: str,
    *,
    threads: int,
    rounds: int,
    batch: int = 1,
    image_size: int | None = None,
    attention: str | Sequence[str] = "hamming_linear",
    mlp: str | Sequence[str] = "moe",
    projections: str | Sequence[str] = "dense",
    activations: Activations = "float",
    precision: Precision = "float32",
    shift_share: ShiftShare = SHIFT_SHARE,
    implementations: Sequence[str] = ("tvm", "xla"),
    peers: Sequence[str] = (),
) -> dict[str, Any]:
    """Times of the ShiftAddViT, and of the dense models with ``msa`` and ``sra`` in JAX and in every peer.

    A model that renders views is timed from the samples of rays on, see `Samples`.

    All models have random weights and see the same random images. The ShiftAddViT's routers share tokens out
    like trained ones, see `router_biases`. Ratios are to the first of ``implementations`` that runs.

    Args:
      name: one of `list_models`, of any task.
      threads: how many each contestant uses.
      rounds: turns of each contestant.
      batch: images or rays at a time.
      image_size: side of the images in pixels; by default the model's own.
      attention: the ShiftAddViT's kind, see `create_model`.
      mlp: the same.
      projections: the same.
      activations: the same.
      precision: the same.
      shift_share: the share of tokens that each MoE layer sends to its shift expert: one number for all
        layers, or one for each by its name.
      implementations: those to time the ShiftAddViT with, in this order.
      peers: names in `PEERS`.

    Raises:
      ValueError: a wrong name; a number out of range; a peer that is not installed or lacks the model; or a
        runtime whose logits differ from JAX's.
    """
    machine = describe_machine(threads)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    for implementation in implementations:
        check_choice("implementation", implementation, IMPLEMENTATIONS)
    kinds = {"attention": attention, "mlp": mlp, "projections": projections}
    formats = {"activations": activations, "precision": precision}
    student = create_model(name, image_size=image_size, **formats, **kinds)
    originals = _dense_models(name, image_size)
    for model in (student, *originals.values()):
        variable_shapes(model)  # refuses an image size that does not fit
    check_peers(peers, student)

    sides = {name: shape.shape for name, shape in by_name(example_batch(student, batch)).items()}
    students = {
        f"ShiftAddViT {implementation}": model_arguments(student) | {"implementation": implementation}
        for implementation in implementations
    }
    biases = router_biases(student, random_variables(student), random_examples(sides), shift_share)
    tasks = {
        name: {"runtime": "jax", "model": model, "router_biases": biases} for name, model in students.items()
    }
    with tempfile.TemporaryDirectory() as folder:
        for kind, model in originals.items():
            dense = {f"JAX {kind}": {"runtime": "jax", "model": model_arguments(model)}}
            dense |= _peer_tasks(kind, model, peers, batch, Path(folder))
            tasks |= {name: task | {"attention": kind} for name, task in dense.items()}
        contestants = [
            Contestant(name, task | {"examples": sides}, references=tuple(students))
            for name, task in tasks.items()
        ]
        rows = time_contestants(contestants, threads, rounds, SECONDS_A_TURN)
    _compare_logits(rows)
    about: dict[str, Any] = {
        "model": model_arguments(student),
        "batch": batch,
        "unit": "image" if "images" in sides else "ray",
        "seconds_a_turn": SECONDS_A_TURN,
    }
    about["shift_share"] = shift_share if biases else None
    about["best_rivals"] = best_rivals(rows)
    return _report(machine, rounds, rows) | about


def subject_of(report: Mapping[str, Any]) -> str:
    """What was timed, in words: the model, and how many images of which size, or rays, at a time."""
    model, batch = report["model"], report["batch"]
    if report.get("unit") == "ray":
        return f"{model['name']}, {batch} rays"
    return f"{model['name']}, {batch} x {model['image_size']} x {model['image_size']}"


def best_rivals(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of each attention, the fastest row that is not JAX's, in any number format: ``name`` and ``ratio``."""
    rivals: dict[str, dict[str, Any]] = {}
    for row in rows:
        kind = row["task"].get("attention")
        if kind is None or row["task"]["runtime"] == "jax" or "ratio" not in row:
            continue
        if kind not in rivals or row["ratio"] < rivals[kind]["ratio"]:
            rivals[kind] = {"name": row["name"], "ratio": row["ratio"]}
    return rivals


def bench_kernels(*, threads: int, rounds: int) -> dict[str, Any]:
    """Times of all `KERNELS`. Ratios are to XLA's dense float32 product of the same shape.

    Raises:
      ValueError: a number out of range.
    """
    machine = describe_machine(threads)
    rows = time_contestants(kernel_contestants(), threads, rounds, SECONDS_A_KERNEL)
    for row in rows:
        if "refused" not in row:
            task = row["task"]
            operations = 2 * KERNELS[task["kernel"]].operations(task["shape"])
            row["giga_operations_a_second"] = operations / row["median_ms"] / 1e6
    return _report(machine, rounds, rows) | {"seconds_a_turn": SECONDS_A_KERNEL}


def bench_model_kernels(
    name: str,
    *,
    threads: int,
    rounds: int,
    batch: int = 1,
    image_size: int | None = None,
    shift_share: float = SHIFT_SHARE,
    **settings: Any,
) -> dict[str, Any]:
    """Times of a ShiftAddViT's own kernels beside their bounds, see `model_kernel_rows`.

    Args:
      name: one of `list_models`.
      threads: how many each contestant uses.
      rounds: turns of each contestant.
      batch: images at a time.
      image_size: side of the images in pixels; by default the model's own.
      shift_share: of the tokens that a mixture's shift expert computes.
      settings: of `create_model`.

    Raises:
      ValueError: a wrong name, a number out of range, or TVM can't run here.
    """
    machine = describe_machine(threads)
    model = create_model(name, image_size=image_size, implementation="tvm", **settings)
    found = model_kernel_rows(model, batch=batch, threads=threads, rounds=rounds, shift_share=shift_share)
    about = {"model": model_arguments(model), "batch": batch, "unit": "image", "shift_share": shift_share}
    return {"machine": machine, "rounds": rounds} | about | found


def check_peers(peers: Sequence[str], model: nn.Module) -> None:
    """Raise a ``ValueError`` unless each of ``peers`` is one of `PEERS`, installed, and has ``model``."""
    for peer in peers:
        check_choice("peer", peer, PEERS)
        require("peers", f"the peer {peer}", *PEERS[peer])
    if "torch" in peers and not isinstance(model, PyramidVisionTransformerV2):
        raise ValueError(f"the peer torch has PVTv2 alone, not {model.variant}; leave it out of --peers")


def _dense_models(name, image_size):
    """The dense models to compare with, by attention: ``msa``, and ``sra`` where the family has it."""
    kinds = [kind for kind in ("msa", "sra") if kind in model_row(name)["attention"]]
    return {kind: create_model(name, image_size=image_size, attention=kind) for kind in kinds}


def _peer_tasks(kind, model, peers, batch, folder):
    """A worker's tasks for one dense model, by name; the model's weights are written into ``folder``."""
    variables = random_variables(model)
    file, weights = str(folder / f"{kind}.onnx"), str(folder / f"{kind}.safetensors")
    if set(peers) - {"torch"}:
        save_onnx(model, variables, file, batch=batch)
    tasks: dict[str, dict[str, Any]] = {}
    if "onnxruntime" in peers:
        tasks[f"ONNX Runtime {kind}"] = {"runtime": "onnxruntime", "file": file}
    if "onnxruntime-int8" in peers:
        for quantization in ("dynamic", "static"):
            task = {"runtime": "onnxruntime", "file": file, "quantization": quantization}
            tasks[f"ONNX Runtime {kind}, int8 {quantization}"] = task
    if "openvino" in peers:
        for precision in ("float32", "default"):
            task = {"runtime": "openvino", "file": file, "precision": precision}
            tasks[f"OpenVINO {kind}, {precision}"] = task
    if "openvino-int8" in peers:
        tasks[f"OpenVINO {kind}, int8"] = {"runtime": "openvino", "file": file, "precision": "int8"}
    if "torch" in peers:
        save_safetensors(model, variables, weights)
        config = {
            "image_size": model.image_size,
            "num_labels": model.num_classes,
            "hidden_sizes": model.embed_dims,
            "depths": model.depths,
            "num_attention_heads": model.num_heads,
            "mlp_ratios": model.mlp_ratios,
            "sr_ratios": reductions(model),
            "layer_norm_eps": 1e-6,
        }
        tasks[f"PyTorch {kind}"] = {"runtime": "torch", "config": config, "weights": weights}
    return tasks


def _compare_logits(rows):
    """Replace each row's ``logits`` by ``logit_error``; raise a ``ValueError`` if an error is too large."""
    logits = {row["name"]: np.array(row.pop("logits")) for row in rows if "logits" in row}
    for row in rows:
        if row["name"] not in logits or "attention" not in row["task"]:
            continue
        expected = logits[f"JAX {row['task']['attention']}"]
        error = float(abs(logits[row["name"]] - expected).max() / abs(expected).max())
        row["logit_error"] = error
        if row["precision"] == "float32" and not error < LARGEST_LOGIT_ERROR:
            raise ValueError(
                f"{row['name']} computes another model: its logits are off by {error:.1%} of JAX's largest"
            )


def _report(machine, rounds, rows):
    versions = versions_of(rows)
    rows = [{key: value for key, value in row.items() if key != "versions"} for row in rows]
    return {"machine": machine, "versions": versions, "rounds": rounds, "rows": rows}
