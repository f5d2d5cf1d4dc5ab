"""Milliseconds of a training step's loss and gradient, dense and as ShiftAddViT, in interleaved rounds.

python docs/training_steps.py deit_tiny pvt_v2_b0 --batch 8 --json docs/benchmarks/training_steps.json
"""

import argparse
import statistics
import time
from functools import partial
from importlib import metadata

import jax
import jax.numpy as jnp

import shiftaddvit_jax as sav
from shiftaddvit_jax.bench.rounds import available_threads, describe_machine, ratio
from shiftaddvit_jax.files import write_json
from shiftaddvit_jax.models import init_variables
from shiftaddvit_jax.nn import routing_loss

LATENCIES = (6.0, 4.0)
STUDENTS = {
    "dense": {},
    "additive attention": {"attention": "hamming_linear"},
    "shift": {"attention": "hamming_linear", "mlp": "shift"},
    "mixture": {"attention": "hamming_linear", "mlp": "moe"},
}


def make_step(name, batch, kinds):
    """A run of one model's loss and gradient on random images."""
    model = sav.create_model(name, **kinds)
    variables = init_variables(model, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (batch, model.image_size, model.image_size, 3))
    rngs = {"dropout": jax.random.key(2), "router": jax.random.key(3)}
    params = variables.pop("params")

    def loss(params):
        call = partial(model.apply, train=True, rngs=rngs, mutable=["routing"])
        logits, state = call({"params": params, **variables}, images)
        return jnp.mean(jnp.square(logits)) + 0.01 * routing_loss(state.get("routing", {}), LATENCIES)

    step = jax.jit(jax.value_and_grad(loss)).lower(params).compile()
    return lambda: jax.block_until_ready(step(params))


def main():
    """Time the models, print a table and write JSON."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--json")
    arguments = parser.parse_args()
    rows = []
    for name in arguments.models:
        steps = {label: make_step(name, arguments.batch, kinds) for label, kinds in STUDENTS.items()}
        times = {label: [] for label in steps}
        for number in range(arguments.rounds + 1):  # the first warms up
            for label, step in steps.items():
                began = time.perf_counter()
                step()
                if number:
                    times[label].append([1e3 * (time.perf_counter() - began)])
        for label, found in times.items():
            median = statistics.median(each for (each,) in found)
            row = {"model": name, "name": label, "median_ms": median, "ratio": ratio(found, times["dense"])}
            rows.append(row)
            print(f"{name}, {label}: {median:.0f} ms, {row['ratio']:.2f} times the dense model's")
    machine = describe_machine(available_threads())
    versions = {package: metadata.version(package) for package in ("jax", "jaxlib", "flax")}
    report = {"machine": machine, "versions": versions, "batch": arguments.batch, "rows": rows}
    if arguments.json:
        write_json(arguments.json, report)


if __name__ == "__main__":
    main()
