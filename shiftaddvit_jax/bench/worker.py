"""The process in which a contestant of a benchmark lives, see `shiftaddvit_jax.bench.rounds`.

It reads requests and writes replies. Both are JSON objects, one a line:

- ``{"load": task}`` prepares what the task describes and runs it once. The reply has ``start_s``, the seconds
  that this took, and facts about the contestant (``versions``, ``precision``, ``logits``). If the load raises
  a ``ValueError``, the reply is ``{"refused": message}``.
- ``{"run": index, "seconds": s}`` runs what the ``index``-th load prepared, first unmeasured, then at least
  three times and until ``s`` seconds are over. The reply is ``{"times_ms": [...]}``. If the load prepared
  several ways to run, the fastest in a few runs before the turn is timed.

If anything else goes wrong, the reply is ``{"failed": message}``.

A task's ``runtime`` is ``"jax"``, ``"onnxruntime"``, ``"openvino"``, ``"torch"``, ``"kernel"``,
``"model_kernel"`` or ``"copy"``. The
function ``load_RUNTIME`` says what else the task holds. Every model's task has the shapes of its ``examples``
by their names, such as ``images``, [batch, height, width, 3], and a dense model's task its ``attention``.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import jax
import numpy as np

from shiftaddvit_jax.balance import with_router_biases
from shiftaddvit_jax.bench.kernels import KERNELS
from shiftaddvit_jax.bench.quantized import (
    quantize_for_onnxruntime,
    quantize_for_openvino,
    runtime_inputs,
)
from shiftaddvit_jax.bench.roofline import copy, model_kernel
from shiftaddvit_jax.bench.rounds import Run, installed_versions, time_runs
from shiftaddvit_jax.bench.synthetic import random_examples, random_variables
from shiftaddvit_jax.models import create_model
from shiftaddvit_jax.models.inspect import run
from shiftaddvit_jax.pack import pack

Loaded = tuple[list[Run], dict[str, Any]]  # ways to run the contestant, and facts about it


def time_fastest(runs: Sequence[Run], seconds: float) -> list[float]:
    """`time_runs` of the one of ``runs`` that is the fastest just now."""
    if len(runs) == 1:
        return time_runs(runs[0], seconds)
    return time_runs(min(runs, key=lambda run: statistics.median(time_runs(run, 0.0))), seconds)


def load_jax(task: dict[str, Any], threads: int) -> Loaded:
    """``model`` holds arguments of `create_model`, ``router_biases``, if given, those of `router_biases`.

    The weights are constants of the program, as in the peers.
    """
    _compute_in_the_asking_thread()
    model = create_model(**task["model"])
    # Making variables needs no kernel: those of any implementation are the same.
    original = create_model(**task["model"] | {"implementation": None})
    variables = with_router_biases(random_variables(original), task.get("router_biases", {}))
    if task["model"]["implementation"] in ("tvm", "tvm_shift"):
        variables = pack(original, variables)
    examples = jax.tree.map(jax.numpy.asarray, random_examples(task["examples"]))
    forward = jax.jit(partial(run, model, variables)).lower(examples).compile()
    versions = installed_versions("jax", "jaxlib", "apache-tvm")
    about = {"versions": versions, "precision": model.primitives.precision}
    return [lambda: forward(examples).block_until_ready()], about


def load_onnxruntime(task: dict[str, Any], threads: int) -> Loaded:
    """``file`` is an ONNX file. It runs in two ways: threads that wait for work spin, or they sleep.

    Spinning is some percent faster on idle cores, and far slower on cores that others use. ``quantization``,
    if given, is ``"dynamic"`` or ``"static"``: then products are in int8.
    """
    import onnxruntime

    inputs, file = _inputs(task), task["file"]
    if "quantization" in task:
        file = quantize_for_onnxruntime(file, task["quantization"], task["examples"])

    def make(spinning):
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spinning)))
        session = onnxruntime.InferenceSession(file, options, providers=["CPUExecutionProvider"])
        return lambda: session.run(None, inputs)[0]

    precision = "int8" if "quantization" in task else "float32"
    about = {"versions": installed_versions("onnxruntime"), "precision": precision}
    return [make(spinning=True), make(spinning=False)], about


def load_openvino(task: dict[str, Any], threads: int) -> Loaded:
    """``file`` is an ONNX file; ``precision`` is ``"float32"``, ``"int8"``, by NNCF, or ``"default"``.

    By default OpenVINO chooses itself.
    """
    import openvino

    file, quantized = task["file"], task["precision"] == "int8"
    if quantized:
        file = quantize_for_openvino(file, task["examples"])
    settings = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"}
    if task["precision"] == "float32":
        settings["INFERENCE_PRECISION_HINT"] = "f32"
    compiled = openvino.Core().compile_model(file, "CPU", settings)
    precision = compiled.get_property("INFERENCE_PRECISION_HINT").to_string()
    precision = {"f32": "float32", "bf16": "bfloat16", "f16": "float16"}.get(precision, precision)
    if task["precision"] == "default" and precision == "float32":
        raise ValueError("float32 is its default on this machine")
    request, inputs = compiled.create_infer_request(), _inputs(task)
    precision = "int8" if quantized else precision
    about = {"versions": installed_versions("openvino", *["nncf"] * quantized), "precision": precision}
    return [lambda: request.infer(inputs, share_inputs=True)[0]], about


def load_torch(task: dict[str, Any], threads: int) -> Loaded:
    """``config`` is that of transformers' PVTv2, ``weights`` a file of `save_safetensors`."""
    import torch
    from safetensors.torch import load_file
    from transformers import PvtV2Config, PvtV2ForImageClassification

    torch.set_num_threads(threads)
    model = PvtV2ForImageClassification(PvtV2Config(**task["config"])).eval()
    model.load_state_dict(load_file(task["weights"]))
    images = torch.from_numpy(_inputs(task)["images"])

    @torch.inference_mode()
    def run():
        return model(images).logits.numpy()

    return [run], {"versions": installed_versions("torch", "transformers"), "precision": "float32"}


