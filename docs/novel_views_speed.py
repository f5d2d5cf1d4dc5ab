"""Rays a second of trained models, as they are and packed, in interleaved rounds.

python docs/novel_views_speed.py runs/views/dense runs/views/shift runs/views/moe
"""

import statistics
import sys
import time

import jax

from shiftaddvit_jax.bench.rounds import available_threads, describe_machine
from shiftaddvit_jax.checkpoints import load_model
from shiftaddvit_jax.checkpoints.source import our_folder
from shiftaddvit_jax.data.scenes import load_scene
from shiftaddvit_jax.novel_views import render_view
from shiftaddvit_jax.pack import pack

ROUNDS = 7


def main(folders):
    """Print rays a second of each model."""
    scene = load_scene("analytic")
    models = {}
    for folder in folders:
        model, variables, _ = load_model(our_folder(folder))
        models[f"{folder} on XLA"] = (model, variables)
        models[f"{folder} packed, on kernels"] = (model, pack(model, variables))
    times = {name: [] for name in models}
    for number in range(ROUNDS + 1):  # the first compiles
        for name, (model, variables) in models.items():
            began = time.perf_counter()
            jax.block_until_ready(render_view(model, variables, scene, scene.poses[3]).colours)
            if number:
                times[name].append(time.perf_counter() - began)
    rays = scene.images[0].shape[0] * scene.images[0].shape[1]
    machine = describe_machine(available_threads())
    print(f"{machine['cpu']}, {machine['threads']} threads; {rays} rays, medians of {ROUNDS} rounds")
    first = statistics.median(next(iter(times.values())))
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name}: {rays / median:,.0f} rays/s, {first / median:.2f} times the first")


if __name__ == "__main__":
    main(sys.argv[1:])
