"""What a run of training is for novel views: its scene, how it begins, its steps and its scores."""

import hashlib
import logging
from collections.abc import Generator, Mapping
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree, UInt8

from shiftaddvit_jax.checkpoints import load_model
from shiftaddvit_jax.checkpoints.source import our_folder
from shiftaddvit_jax.data.scenes import Scene, load_scene
from shiftaddvit_jax.models import create_model, init_variables, list_models
from shiftaddvit_jax.nn.kernels import is_packed
from shiftaddvit_jax.novel_views.metrics import peak_signal_to_noise
from shiftaddvit_jax.novel_views.render import render_held_out
from shiftaddvit_jax.ops.cameras import Views, rays_through
from shiftaddvit_jax.train.compute import compute_as
from shiftaddvit_jax.train.config import DEFAULTS, default_config, filled, flat
from shiftaddvit_jax.train.devices import BATCH
from shiftaddvit_jax.train.start import Start, as_asked, asked_settings, model_settings
from shiftaddvit_jax.train.step import (
    Recipe,
    TrainState,
    balance_loss,
    learning_rate,
    make_optimizer,
    make_recipe,
    next_state,
)

logger = logging.getLogger(__name__)

# Keys of a config that do something to classifiers alone.
FOREIGN = (
    "augment.*",
    "mixing.*",
    "distillation.*",
    "model.drop_path",
    "model.new_head",
    "data.augmentation",
    "data.repeats",
    "data.workers",
    "train.loss",
    "train.loss_threshold",
    "train.label_smoothing",
    "train.accumulate",
    "train.redraw_every",
    "train.remat",
)
EXTRA_SOURCES = 2  # a step's photographs are drawn from as many more of the nearest ones


@dataclass(frozen=True)
class SceneData:
    """A scene, as a run sees it.

    Attributes:
      scene: the photographs and cameras.
    """

    scene: Scene

    @property
    def class_names(self) -> tuple[str, ...]:
        """None: a scene has no classes."""
        return ()

    @property
    def train(self) -> range:
        """The rays of all training views, by number."""
        height, width = self.scene.images.shape[1:3]
        return range(len(self.scene.training) * height * width)


def scene_config(scene: str = "analytic") -> ml_collections.ConfigDict:
    """A config of GNT-nano on a scene: Adam as GNT's, with a cosine instead of its halvings."""
    config = default_config()
    config.model.name = "gnt_nano"
    config.data.source, config.data.path = "scene", scene
    config.data.batch_size = 256  # rays
    config.train.steps, config.train.warmup_steps = 800, 50
    config.train.learning_rate, config.train.weight_decay = 5e-3, 0.0
    return config


def load(config: ml_collections.ConfigDict) -> SceneData:
    """The scene that ``config`` names.

    Raises:
      ValueError: see `load_scene`; or a key that does something to classifiers alone.
    """
    given, defaults = flat(config), flat(default_config())
    for name, value in given.items():
        group = f"{name.partition('.')[0]}.*"
        if (name in FOREIGN or group in FOREIGN) and value != defaults[name]:
            raise ValueError(
                f"config.{name} is for classifiers, not for scenes; leave it at {defaults[name]!r}"
            )
    if not config.data.path:
        raise ValueError("config.data.path is empty; name the scene's folder, or analytic")
    settings = config.data
    scene = load_scene(
        settings.path,
        longest_side=settings.image_size,
        near=settings.near or None,
        far=settings.far or None,
    )
    if not scene.held_out or not scene.training:
        raise ValueError(f"{config.data.path} has no views for training, or none held out")
    return SceneData(scene)


def describe(data: SceneData) -> dict[str, Any]:
    """The scene's identity, in types that JSON can hold, in the form of `describe_data`: one class, views."""

    def part(chosen):
        digest = hashlib.sha256()
        for index in chosen:
            digest.update(data.scene.images[index].tobytes())
            digest.update(np.round(data.scene.poses[index], 6).tobytes())
        return [[len(chosen), digest.hexdigest()[:16]]]

    return {
        "class_names": ["views"],
        "train": part(data.scene.training),
        "test": part(data.scene.held_out),
    }


def summary(data: Mapping[str, Any]) -> str:
    """How many views there are, in a line, from what `describe` returns."""
    return f"a scene of {data['train'][0][0]} training views and {data['test'][0][0]} held out"


