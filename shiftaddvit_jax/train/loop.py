"""One training run: from a config to a trained model in a folder, resumable at any moment."""

import dataclasses
import json
import logging
import math
import time
from functools import partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import orbax.checkpoint as ocp
from flax import struct
from jaxtyping import Array, PRNGKeyArray, PyTree

from shiftaddvit_jax.checkpoints import load_model, save_model
from shiftaddvit_jax.data import Dataset, load_dataset, train_iterator
from shiftaddvit_jax.files import read_latencies, write_json
from shiftaddvit_jax.models import Preprocessing, create_model, init_variables, model_preprocessing
from shiftaddvit_jax.models.kinds import parse_kinds
from shiftaddvit_jax.nn.moe import routing_loss, shift_shares
from shiftaddvit_jax.progress import progress_bar
from shiftaddvit_jax.reparameterize import learn_hashes, reparameterize
from shiftaddvit_jax.train.evaluate import evaluate

logger = logging.getLogger(__name__)


@struct.dataclass
class TrainState:
    """All that changes from step to step.

    Attributes:
      params: what is trained.
      constants: the model's other collections, such as learned hashes.
      opt_state: the optimizer's state.
    """

    params: PyTree
    constants: PyTree
    opt_state: PyTree

    @property
    def variables(self) -> PyTree:
        """What `model.apply` takes."""
        return {"params": self.params, **self.constants}


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Train as ``config`` says and evaluate; all files go under ``workdir``.

    The files: ``config.json``; ``checkpoints/``, from which the same call resumes a stopped run, to the same
    result bit for bit; ``model/``, the trained model (see `load_model`); ``history.json``; and TensorBoard
    events.

    Returns:
      The result of `evaluate` for the trained model on the test set, with ``parameters``, and with
      ``history``: a list of ``{"step", "loss", ...}``, the values that were logged, ``"shift_share/LAYER"``
      among them.

    Raises:
      ValueError: a config that cannot work, or a workdir that holds another run or cannot be written.
      FloatingPointError: a loss that is not finite; the message names the step.
    """
    from tensorboardX import SummaryWriter  # imports an installed torch, which takes seconds

    workdir = Path(workdir).absolute()
    dataset = load_dataset(config.data.source, config.data.path)
    config = _with_measured_latencies(config)
    _check(config)
    model = _model(config, dataset)
    _claim(workdir, config)

    model, variables, preprocessing = _start(config, model)
    optimizer = make_optimizer(config)
    state = _initial_state(variables, optimizer)
    manager = ocp.CheckpointManager(
        workdir / "checkpoints",
        options=ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False),
    )
    step = manager.latest_step() or 0
    if step:
        target = jax.tree.map(ocp.utils.to_shape_dtype_struct, state)
        state = manager.restore(step, args=ocp.args.StandardRestore(target))
        logger.info("resuming at step %d of %d", step, config.train.steps)
    elif "hash" in state.constants:
        images = jnp.asarray(next(_batches(config, dataset, preprocessing, 0))["image"])
        learned = learn_hashes(model, state.variables, images, jax.random.key(config.seed))
        state = dataclasses.replace(state, constants={name: learned[name] for name in state.constants})

    # Restored arrays are committed to a device, new ones are not; both together would compile the step twice.
    state = jax.device_put(state, jax.devices()[0])
    history = [entry for entry in _read_history(workdir) if entry["step"] <= step]
    with manager, SummaryWriter(str(workdir), purge_step=step + 1) as writer:
        state = _train(
            config, model, optimizer, state, step, dataset, preprocessing, manager, writer, history, workdir
        )

    metrics = evaluate(model, state.variables, dataset.test, config.data.batch_size, preprocessing)
    about = {
        "class_names": dataset.class_names,
        "top1": metrics["top1"],
        "preprocessing": dataclasses.asdict(preprocessing),
    }
    save_model(workdir / "model", model, state.variables, about)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    return {**metrics, "parameters": parameters, "history": history}


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW after gradient clipping; warm-up, then cosine to 0; weight decay on kernels alone."""
    schedule = learning_rate(config)
    return optax.chain(
        optax.clip_by_global_norm(config.train.clip_norm),
        optax.adamw(schedule, weight_decay=config.train.weight_decay, mask=_decayed),
    )


