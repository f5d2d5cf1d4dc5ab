"""One training run: from a config to a trained model in a folder, resumable at any moment."""

import dataclasses
import logging
import signal
import threading
import time
from collections.abc import Generator, Mapping
from contextlib import closing, contextmanager
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
from flax import struct
from jaxtyping import Array, PRNGKeyArray, PyTree

from shiftaddvit_jax.checkpoints import load_model, save_model
from shiftaddvit_jax.command import Stopped
from shiftaddvit_jax.data import AUGMENTATIONS, Dataset, load_dataset, train_iterator
from shiftaddvit_jax.data.identity import class_difference, data_summary, describe_data
from shiftaddvit_jax.files import read_latencies, write_json
from shiftaddvit_jax.models import (
    Preprocessing,
    create_model,
    init_variables,
    model_arguments,
    model_preprocessing,
)
from shiftaddvit_jax.models.kinds import parse_kinds
from shiftaddvit_jax.models.variables import variable_shapes
from shiftaddvit_jax.nn.moe import routing_loss, shift_shares
from shiftaddvit_jax.progress import progress_bar
from shiftaddvit_jax.reparameterize import learn_hashes, reparameterize
from shiftaddvit_jax.train.config import DEFAULTS, check_config, filled
from shiftaddvit_jax.train.evaluate import evaluate
from shiftaddvit_jax.train.optimizers import decayed
from shiftaddvit_jax.train.workdir import (
    HISTORY,
    MODEL,
    RUN,
    Checkpoints,
    check_not_shorter,
    check_same_run,
    claim,
    finished_model,
    read_history,
    read_run,
    restore_target,
)

logger = logging.getLogger(__name__)