def begin(config: ml_collections.ConfigDict, data: SceneData) -> Start:
    """The start of a new run: random, or what ``init_from`` names, reparameterized as the config says.

    Raises:
      ValueError: no checkpoint of ours there, a packed one, or another model than the config asks for.
    """
    key = jax.random.key(config.seed)
    if not config.init_from:
        config = filled(config, {**DEFAULTS, "model.name": "gnt_nano"})
        model = create_model(**_settings(config))
        return Start(config, model, init_variables(model, key), None)
    folder = our_folder(config.init_from)
    if folder is None:
        raise ValueError(f"{config.init_from} is no checkpoint of this project, which config.init_from needs")
    model, variables, _ = load_model(folder)
    if is_packed(variables["params"]):
        raise ValueError(f"the checkpoint {config.init_from} is packed; config.init_from needs the original")
    _check_name(model.variant)
    config = filled(filled(config, model_settings(model)), DEFAULTS)
    asked = create_model(**_settings(config))
    if asked.variant != model.variant:
        raise ValueError(
            f"the checkpoint {config.init_from} is a {model.variant}, but the config asks for {asked.variant}"
        )
    model, variables = as_asked(config, asked, model, variables, key)
    return Start(config, model, variables, None)


def resume(config: ml_collections.ConfigDict, began: Mapping[str, Any]) -> Start:
    """The start of a run from what `Start.describe` said of it, without variables."""
    return Start(config, create_model(**began["model"]), None, None)


def _check_name(name):
    if name not in list_models("novel_views"):
        known = ", ".join(list_models("novel_views"))
        raise ValueError(f"{name} does not render views; for a scene, config.model.name is one of {known}")


def _settings(config) -> dict[str, Any]:
    _check_name(config.model.name)
    settings = asked_settings(config)
    del settings["drop_path"]
    return settings


@dataclass(frozen=True)
class ViewsRun:
    """What stays the same from step to step.

    Attributes:
      config: with nothing left open.
      dataset: the scene.
      model: what is trained, as it is saved and evaluated.
      computed: the same, as training computes it.
      optimizer: the optimizer.
      recipe: what a step does with a batch.
      mesh: the devices.
    """

    scores: ClassVar[tuple[str, ...]] = ("psnr", "loss")  # the first says which model is best
    unit: ClassVar[str] = "rays"

    config: ml_collections.ConfigDict
    dataset: SceneData
    model: nn.Module
    computed: nn.Module
    optimizer: optax.GradientTransformation
    recipe: Recipe
    mesh: Mesh

    @property
    def schedule(self) -> optax.Schedule:
        """The learning rate by step."""
        return learning_rate(self.config)

    @cached_property
    def arrays(self) -> "SceneArrays":
        """The scene on the devices."""
        scene = self.dataset.scene
        bounds = np.array([scene.near, scene.far])
        cameras = (array.astype(np.float32) for array in (scene.intrinsics, scene.poses, bounds))
        whole = NamedSharding(self.mesh, PartitionSpec())
        return SceneArrays(*jax.device_put((scene.images, *cameras), whole))

    def batches(self, first: int) -> Generator[dict[str, np.ndarray]]:
        """Which view each step from number ``first`` on looks at, and from which it is rendered; endless.

        A step's rays are drawn on the devices, which hold the photographs.
        """
        scene, count = self.dataset.scene, self.model.views
        step = first
        while True:
            draw = np.random.default_rng([self.config.seed, step])
            target = int(draw.choice(scene.training))
            near = scene.nearest(scene.poses[target], count + EXTRA_SOURCES, target)
            sources = draw.choice(near, min(count, len(near)), replace=False)
            yield {"target": np.asarray(target, np.int32), "sources": sources.astype(np.int32)}
            step += 1

    def first_variables(self, variables: PyTree) -> PyTree:
        """``variables`` as they are: no attention of these models learns hashes."""
        return variables

    def take_step(
        self, state: TrainState, batch: Mapping[str, np.ndarray], key: PRNGKeyArray, step: int
    ) -> tuple[TrainState, dict[str, Any]]:
        """The state after the step of this number, from 0, and what it measured."""
        return view_step(
            self.computed,
            self.optimizer,
            self.recipe,
            self.mesh,
            self.config.data.batch_size,
            state,
            self.arrays,
            dict(batch),
            key,
            np.int32(step),
        )

    def evaluate(self, variables: PyTree) -> dict[str, Any]:
        """`score_held_out`."""
        return score_held_out(self.model, variables, self.dataset.scene)

    def about(self, steps: int) -> dict[str, Any]:
        """What is saved beside the model after so many steps."""
        return {"scene": str(self.config.data.path), "steps": steps}

    def progress(self, entry: Mapping[str, float]) -> str:
        """How good the last steps were, in words."""
        return f"PSNR {entry['psnr']:.1f} dB"


