"""Times the models of seed 0 on the kernels, one image at a time, in turns."""

from functools import partial
from pathlib import Path

import jax.numpy as jnp

from shiftaddvit_jax.bench.latency import compiled_run
from shiftaddvit_jax.bench.rounds import available_threads, describe_machine, summarize, time_runs
from shiftaddvit_jax.bench.synthetic import random_images
from shiftaddvit_jax.files import write_json
from shiftaddvit_jax.progress import track
from shiftaddvit_jax.subject import load_subject
from studies.fashion_mnist.rows import ROWS
from studies.fashion_mnist.run import record_file

TIMES, ROUNDS, SECONDS_A_TURN = "times.json", 30, 0.05


def write_times(workdir: Path) -> None:
    """Write the median milliseconds of one image by row: what can be packed is, and runs on the kernels."""
    done = [row for row in ROWS if record_file(workdir, row, 0).exists()]
    runs = {}
    for row in track(done, "compiling", len(done)):
        model, variables = load_subject(row.folder(workdir, 0)).for_inference()
        image = jnp.asarray(random_images((1, model.image_size, model.image_size, 3)))
        runs[row.name] = compiled_run(partial(model.apply, variables), image)
    times = {name: [] for name in runs}
    for _ in track(range(ROUNDS), "rounds", ROUNDS):
        for name, run in runs.items():
            times[name].append(time_runs(run, SECONDS_A_TURN))
    rows = {name: summarize(rounds) for name, rounds in times.items()}
    machine = describe_machine(available_threads())
    write_json(workdir / TIMES, {"machine": machine, "rounds": ROUNDS, "batch": 1, "rows": rows})
