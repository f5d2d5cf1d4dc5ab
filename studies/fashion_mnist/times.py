"""Times the models of seed 0 on the kernels, one image at a time, in turns."""

from pathlib import Path

from shiftaddvit_jax.bench.latency import whole_latencies
from shiftaddvit_jax.bench.rounds import available_threads, describe_machine
from shiftaddvit_jax.bench.synthetic import random_images
from shiftaddvit_jax.files import write_json
from shiftaddvit_jax.subject import load_subject
from studies.fashion_mnist.rows import ROWS
from studies.fashion_mnist.run import record_file

TIMES, ROUNDS = "times.json", 30


def write_times(workdir: Path) -> None:
    """Write the median milliseconds of one image by row: what can be packed is, and runs on the kernels.

    Raises:
      ValueError: no model of seed 0 in ``workdir``.
    """
    models = {}
    for row in ROWS:
        if record_file(workdir, row, 0).exists():
            model, variables = load_subject(row.folder(workdir, 0)).for_inference()
            models[row.name] = model, variables, random_images((1, model.image_size, model.image_size, 3))
    if not models:
        raise ValueError(f"no model of seed 0 in {workdir}: `run` makes them")
    machine = describe_machine(available_threads())
    times = whole_latencies(models, ROUNDS)
    write_json(workdir / TIMES, {"machine": machine, "rounds": ROUNDS, "batch": 1, "ms": times})