KINDS = ("attention", "mlp", "projections")
ORIGINAL = ("msa", "sra", "linear_sra", "dense")  # kinds of models before they are reparameterized


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

    The files: ``config.json``; ``run.json``, the data, model and pixels that the run began with;
    ``checkpoints/``, from which the same call resumes a stopped run, to the same result bit for bit;
    ``model/``, the trained model (see `load_model`); ``history.json``; and TensorBoard events. They are
    written once the data and the model are there. A finished run is evaluated again, and its files stay.

    A checkpoint that is not whole is set aside under ``damaged/``, and the run goes on from the one before.

    Returns:
      The result of `evaluate` for the trained model on the test set, with ``parameters``, and with
      ``history``: a list of ``{"step", "loss", ...}``, the values that were logged, ``"shift_share/LAYER"``
      among them.

    Raises:
      ValueError: a config or data that cannot work, or a workdir that holds another run, a run on other data
        or a longer one, or that cannot be written.
      FloatingPointError: a loss that is not finite; the message names the step.
      Stopped: SIGTERM arrived; the step that was under way is done and saved.
    """
    from tensorboardX import SummaryWriter  # imports an installed torch, which takes seconds

    workdir = Path(workdir).absolute()
    check_config(config)
    config = _with_measured_latencies(config)
    run, checkpoints = read_run(workdir), Checkpoints(workdir)
    dataset = load_dataset(config.data.source, config.data.path)
    data = describe_data(dataset)
    logger.info("%s", data_summary(data))
    if run is not None:
        config = filled(filled(config, run.config), DEFAULTS)
        check_same_run(workdir, run, config, data)
        found = finished_model(workdir, config.train.steps)
        if found is not None:
            logger.info("finished: %s is trained, and evaluated again", workdir / MODEL)
            return _result(config, dataset, *found, read_history(workdir, config.train.steps))

    if run is not None and run.began:
        model, variables, preprocessing = _begun(run.began)
    else:
        config, model, variables, preprocessing = _start(config, dataset)
    optimizer = make_optimizer(config)
    shapes = variable_shapes(model) if variables is None else variables
    target = restore_target(jax.eval_shape(partial(_initial_state, optimizer=optimizer), shapes))
    step, state = checkpoints.restore(target) if run else (0, None)
    check_not_shorter(workdir, step, config.train.steps)
    if state is None:
        if run and (workdir / MODEL).exists():
            raise ValueError(
                f"{workdir} has a trained model, but no whole checkpoint to go on from; "
                "choose another workdir"
            )
        if variables is None:
            config, model, variables, preprocessing = _start(config, dataset)
        state = _initial_state(variables, optimizer)
    began = {
        "data": data,
        "model": model_arguments(model),
        "preprocessing": dataclasses.asdict(preprocessing),
    }
    claim(workdir, config, began)
    if step:
        logger.info("resuming at step %d of %d", step, config.train.steps)
    elif "hash" in state.constants:
        images = jnp.asarray(next(_batches(config, dataset, preprocessing, 0))["image"])
        learned = learn_hashes(model, state.variables, images, jax.random.key(config.seed))
        state = dataclasses.replace(state, constants={name: learned[name] for name in state.constants})

    # Restored arrays are committed to a device, new ones are not; both together would compile the step twice.
    state = jax.device_put(state, jax.devices()[0])
    history = read_history(workdir, step)
    with closing(checkpoints), SummaryWriter(str(workdir), purge_step=step + 1) as writer:
        state = _train(
            config,
            model,
            optimizer,
            state,
            step,
            dataset,
            preprocessing,
            checkpoints,
            writer,
            history,
            workdir,
        )

    about = {
        "class_names": dataset.class_names,
        "preprocessing": dataclasses.asdict(preprocessing),
        "steps": config.train.steps,
    }
    metrics = _result(config, dataset, model, state.variables, about, history)
    save_model(workdir / MODEL, model, state.variables, {**about, "top1": metrics["top1"]})
    return metrics


def _result(config, dataset, model, variables, about, history):
    preprocessing = Preprocessing.from_dict(about["preprocessing"])
    metrics = evaluate(model, variables, dataset.test, config.data.batch_size, preprocessing)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    return {**metrics, "parameters": parameters, "history": history}


def make_optimizer(config: ml_collections.ConfigDict) -> optax.GradientTransformation:
    """AdamW after gradient clipping; warm-up, then cosine to 0; weight decay on kernels alone."""
    settings = config.train
    schedule = settings.steps, settings.warmup_steps, settings.learning_rate
    return _optimizer(*schedule, settings.weight_decay, settings.clip_norm)


@lru_cache(maxsize=8)  # the same optimizer is the same compiled step
def _optimizer(steps, warmup_steps, peak, weight_decay, clip_norm):
    return optax.chain(
        optax.clip_by_global_norm(clip_norm) if clip_norm else optax.identity(),
        optax.adamw(_schedule(steps, warmup_steps, peak), weight_decay=weight_decay, mask=decayed),
    )


def learning_rate(config: ml_collections.ConfigDict) -> optax.Schedule:
    """The learning rate by step."""
    return _schedule(config.train.steps, config.train.warmup_steps, config.train.learning_rate)


def _schedule(steps, warmup_steps, peak):
    return optax.warmup_cosine_decay_schedule(0.0, peak, min(warmup_steps, steps // 2), steps)


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


def _train(
    config, model, optimizer, state, step, dataset, preprocessing, checkpoints, writer, history, workdir
):
    settings = config.train
    fixed = (settings.label_smoothing, settings.balance_weight, tuple(settings.latencies))
    base_key = jax.random.key(config.seed)
    schedule = learning_rate(config)
    batches = _batches(config, dataset, preprocessing, step)
    pending, since = [], time.perf_counter()
    with _terminations() as terminations, progress_bar() as bar:
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
            stopped = bool(terminations) and not last
            if stopped:
                due |= {"checkpoint": True, "evaluate": False}
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
                write_json(workdir / HISTORY, history)
                checkpoints.save(step, state)
                writer.flush()
            if stopped:
                raise Stopped(
                    f"stopped by SIGTERM at step {step} of {settings.steps}, which is saved; the same "
                    "command goes on from there"
                )
            pending, since = [], time.perf_counter()
    return state


@contextmanager
def _terminations() -> Generator[list[int]]:
    """The SIGTERMs that arrived, which end nothing themselves; outside the main thread, always none."""
    arrived: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield arrived
        return
    before = signal.signal(signal.SIGTERM, lambda number, _: arrived.append(number))
    try:
        yield arrived
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


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
        augment=AUGMENTATIONS[config.data.augmentation],
        seed=config.seed,
        first_batch=first,
    )


def _begun(began: Mapping[str, Any]) -> tuple[nn.Module, None, Preprocessing]:
    """The model and pixels that a run began with, without its variables."""
    try:
        return create_model(**began["model"]), None, Preprocessing.from_dict(began["preprocessing"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"{RUN} of the workdir does not describe a model: {error}") from None


def _start(
    config: ml_collections.ConfigDict, dataset: Dataset
) -> tuple[ml_collections.ConfigDict, nn.Module, PyTree, Preprocessing]:
    """The whole config, and the model, variables and pixels it begins with: random, or a checkpoint's."""
    key = jax.random.key(config.seed)
    if not config.init_from:
        config = filled(config, DEFAULTS)
        model = _model(config, dataset)
        return config, model, init_variables(model, key), model_preprocessing(model)
    teacher, variables, description = load_model(config.init_from)
    if description.get("packed"):
        raise ValueError(
            f"the checkpoint {config.init_from} is packed, for inference; start from the original"
        )
    config = filled(filled(config, _settings(teacher)), DEFAULTS)
    names = description.get("class_names")
    if found := class_difference([*map(str, names)], dataset.class_names) if names else None:
        raise ValueError(
            f"the checkpoint {config.init_from} was trained on other classes than the data's: {found}; "
            "rename the class folders, or give it a new head by shiftaddvit_jax.replace_head"
        )
    model = _model(config, dataset)
    for field in ("variant", "num_classes", "image_size"):
        if getattr(teacher, field) != getattr(model, field):
            raise ValueError(
                f"the checkpoint {config.init_from} has {field} {getattr(teacher, field)}, but the config "
                f"asks for {getattr(model, field)}"
            )
    if not names:
        logger.warning("%s does not name its classes; taken for those of the data", config.init_from)
    _warn_of_changes_back(teacher, model)
    teacher = teacher.clone(primitives=model.primitives, dropout=model.dropout, drop_path=model.drop_path)
    student, variables = reparameterize(teacher, variables, **_kinds(config), key=key)
    return config, student, variables, Preprocessing.from_dict(description["preprocessing"])


def _model(config, dataset):
    """The model that the config describes, for the data's classes."""
    settings = config.model.to_dict() | _kinds(config)
    return create_model(**settings, num_classes=len(dataset.class_names), image_size=config.data.image_size)


def _settings(model):
    """What a config leaves open, by its keys, as ``model`` has it."""
    primitives = ("weight_bits", "activations", "threshold")
    return {
        "model.name": model.variant,
        "data.image_size": model.image_size,
        **{f"model.{kinds}": ",".join(getattr(model, kinds)) for kinds in KINDS},
        **{f"model.{name}": getattr(model.primitives, name) for name in primitives},
    }


def _warn_of_changes_back(teacher, student):
    """Say where the config undoes what a reparameterization has done."""
    for name in KINDS:
        stages = zip(getattr(teacher, name), getattr(student, name), strict=True)
        undone = sorted({f"{old} to {new}" for old, new in stages if old not in ORIGINAL and new in ORIGINAL})
        if undone:
            logger.warning(
                "config.model.%s changes the checkpoint's model back: %s; leave it open to keep its kinds",
                name,
                ", ".join(undone),
            )


def _kinds(config):
    return {name: parse_kinds(config.model[name]) for name in KINDS}


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
    check_config(config)
    return config