def make_run(start: Start, data: SceneData, mesh: Mesh) -> ViewsRun:
    """The run that ``start`` begins."""
    config = start.config
    computed = compute_as(start.model, dtype=config.train.dtype or None, remat=False)
    return ViewsRun(config, data, start.model, computed, make_optimizer(config), make_recipe(config), mesh)


def score_again(
    config: ml_collections.ConfigDict,
    data: SceneData,
    model: nn.Module,
    variables: PyTree,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    """What a finished run's model scores on the held-out views."""
    return score_held_out(model, variables, data.scene)


def score_held_out(model: nn.Module, variables: PyTree, scene: Scene) -> dict[str, Any]:
    """``psnr`` (dB) and ``loss`` (mean squared error), means over held-out views, and ``shift_share``."""
    scores, errors, tokens = [], [], {}
    for index, rendered in render_held_out(model, variables, scene, count_tokens=True):
        true = scene.images[index] / 255
        scores.append(peak_signal_to_noise(rendered.colours, true))
        errors.append(float(np.mean(np.square(rendered.colours - true))))
        for name, value in rendered.tokens.items():
            tokens[name] = tokens.get(name, 0) + value
    return {
        "psnr": float(np.mean(scores)),
        "loss": float(np.mean(errors)),
        "shift_share": {name: float(value[1] / value.sum()) for name, value in tokens.items()},
    }


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class SceneArrays:
    """A scene's photographs and cameras on the devices.

    Attributes:
      images: the photographs.
      intrinsics: their cameras'.
      poses: likewise.
      bounds: the least and the largest depth.
    """

    images: UInt8[Array, "views height width 3"]
    intrinsics: Float[Array, "views 3 3"]
    poses: Float[Array, "views 4 4"]
    bounds: Float[Array, "2"]


@partial(
    jax.jit,
    static_argnames=("model", "optimizer", "recipe", "mesh", "count"),
    donate_argnames="state",  # its memory is the next state's
)
def view_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    mesh: Mesh,
    count: int,
    state: TrainState,
    scene: SceneArrays,
    batch: dict[str, Int[Array, "*sources"]],
    key: PRNGKeyArray,
    step: Int[Array, ""] | int,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The next state, and the loss (mean squared error), PSNR (dB), and tokens' shares on shift experts.

    Args:
      model: what is trained.
      optimizer: its optimizer.
      recipe: averages, and the load-balancing loss.
      mesh: the devices; each computes its part of the rays.
      count: rays.
      state: placed on the mesh; its arrays cannot be used afterwards.
      scene: on all devices.
      batch: numbers of the view that is looked at, ``target``, and of those to render it from, ``sources``.
      key: of the whole run; what is drawn depends on it and on ``step``.
      step: the step's number, from 0.
    """
    pixel_key, depth_key, *model_keys = jax.random.split(jax.random.fold_in(key, step), 4)
    target, sources = batch["target"], batch["sources"]
    height, width = scene.images.shape[1:3]
    at = jax.random.randint(pixel_key, (count,), 0, height * width)
    at = jax.lax.with_sharding_constraint(at, NamedSharding(mesh, BATCH))
    pixels = jnp.stack([at % width, at // width], axis=-1).astype(jnp.float32)
    colours = scene.images[target].reshape(-1, 3)[at].astype(jnp.float32) / 255
    bounds = scene.bounds[0], scene.bounds[1]
    rays = rays_through(
        pixels, scene.intrinsics[target], scene.poses[target], bounds, model.points, depth_key
    )
    views = Views(
        scene.images[sources].astype(jnp.float32) / 255, scene.intrinsics[sources], scene.poses[sources]
    )
    rngs = dict(zip(("dropout", "router"), model_keys, strict=True))

    def loss_of(params):
        variables = {"params": params, **state.constants}
        rendered, mutated = model.apply(variables, rays, views, train=True, rngs=rngs, mutable=["routing"])
        error = jnp.mean(jnp.square(rendered - colours))
        balance, shares = balance_loss(recipe, mutated.get("routing", {}))
        psnr = -10 * jnp.log10(error)
        metrics = {"task_loss": error, "balance_loss": balance, "psnr": psnr, **shares}
        return error + recipe.balance_weight * balance, metrics

    (loss, metrics), gradient = jax.value_and_grad(loss_of, has_aux=True)(state.params)
    return next_state(optimizer, recipe, mesh, state, gradient, step), {"loss": loss, **metrics}
