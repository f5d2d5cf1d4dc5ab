"""What a run of training is for classifiers: its data, how it begins, its steps and its scores."""

import dataclasses
import math
from collections.abc import Generator, Mapping
from contextlib import closing
from dataclasses import dataclass
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh
from jaxtyping import PRNGKeyArray, PyTree

from shiftaddvit_jax.checkpoints.source import Source
from shiftaddvit_jax.data import (
    AUGMENTATIONS,
    Augmentation,
    Dataset,
    load_dataset,
    train_iterator,
)
from shiftaddvit_jax.data.identity import data_summary, describe_data
from shiftaddvit_jax.models import Preprocessing
from shiftaddvit_jax.reparameterize import learn_hashes, redraw_features
from shiftaddvit_jax.train import start as starts
from shiftaddvit_jax.train.compute import compute_as
from shiftaddvit_jax.train.devices import place_batch, place_state
from shiftaddvit_jax.train.evaluate import evaluate
from shiftaddvit_jax.train.start import Start, open_teacher
from shiftaddvit_jax.train.step import (
    Recipe,
    TrainState,
    learning_rate,
    make_optimizer,
    make_recipe,
    train_step,
)

describe, summary = describe_data, data_summary
resume = starts.resume


def load(config: ml_collections.ConfigDict) -> Dataset:
    """The data that ``config`` names."""
    return load_dataset(config.data.source, config.data.path)


def begin(config: ml_collections.ConfigDict, dataset: Dataset) -> Start:
    """The start of a new run, see `shiftaddvit_jax.train.start.begin`."""
    return starts.begin(config, dataset.class_names)


@dataclass(frozen=True)
class ClassifierRun:
    """What stays the same from step to step.

    Attributes:
      config: with nothing left open.
      dataset: what is trained and evaluated on.
      model: what is trained, as it is saved and evaluated.
      computed: the same, as training computes it.
      preprocessing: the pixels that it expects.
      optimizer: the optimizer.
      recipe: what a step does with a batch.
      teacher: what is distilled from; None without.
      mesh: the devices.
    """

    scores: ClassVar[tuple[str, ...]] = ("top1", "top5", "loss")  # the first says which model is best
    unit: ClassVar[str] = "images"

    config: ml_collections.ConfigDict
    dataset: Dataset
    model: nn.Module
    computed: nn.Module
    preprocessing: Preprocessing
    optimizer: optax.GradientTransformation
    recipe: Recipe
    teacher: Source | None
    mesh: Mesh

    @property
    def step_arguments(self) -> tuple:
        """The first arguments of `train_step`, the same for every step."""
        teacher = (self.teacher.model, self.teacher.variables) if self.teacher else (None, None)
        return (self.computed, self.optimizer, self.recipe, self.mesh, *teacher)

    @property
    def schedule(self) -> optax.Schedule:
        """The learning rate by step."""
        return learning_rate(self.config, steps_per_epoch(self.config, self.dataset))

    def batches(self, first: int, whole: bool = False) -> Generator[dict[str, np.ndarray]]:
        """Batches from number ``first`` on, endless: ``whole``, or this process's rows of them."""
        settings = self.config.data
        hosts = {} if whole else {"host": jax.process_index(), "hosts": jax.process_count()}
        return train_iterator(
            self.dataset.train,
            preprocessing=self.preprocessing,
            batch_size=settings.batch_size,
            augment=_augmentation(self.config),
            seed=self.config.seed,
            first_batch=first,
            repeats=settings.repeats,
            workers=settings.workers,
            **hosts,
        )

    def evaluate(self, variables: PyTree) -> dict[str, Any]:
        """`evaluate` on the test set."""
        size = self.config.data.batch_size
        mesh = self.mesh if self.mesh.size > 1 else None
        return evaluate(self.model, variables, self.dataset.test, size, self.preprocessing, mesh)

    def first_variables(self, variables: PyTree) -> PyTree:
        """``variables`` with hashes, where there are any, learned from the first batch, whole everywhere."""
        if "hash" not in variables:
            return variables
        with closing(self.batches(0, whole=True)) as batches:
            images = jnp.asarray(next(batches)["image"])
        learned = learn_hashes(self.model, variables, images, jax.random.key(self.config.seed))
        return {**variables, "hash": learned["hash"]}

    def take_step(
        self, state: TrainState, batch: Mapping[str, np.ndarray], key: PRNGKeyArray, step: int
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state after the step of this number, from 0, and what it measured."""
        batch = place_batch(self.mesh, dict(batch))
        state, metrics = train_step(
            *self.step_arguments, state, batch, key, np.int32(step), self.is_mixed(step)
        )
        every = self.config.train.redraw_every
        if every and (step + 1) % every == 0:
            variables = redraw_features(self.model, state.variables, jax.random.fold_in(key, step + 1))
            constants = {name: value for name, value in variables.items() if name != "params"}
            state = dataclasses.replace(state, constants=place_state(self.mesh, constants))
        return state, metrics

    def is_mixed(self, step: int) -> bool:
        """Whether images of a step are mixed: up to the epoch that the config names."""
        off = self.config.mixing.off_epoch
        return not off or step * self.config.data.batch_size < off * len(self.dataset.train)

    def about(self, steps: int) -> dict[str, Any]:
        """What is saved beside the model after so many steps."""
        return {
            "class_names": self.dataset.class_names,
            "preprocessing": dataclasses.asdict(self.preprocessing),
            "steps": steps,
        }

    def progress(self, entry: Mapping[str, float]) -> str:
        """How good the last steps were, in words."""
        return f"accuracy {entry['accuracy']:.1%}"


def score_again(
    config: ml_collections.ConfigDict,
    dataset: Dataset,
    model: nn.Module,
    variables: PyTree,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """What a finished run's model scores on the test set."""
    preprocessing = Preprocessing.from_dict(about["preprocessing"])
    return evaluate(model, variables, dataset.test, config.data.batch_size, preprocessing)


def make_run(start: Start, dataset: Dataset, mesh: Mesh) -> ClassifierRun:
    """The run that ``start`` begins.

    Raises:
      ValueError: a teacher that cannot teach this.
    """
    config, preprocessing = start.config, start.preprocessing
    assert preprocessing is not None  # a classifier's start has one
    return ClassifierRun(
        config,
        dataset,
        start.model,
        compute_as(start.model, dtype=config.train.dtype or None, remat=config.train.remat),
        preprocessing,
        make_optimizer(config, steps_per_epoch(config, dataset)),
        make_recipe(config),
        open_teacher(config, start, dataset.class_names),
        mesh,
    )


def steps_per_epoch(config: ml_collections.ConfigDict, dataset: Dataset) -> int:
    """Steps after which every image has been drawn once; the last may have images of the next epoch."""
    return math.ceil(len(dataset.train) / config.data.batch_size)


def _augmentation(config):
    if config.data.augmentation != "crop_flip":
        return AUGMENTATIONS[config.data.augmentation]
    names = ("interpolation", "flip", "policy", "color_jitter")
    settings = {name: config.augment[name] for name in names}
    return Augmentation(scale=tuple(config.augment.scale), ratio=tuple(config.augment.ratio), **settings)