def _decayed(params):
    """Which parameters decay: all but norms, biases, position embeddings, class and distillation tokens."""
    added = ("pos_embed", "cls_token", "dist_token")
    return jax.tree.map_with_path(lambda path, leaf: leaf.ndim > 1 and path[-1].key not in added, params)


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
    """The learning rate by step."""
    steps = config.train.steps
    warmup = min(config.train.warmup_steps, steps // 2)
    return optax.warmup_cosine_decay_schedule(0.0, config.train.learning_rate, warmup, steps)


@partial(jax.jit, static_argnames=("model", "optimizer", "label_smoothing", "balance_weight", "latencies"))
def train_step(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    label_smoothing: float,
    balance_weight: float,
    latencies: tuple[float, ...] | tuple[tuple[str, tuple[float, ...]], ...],
    state: TrainState,
    batch: dict[str, Array],
    key: PRNGKeyArray,
) -> tuple[TrainState, dict[str, Array]]:
    """One step: the next state, and the batch's losses (nats), accuracy, and tokens' shares on shift experts.

    ``latencies`` are both experts', for all MoE layers, or pairs of a layer's name and its two latencies.
    """
    per_layer = all(isinstance(entry, tuple) for entry in latencies)
    balanced: Any = latencies
    if per_layer:
        balanced = dict(balanced)
    streams = ("dropout", "router")
    rngs = dict(zip(streams, jax.random.split(key, len(streams)), strict=True))

    def loss_function(params):
        logits, mutated = model.apply(
            {"params": params, **state.constants}, batch["image"], train=True, rngs=rngs, mutable=["routing"]
        )
        targets = optax.smooth_labels(jax.nn.one_hot(batch["label"], logits.shape[-1]), label_smoothing)
        task = jnp.mean(optax.softmax_cross_entropy(logits, targets))
        routing = mutated.get("routing", {})
        balance = routing_loss(routing, balanced)
        metrics = {
            "task_loss": task,
            "balance_loss": balance,
            "accuracy": jnp.mean(jnp.argmax(logits, -1) == batch["label"]),
            **{f"shift_share/{name}": share for name, share in shift_shares(routing).items()},
        }
        return task + balance_weight * balance, metrics

    (loss, metrics), gradient = jax.value_and_grad(loss_function, has_aux=True)(state.params)
    updates, opt_state = optimizer.update(gradient, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    return dataclasses.replace(state, params=params, opt_state=opt_state), {"loss": loss, **metrics}


def _train(config, model, optimizer, state, step, dataset, preprocessing, manager, writer, history, workdir):
    settings = config.train
    fixed = (settings.label_smoothing, settings.balance_weight, tuple(settings.latencies))
    base_key = jax.random.key(config.seed)
    schedule = learning_rate(config)
    batches = _batches(config, dataset, preprocessing, step)
    pending, since = [], time.perf_counter()
    with progress_bar() as bar:
        task = bar.add_task("training", total=settings.steps, completed=step, note="")
        while step < settings.steps:
            key = jax.random.fold_in(base_key, step)
            state, metrics = train_step(model, optimizer, *fixed, state, next(batches), key)
            step += 1
            pending.append(metrics)
            bar.advance(task)
            last = step == settings.steps
            due = {
                name: last or step % settings[f"{name}_every"] == 0
                for name in ("log", "evaluate", "checkpoint")
            }
            if not any(due.values()):
                continue
            # Reading the losses waits for the device, so it is done for many steps together.
            rate: Any = schedule(step)
            entry = _mean_metrics(pending, step)
            entry |= {
                "learning_rate": float(rate),
                "images_per_second": len(pending) * config.data.batch_size / (time.perf_counter() - since),
            }
            if due["evaluate"] and not last:
                found = evaluate(model, state.variables, dataset.test, config.data.batch_size, preprocessing)
                entry |= {"test_top1": found["top1"], "test_loss": found["loss"]}
            history.append(entry)
            for name, value in entry.items():
                if name != "step":
                    writer.add_scalar(name, value, step)
            note = f"loss {entry['loss']:.3f}  accuracy {entry['accuracy']:.1%}"
            bar.update(task, note=note)
            if bar.disable and due["log"]:
                logger.info("step %d of %d: %s", step, settings.steps, note)
            if due["checkpoint"]:
                write_json(workdir / "history.json", history)
                manager.save(step, args=ocp.args.StandardSave(state))
            pending, since = [], time.perf_counter()
    return state


def _mean_metrics(pending, step):
    """Means over the steps up to ``step``; an error where a loss is not finite."""
    losses = np.array([float(metrics["loss"]) for metrics in pending])
    if not np.isfinite(losses).all():
        bad = step - len(pending) + 1 + int(np.argmin(np.isfinite(losses)))
        raise FloatingPointError(
            f"the loss is {losses[~np.isfinite(losses)][0]} at step {bad}; "
            "lower config.train.learning_rate or raise config.train.warmup_steps"
        )
    means = {name: float(np.mean([float(metrics[name]) for metrics in pending])) for name in pending[0]}
    return {"step": step, **means}


def _batches(config, dataset, preprocessing, first):
    return train_iterator(
        dataset.train,
        preprocessing=preprocessing,
        batch_size=config.data.batch_size,
        augmentation=config.data.augmentation,
        seed=config.seed,
        first_batch=first,
    )


def _model(config: ml_collections.ConfigDict, dataset: Dataset) -> nn.Module:
    """The model that the config describes, for the data's classes."""
    settings = config.model.to_dict() | _kinds(config)
    return create_model(**settings, num_classes=len(dataset.class_names), image_size=config.data.image_size)


def _start(config: ml_collections.ConfigDict, model: nn.Module) -> tuple[nn.Module, PyTree, Preprocessing]:
    """Model, variables before the first step and pixels: drawn at random, or those of a checkpoint."""
    key = jax.random.key(config.seed)
    if not config.init_from:
        return model, init_variables(model, key), model_preprocessing(model)
    teacher, variables, description = load_model(config.init_from)
    for field in ("variant", "num_classes", "image_size"):
        if getattr(teacher, field) != getattr(model, field):
            raise ValueError(
                f"the checkpoint {config.init_from} has {field} {getattr(teacher, field)}, but the config "
                f"asks for {getattr(model, field)}"
            )
    teacher = teacher.clone(primitives=model.primitives, dropout=model.dropout, drop_path=model.drop_path)
    student, variables = reparameterize(teacher, variables, **_kinds(config), key=key)
    return student, variables, Preprocessing.from_dict(description["preprocessing"])


def _kinds(config):
    return {name: parse_kinds(config.model[name]) for name in ("attention", "mlp", "projections")}


def _initial_state(variables, optimizer):
    params = variables["params"]
    constants = {name: value for name, value in variables.items() if name != "params"}
    return TrainState(params, constants, jax.jit(optimizer.init)(params))


def _with_measured_latencies(config):
    """``config`` with a file of latencies replaced by its numbers, which a resumed run then keeps."""
    latencies = config.train.latencies
    if not (len(latencies) == 1 and isinstance(latencies[0], str)):
        return config
    config = config.copy_and_resolve_references()
    config.train.latencies = tuple(read_latencies(latencies[0]).items())
    return config


def _check(config):
    if config.seed < 0:
        raise ValueError(f"config.seed must be at least 0, got {config.seed}")
    for name in ("steps", "log_every", "evaluate_every", "checkpoint_every"):
        if config.train[name] < 1:
            raise ValueError(f"config.train.{name} must be at least 1, got {config.train[name]}")
    if not (math.isfinite(config.train.learning_rate) and config.train.learning_rate > 0):
        raise ValueError(f"config.train.learning_rate must be positive, got {config.train.learning_rate}")


def _claim(workdir: Path, config: ml_collections.ConfigDict) -> None:
    """Claim ``workdir`` for this config, or check that it already has this config."""
    mine = json.loads(config.to_json())
    file = workdir / "config.json"
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        if not file.exists():
            write_json(file, mine)
        theirs = json.loads(file.read_text())
    except OSError as error:
        raise ValueError(f"the workdir {workdir} cannot be used: {error.strerror}; choose another") from None
    except json.JSONDecodeError:
        raise ValueError(f"{file} is not a config; choose another workdir") from None
    different = sorted(name for name, value in _flat(mine).items() if _flat(theirs).get(name) != value)
    if different:
        raise ValueError(
            f"the workdir {workdir} holds a run with another {', '.join(different)}; choose another workdir"
        )


def _flat(tree, prefix=""):
    if not isinstance(tree, dict):
        return {prefix: tree}
    return {
        name: leaf
        for key, value in tree.items()
        for name, leaf in _flat(value, f"{prefix}.{key}" if prefix else key).items()
    }


def _read_history(workdir):
    file = workdir / "history.json"
    return json.loads(file.read_text()) if file.exists() else []
