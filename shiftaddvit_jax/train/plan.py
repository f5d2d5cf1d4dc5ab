"""What a run would be, before it is: its size, its length, its learning rates, and what a step costs here."""

import time
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from rich.console import Console
from rich.table import Table

from shiftaddvit_jax.data import load_dataset
from shiftaddvit_jax.train.classification import make_run
from shiftaddvit_jax.train.config import check_config, with_steps
from shiftaddvit_jax.train.devices import check_batch_size, create_mesh, place_batch, place_state
from shiftaddvit_jax.train.start import begin, with_files_read
from shiftaddvit_jax.train.step import initial_state, train_step, warmup_steps

TIMED = 3  # steps


def plan_run(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """What a run of ``config`` would be; nothing is written.

    Returns:
      ``model``, ``devices``, ``parameters``, ``images`` (training, test), ``classes``, ``batch_size``,
      ``steps``, ``epochs``, ``learning_rates`` (pairs of a step and its rate), ``bytes`` (of one device:
      ``parameters``, ``optimizer``, ``average``, and ``step``, what a step needs beside them),
      ``compile_seconds``, ``input_seconds`` and ``step_seconds`` (medians of three steps), and ``seconds``
      (of the whole run, without evaluation).

    Raises:
      ValueError: as `train_and_evaluate`.
    """
    check_config(config)
    config = with_files_read(config)
    mesh = create_mesh(config.devices.model)
    check_batch_size(mesh, config.data.batch_size, config.train.accumulate)
    dataset = load_dataset(config.data.source, config.data.path)
    start = begin(with_steps(config, len(dataset.train)), dataset.class_names)
    run = make_run(start, dataset, mesh)
    config = run.config
    state = place_state(mesh, initial_state(start.variables, run.optimizer, run.recipe))
    sizes = {
        "parameters": _bytes_a_device(state.params, state.constants),
        "optimizer": _bytes_a_device(state.opt_state),
        "average": _bytes_a_device(state.average),
    }
    batches = run.batches(0)
    batch = place_batch(mesh, next(batches))
    key = jax.random.key(config.seed)
    step = partial(train_step, *run.step_arguments)
    lowered = train_step.lower(*run.step_arguments, state, batch, key, np.int32(0), True)
    began = time.perf_counter()
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - began
    analysis = compiled.memory_analysis()
    if analysis is not None:  # as on some devices
        sizes["step"] = int(analysis.temp_size_in_bytes)
    inputs, steps = [], []
    for number in range(TIMED + 1):  # the first one warms up
        began = time.perf_counter()
        batch = place_batch(mesh, next(batches))
        read = time.perf_counter()
        state, metrics = step(state, batch, key, np.int32(number), True)
        jax.block_until_ready((state, metrics))
        inputs.append(read - began)
        steps.append(time.perf_counter() - read)
    batches.close()
    input_seconds, step_seconds = (float(np.median(times[1:])) for times in (inputs, steps))
    settings = config.train
    rate: Any = run.schedule
    warmup = warmup_steps(config)
    marks = sorted(
        {
            0,
            warmup,
            (warmup + settings.steps) // 2,
            max(0, settings.steps - settings.cooldown_steps - 1),
            settings.steps - 1,
        }
    )
    return {
        "model": run.model.variant,
        "devices": mesh.size,
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(state.params)),
        "images": (len(dataset.train), len(dataset.test)),
        "classes": len(dataset.class_names),
        "batch_size": config.data.batch_size,
        "steps": settings.steps,
        "epochs": settings.steps * config.data.batch_size / len(dataset.train),
        "learning_rates": [(mark, float(rate(jnp.int32(mark)))) for mark in marks],
        "bytes": sizes,
        "compile_seconds": compile_seconds,
        "input_seconds": input_seconds,
        "step_seconds": step_seconds,
        "seconds": settings.steps * max(step_seconds, input_seconds),
    }


def _bytes_a_device(*trees):
    """What the first device holds of arrays."""
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(trees))


def print_plan(plan: dict[str, Any]) -> None:
    """Print what `plan_run` returns."""
    table = Table(title="The run, before it is", show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    train, test = plan["images"]
    megabytes = {name: f"{size / 2**20:,.1f} MiB {name}" for name, size in plan["bytes"].items() if size}
    rates = ", ".join(f"{rate:.3g} at step {step:,}" for step, rate in plan["learning_rates"])
    batch = plan["batch_size"]
    slower = max(plan["step_seconds"], plan["input_seconds"])
    rows = {
        "model": f"{plan['model']}, {plan['parameters']:,} parameters, {plan['classes']} classes",
        "data": f"{train:,} training and {test:,} test images",
        "length": f"{plan['steps']:,} steps of {batch} images, {plan['epochs']:.1f} epochs",
        "learning rate": rates,
        "a device holds": ", ".join(megabytes.values()) + f"; {plan['devices']} in all",
        "a step": f"{plan['step_seconds'] * 1e3:,.0f} ms on the devices, "
        f"{plan['input_seconds'] * 1e3:,.0f} ms waiting for its images: {batch / slower:,.0f} images/s",
        "compiling": f"{plan['compile_seconds']:,.0f} s",
        "all steps": f"{plan['seconds'] / 3600:,.2f} hours, without evaluation",
    }
    for name, value in rows.items():
        table.add_row(name, value)
    Console().print(table)