def load_kernel(task: dict[str, Any], threads: int) -> Loaded:
    """``kernel``, ``contestant`` and ``shape`` are those of `shiftaddvit_jax.bench.kernels`."""
    _compute_in_the_asking_thread()
    make = KERNELS[task["kernel"]].contestants[task["contestant"]]
    return [make(*task["shape"])], {
        "versions": installed_versions("jax", "jaxlib", "apache-tvm", "onnxruntime")
    }


def load_model_kernel(task: dict[str, Any], threads: int) -> Loaded:
    """``model`` holds arguments of `create_model`; ``index`` is that of its kernel for ``batch`` images."""
    _compute_in_the_asking_thread()
    run = model_kernel(task["model"], task["batch"], task["index"])
    return [run], {"versions": installed_versions("jax", "jaxlib", "apache-tvm")}


def load_copy(task: dict[str, Any], threads: int) -> Loaded:
    """``bytes`` are copied from memory to memory."""
    return [copy(task["bytes"], threads)], {}


LOADERS = {
    "jax": load_jax,
    "model_kernel": load_model_kernel,
    "copy": load_copy,
    "onnxruntime": load_onnxruntime,
    "openvino": load_openvino,
    "torch": load_torch,
    "kernel": load_kernel,
}


def _compute_in_the_asking_thread():
    """Make JAX compute in the calling thread, as the peers do; otherwise each call wakes another thread."""
    jax.config.update("jax_cpu_enable_async_dispatch", False)


def _inputs(task) -> dict[str, np.ndarray]:
    return runtime_inputs(random_examples(task["examples"]))


def main() -> None:
    """Serve requests until there are no more; the command line's one argument is the number of threads."""
    threads = int(sys.argv[1])
    # Standard output is for replies alone; what runtimes print goes to standard error.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    loaded = []

    def answer(request):
        if "run" in request:
            return {"times_ms": time_fastest(loaded[request["run"]], request["seconds"])}
        task, start = request["load"], time.perf_counter()
        loaded.append([])
        try:
            loaded[-1], about = LOADERS[task["runtime"]](task, threads)
            output = loaded[-1][0]()
        except ValueError as error:
            return {"refused": " ".join(str(error).split())}
        if "examples" in task:
            about["logits"] = np.asarray(output, np.float64).ravel().tolist()
        return {"start_s": time.perf_counter() - start, **about}

    for line in sys.stdin:
        try:
            reply = answer(json.loads(line))
        except Exception as error:
            reply = {"failed": f"{type(error).__name__}: {error}"}
        print(json.dumps(reply), file=replies, flush=True)


if __name__ == "__main__":
    main()
