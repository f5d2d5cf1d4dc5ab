"""A model's TVM kernels, ahead of its first use: compiled into the cache, or tuned for this machine."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp

from kernels_tvm.library import Kernel, load
from kernels_tvm.tuning import count_trials, save_record, tune
from shiftaddvit_jax.models.create import init_function
from shiftaddvit_jax.ops.custom_call import record_kernels
from shiftaddvit_jax.progress import progress_bar, track

Shapes = list[tuple[tuple[int, ...], str]]


def kernels_of(model: nn.Module, batch: int = 1) -> Mapping[Kernel, Shapes]:
    """The kernels of a model with ``implementation="tvm"``, with the shapes of their arguments and outputs.

    Raises:
      ValueError: TVM can't run here.
    """
    images = jax.ShapeDtypeStruct((batch, model.image_size, model.image_size, 3), jnp.float32)
    with record_kernels() as kernels:
        variables = jax.eval_shape(init_function(model), jax.random.key(0))
        kernels.clear()  # what initializing calls, inference does not
        jax.eval_shape(model.apply, variables, images)
    return dict(kernels)


def compile_kernels(model: nn.Module) -> list[Kernel]:
    """Compile all kernels of a model into the cache, with a progress bar; those that are there are loaded."""
    kernels = list(kernels_of(model))
    for kernel in track(kernels, "compiling", len(kernels)):
        load(kernel)
    return kernels


def tune_kernels(model: nn.Module, batch: int = 1) -> list[tuple[Kernel, dict, float, float]]:
    """Tune all kernels of a model and keep the records: (kernel, what changed, seconds before and after)."""
    kernels = kernels_of(model, batch)
    results = []
    with progress_bar() as progress:
        task = progress.add_task("tuning", total=sum(map(count_trials, kernels)), note="")
        for kernel, shapes in kernels.items():
            facts, before, after = tune(kernel, shapes, lambda: progress.advance(task))
            save_record(kernel, facts)
            results.append((kernel, facts, before, after))
    return results
