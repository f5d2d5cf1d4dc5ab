"""One step of training: from a state and a batch to the next state, on any number of devices."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import optax
from flax import struct
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Float, Int, PRNGKeyArray, PyTree

from shiftaddvit_jax.names import PAPER_LATENCIES
from shiftaddvit_jax.nn.moe import routing_loss, shift_shares
from shiftaddvit_jax.train.devices import BATCH, state_shardings
from shiftaddvit_jax.train.distillation import distillation_loss, label_logits
from shiftaddvit_jax.train.ema import ema_decay, update_ema
from shiftaddvit_jax.train.erasing import Erasing, erase
from shiftaddvit_jax.train.losses import classification_loss
from shiftaddvit_jax.train.mixing import Mixing, mix
from shiftaddvit_jax.train.optimizers import create_optimizer
from shiftaddvit_jax.train.schedules import cosine_schedule, scaled_learning_rate

NOT_MIXED = Mixing(mixup_alpha=0.0, cutmix_alpha=0.0)
Latencies = tuple[float, ...] | tuple[tuple[str, tuple[float, ...]], ...]


@struct.dataclass
class TrainState:
    """All that changes from step to step.

    Attributes:
      params: what is trained.
      constants: the model's other collections, such as learned hashes.
      opt_state: the optimizer's state.
      average: the parameters' exponential moving average; None without.
    """

    params: PyTree
    constants: PyTree
    opt_state: PyTree
    average: PyTree = None

    @property
    def variables(self) -> PyTree:
        """What `model.apply` takes."""
        return {"params": self.params, **self.constants}

    @property
    def averaged(self) -> PyTree:
        """The same with the average; None without one."""
        return None if self.average is None else {"params": self.average, **self.constants}


@dataclass(frozen=True)
class Recipe:
    """What a step does with a batch; hashable, so that it is a static argument of `jax.jit`.

    Attributes:
      loss: see `classification_loss`.
      loss_threshold: likewise; None is none.
      mixing: of images and labels, and the labels' smoothing.
      erasing: of images; None is none.
      distillation: from a teacher, see `distillation_loss`; ``""`` is none.
      distillation_weight: of what the teacher says; what the labels say has the rest.
      temperature: of soft distillation.
      balance_weight: of the latency-aware load-balancing loss.
      latencies: both experts', for all MoE layers, or pairs of a layer's name and its two latencies.
      accumulate: parts that a batch is computed in, one after another.
      ema_decay: of the parameters' average; 0 is none.
      ema_warmup: see `shiftaddvit_jax.train.ema.ema_decay`.
      stochastic_rounding: of shift weights.
    """

    loss: Any = "cross_entropy"
    loss_threshold: float | None = None
    mixing: Mixing = NOT_MIXED
    erasing: Erasing | None = None
    distillation: str = ""
    distillation_weight: float = 0.5
    temperature: float = 1.0
    balance_weight: float = 0.01
    latencies: Latencies = PAPER_LATENCIES
    accumulate: int = 1
    ema_decay: float = 0.0
    ema_warmup: bool = False
    stochastic_rounding: bool = False


def make_recipe(config: ml_collections.ConfigDict) -> Recipe:
    """The recipe that ``config`` describes."""
    settings, augment = config.train, config.augment
    mixing = {name: value for name, value in config.mixing.items() if name != "off_epoch"}
    distillation = config.distillation
    erasing = Erasing(probability=augment.erase, mode=augment.erase_mode, count=augment.erase_count)
    return Recipe(
        loss=settings.loss,
        loss_threshold=settings.loss_threshold or None,
        mixing=Mixing(label_smoothing=settings.label_smoothing, **mixing),
        erasing=erasing if augment.erase else None,
        distillation=distillation.kind if distillation.teacher else "",
        distillation_weight=distillation.weight,
        temperature=distillation.temperature,
        balance_weight=settings.balance_weight,
        latencies=_as_tuples(settings.latencies),
        **{name: settings[name] for name in ("accumulate", "ema_decay", "ema_warmup", "stochastic_rounding")},
    )


def warmup_steps(config: ml_collections.ConfigDict) -> int:
    """Steps of the rise: those of the config, and of a short run at most a half."""
    return min(config.train.warmup_steps, config.train.steps // 2)


def learning_rate(config: ml_collections.ConfigDict, steps_per_epoch: int = 1) -> optax.Schedule:
    """The learning rate by step: a rise, a cosine down, and a cool-down; see `cosine_schedule`."""
    settings = config.train
    peak = settings.learning_rate
    if settings.learning_rate_batch_size:
        peak = scaled_learning_rate(
            peak,
            config.data.batch_size,
            settings.optimizer,
            base_batch_size=settings.learning_rate_batch_size,
            scaling=settings.learning_rate_scaling,
        )
    warmup = warmup_steps(config)
    return cosine_schedule(
        peak,
        steps=max(1, settings.steps - warmup - settings.cooldown_steps),
        warmup_steps=warmup,
        start=settings.warmup_learning_rate,
        end=settings.final_learning_rate,
        warmup_first=True,
        steps_per_epoch=steps_per_epoch if settings.learning_rate_by == "epoch" else 1,
    )


def make_optimizer(
    config: ml_collections.ConfigDict, steps_per_epoch: int = 1
) -> optax.GradientTransformation:
    """The optimizer that ``config`` describes."""
    settings = config.train
    return create_optimizer(
        settings.optimizer,
        learning_rate(config, steps_per_epoch),
        weight_decay=settings.weight_decay,
        clip=settings.clip_norm or settings.clip_value,
        clip_mode="value" if settings.clip_value else "norm",
        layer_decay=settings.layer_decay,
        rates=dict(settings.rates),
        frozen=settings.frozen,
        options=dict(settings.optimizer_options),
    )


def initial_state(variables: PyTree, optimizer: optax.GradientTransformation, recipe: Recipe) -> TrainState:
    """The state before the first step."""
    params = variables["params"]
    constants = {name: value for name, value in variables.items() if name != "params"}
    average = jax.tree.map(jnp.copy, params) if recipe.ema_decay else None
    return TrainState(params, constants, optimizer.init(params), average)


@partial(
    jax.jit,
    static_argnames=("model", "optimizer", "recipe", "mesh", "teacher"),
    donate_argnames="state",  # its memory is the next state's
)
def train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    mesh: Mesh,
    teacher: nn.Module | None,
    teacher_variables: PyTree,
    state: TrainState,
    batch: dict[str, Array],
    key: PRNGKeyArray,
    step: Int[Array, ""] | int,
    mixed: bool | Array = True,
) -> tuple[TrainState, dict[str, Float[Array, ""]]]:
    """The next state, and the batch's losses (nats), accuracy, and tokens' shares on shift experts.

    Args:
      model: the student.
      optimizer: its optimizer.
      recipe: what is done with the batch.
      mesh: the devices, see `shiftaddvit_jax.train.devices`.
      teacher: of the distillation; None without.
      teacher_variables: its variables; None without.
      state: placed on the mesh; its arrays cannot be used afterwards.
      batch: ``image`` float32 [batch, size, size, 3] and ``label`` int32 [batch], placed likewise.
      key: of the whole run; what is drawn depends on it and on ``step``.
      step: the step's number, from 0.
      mixed: whether images are mixed.
    """
    erase_key, mix_key, model_key = jax.random.split(jax.random.fold_in(key, step), 3)
    images = batch["image"]
    if recipe.erasing is not None:
        images = erase(recipe.erasing, erase_key, images)
    images, targets = mix(recipe.mixing, mix_key, images, batch["label"], model.num_classes, mixed)
    images = jax.lax.with_sharding_constraint(images, NamedSharding(mesh, BATCH))
    loss_of = partial(_loss, model, recipe, teacher, teacher_variables, state.constants)
    gradient_of = jax.value_and_grad(loss_of, has_aux=True)
    parts = (images, targets, batch["label"])
    if recipe.accumulate == 1:
        (loss, metrics), gradient = gradient_of(state.params, *parts, model_key)
    else:
        (loss, metrics), gradient = _in_parts(
            gradient_of, recipe.accumulate, mesh, state.params, parts, model_key
        )
    return next_state(optimizer, recipe, mesh, state, gradient, step), {"loss": loss, **metrics}


def next_state(
    optimizer: optax.GradientTransformation,
    recipe: Recipe,
    mesh: Mesh,
    state: TrainState,
    gradient: PyTree,
    step: Int[Array, ""] | int,
) -> TrainState:
    """The state after a step of ``optimizer`` along ``gradient``, as placed as before; for a jitted step."""
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params: Any = optax.apply_updates(state.params, updates)
    average = state.average
    if average is not None:
        average = update_ema(average, params, ema_decay(step + 1, recipe.ema_decay, warmup=recipe.ema_warmup))
    state = dataclasses.replace(state, params=params, opt_state=opt_state, average=average)
    return jax.lax.with_sharding_constraint(state, state_shardings(mesh, state))


def _loss(model, recipe, teacher, teacher_variables, constants, params, images, targets, labels, key):
    streams = ("dropout", "router") + ("rounding",) * recipe.stochastic_rounding
    rngs = dict(zip(streams, jax.random.split(key, len(streams)), strict=True))
    variables = {"params": params, **constants}
    apply = partial(model.apply, variables, images, train=True, rngs=rngs, mutable=["routing"])
    if recipe.distillation:
        outputs, mutated = apply(method="outputs")
        logits = label_logits(recipe.distillation, outputs)
    else:
        outputs, (logits, mutated) = None, apply()
    labelled = task = classification_loss(recipe.loss, logits, targets, threshold=recipe.loss_threshold)
    metrics = {}
    if outputs is not None:
        says = teacher.apply(teacher_variables, images, method="outputs")
        taught = distillation_loss(recipe.distillation, outputs, says, temperature=recipe.temperature)
        weight = recipe.distillation_weight
        task = (1 - weight) * labelled + weight * taught
        metrics = {"distillation_loss": taught}
    balance, shares = balance_loss(recipe, mutated.get("routing", {}))
    accuracy = jnp.mean(jnp.argmax(logits, -1) == labels)
    metrics |= {"task_loss": labelled, "balance_loss": balance, "accuracy": accuracy, **shares}
    return task + recipe.balance_weight * balance, metrics


def balance_loss(recipe: Recipe, routing: PyTree) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The latency-aware loss of a ``"routing"`` collection, and each layer's ``shift_share/LAYER``."""
    latencies: Any = recipe.latencies
    if all(isinstance(entry, tuple) for entry in latencies):
        latencies = dict(latencies)
    shares = {f"shift_share/{name}": share for name, share in shift_shares(routing).items()}
    return routing_loss(routing, latencies), shares


def _in_parts(gradient_of, count, mesh, params, batch, key):
    """Means over ``count`` parts of the batch, one after another; each has a share of every device's rows."""

    def split(array):
        parts = array.reshape(-1, count, *array.shape[1:]).swapaxes(0, 1)
        spec = PartitionSpec(None, *BATCH)
        return jax.lax.with_sharding_constraint(parts, NamedSharding(mesh, spec))

    def add(sums, part):
        return jax.tree.map(jnp.add, sums, gradient_of(params, *part[:-1], part[-1])), None

    parts = (*map(split, batch), jax.random.split(key, count))
    shapes = jax.eval_shape(gradient_of, params, *(part[0] for part in parts))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    sums, _ = jax.lax.scan(add, zeros, parts)
    return jax.tree.map(lambda total: total / count, sums)


def _as_tuples(latencies):
    return tuple(
        (entry[0], tuple(entry[1])) if isinstance(entry, tuple | list) else entry for entry in latencies
    )
