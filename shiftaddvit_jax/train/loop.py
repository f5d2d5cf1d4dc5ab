"""One training run: from a config to a trained model in a folder, resumable at any moment."""

import logging
import time
from contextlib import closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import jax
import ml_collections
import numpy as np

from shiftaddvit_jax import __version__
from shiftaddvit_jax.checkpoints import load_model
from shiftaddvit_jax.command import Stopped
from shiftaddvit_jax.files import read_metrics
from shiftaddvit_jax.models.variables import variable_shapes
from shiftaddvit_jax.names import SCENE
from shiftaddvit_jax.progress import progress_bar
from shiftaddvit_jax.train import classification, views
from shiftaddvit_jax.train.config import DEFAULTS, check_config, filled, flat, with_steps
from shiftaddvit_jax.train.devices import (
    check_batch_size,
    create_mesh,
    place_state,
    state_shardings,
)
from shiftaddvit_jax.train.signals import stop_signals
from shiftaddvit_jax.train.start import with_files_read
from shiftaddvit_jax.train.step import initial_state
from shiftaddvit_jax.train.summary import write_summary
from shiftaddvit_jax.train.workdir import (
    AVERAGE,
    MODEL,
    Best,
    Checkpoints,
    check_not_shorter,
    check_same_run,
    claim,
    finished_model,
    read_run,
    save_whole_model,
)
from shiftaddvit_jax.train.writers import open_writers

logger = logging.getLogger(__name__)

AHEAD = 2  # steps that the device may have before it


def train_and_evaluate(config: ml_collections.ConfigDict, workdir: str | Path) -> dict[str, Any]:
    """Train as ``config`` says and evaluate; all files go under ``workdir``.

    The files: ``config.json``; ``run.json``, the data, model and pixels that the run began with;
    ``checkpoints/``, from which the same call resumes a stopped run, to the same result bit for bit, on any
    number of devices; ``model/``, the trained model (see `load_model`), ``average/``, the parameters' average
    where there is one, and ``best/``, the models that scored best; ``metrics.jsonl`` and the other writers'
    files; and ``summary.json``. They are written once the data and the model are there. A finished run is
    evaluated again, and its files stay.

    A checkpoint that is not whole is set aside under ``damaged/``, and the run goes on from the one before.

    On several devices each computes its part of every batch; where the run has several processes, all call
    this with the same arguments, and see the same workdir.

    Returns:
      The result of `evaluate` for the trained model on the test set, with ``parameters``; with ``average``,
      the same for the average, where there is one; and with ``history``: a list of ``{"step", "loss", ...}``,
      the values that were logged, ``"shift_share/LAYER"`` among them.

    Raises:
      ValueError: a config or data that cannot work, or a workdir that holds another run, a run on other data
        or a longer one, or that cannot be written.
      FloatingPointError: a loss that is not finite; the message names the step.
      Stopped: SIGTERM or Ctrl-C arrived; the step that was under way is done and saved.
    """
    workdir = Path(workdir).absolute()
    check_config(config)
    if config.sweep:
        raise ValueError("config.sweep is of several runs; give --sweep N, or leave it empty for one")
    config = with_files_read(config)
    mesh = create_mesh(config.devices.model)
    check_batch_size(mesh, config.data.batch_size, config.train.accumulate)
    found, checkpoints = read_run(workdir), Checkpoints(workdir)
    task: Any = views if config.data.source == SCENE else classification
    dataset = task.load(config)
    data = task.describe(dataset)
    logger.info("%s", task.summary(data))
    config = with_steps(config, len(dataset.train))
    if found is not None:
        config = filled(filled(config, found.config), DEFAULTS)
        check_same_run(workdir, found, config, data)
        finished = finished_model(workdir, config.train.steps)
        if finished is not None:
            logger.info("finished: %s is trained, and evaluated again", workdir / MODEL)
            score = partial(task.score_again, config, dataset)
            return _evaluated_again(config, score, finished, workdir)

    began = found.began if found is not None else None
    start = task.resume(config, began) if began else task.begin(config, dataset)
    run = task.make_run(start, dataset, mesh)
    shapes = jax.eval_shape(
        partial(initial_state, optimizer=run.optimizer, recipe=run.recipe),
        variable_shapes(run.model) if start.variables is None else start.variables,
    )
    step, state = checkpoints.restore(shapes, state_shardings(mesh, shapes)) if found else (0, None)
    check_not_shorter(workdir, step, config.train.steps)
    if state is None:
        if found and (workdir / MODEL).exists():
            raise ValueError(
                f"{workdir} has a trained model, but no whole checkpoint to go on from; "
                "choose another workdir"
            )
        if start.variables is None:
            start = task.begin(config, dataset)
            run = task.make_run(start, dataset, mesh)
    claim(workdir, run.config, {"data": data, **start.describe()})
    if state is None:
        state = place_state(
            mesh, initial_state(run.first_variables(start.variables), run.optimizer, run.recipe)
        )
    if step:
        logger.info("resuming at step %d of %d", step, run.config.train.steps)
    with closing(checkpoints):
        state, history, best = _train(run, state, step, checkpoints, workdir)
    return _finish(run, state, history, best, workdir)


def _train(run, state, step, checkpoints, workdir):
    """The state after the last step, what was logged, and the best models."""
    settings, config = run.config.train, run.config
    key = jax.random.key(config.seed)
    schedule = run.schedule
    history = read_metrics(workdir, step)
    best = Best(workdir, settings.keep_best, run.scores[0])
    pending, pace = [], _Pace(config.data.batch_size, run.unit)
    names = settings.writers if jax.process_index() == 0 else ()
    with (
        closing(run.batches(step)) as batches,
        stop_signals() as asked_to_stop,
        open_writers(names, workdir, flat(config), step + 1) as writers,
        progress_bar() as bar,
    ):
        task = bar.add_task("training", total=settings.steps, completed=step, note="")
        while step < settings.steps:
            with pace.waiting():
                batch = next(batches)
            state, metrics = run.take_step(state, batch, key, step)
            step += 1
            pending.append(metrics)
            if len(pending) > AHEAD:
                jax.block_until_ready(pending[-1 - AHEAD])
            bar.advance(task)
            last = step == settings.steps
            due = {
                name: last or step % settings[f"{name}_every"] == 0
                for name in ("log", "evaluate", "checkpoint")
            }
            signal = None if last else asked_to_stop(step)
            if signal:
                due |= {"checkpoint": True, "evaluate": False}
            if not any(due.values()):
                continue
            rate: Any = schedule(step)
            entry = {"step": step, **_mean_metrics(pending, step), "learning_rate": float(rate)}
            entry |= pace.since(len(pending))
            if due["evaluate"] and not last:
                scored = zip(("test", "average"), _evaluated(run, state, best, step), strict=True)
                entry |= {
                    f"{which}_{name}": score
                    for which, found in scored
                    if found is not None
                    for name, score in _scores(run, found).items()
                }
            history.append(entry)
            writers.write(step, {name: value for name, value in entry.items() if name != "step"})
            note = _note(run, entry)
            bar.update(task, note=note)
            if bar.disable and due["log"]:
                logger.info("step %d of %d: %s", step, settings.steps, note)
            if due["checkpoint"]:
                checkpoints.save(step, state)
                writers.flush()
            if signal:
                checkpoints.finish()
                raise Stopped(
                    f"stopped by {signal.name} at step {step} of {settings.steps}, which is saved; the same "
                    "command goes on from there",
                    signal,
                )
            pending = []
            pace.restart()
    return state, history, best


def _evaluated(run, state, best, step):
    """What the model scores, and its average or None; ``best`` keeps the latter, or without it the model."""
    found, average = run.evaluate(state.variables), None
    variables, score = state.variables, found
    if state.averaged is not None:
        average = run.evaluate(state.averaged)
        variables, score = state.averaged, average
    best.offer(step, score[run.scores[0]], run.model, variables, run.about(step))
    return found, average


def _scores(run, found):
    """What of an evaluation is logged and compared."""
    return {name: found[name] for name in run.scores}


def _finish(run, state, history, best, workdir):
    """Evaluate and save what was trained."""
    steps = run.config.train.steps
    metrics, average = _evaluated(run, state, best, steps)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    about, first = run.about(steps), run.scores[0]
    if average is not None:
        save_whole_model(workdir / AVERAGE, run.model, state.averaged, {**about, first: average[first]})
        metrics["average"] = average
    _write_summary(run, metrics, parameters, best, history, workdir)
    save_whole_model(workdir / MODEL, run.model, state.variables, {**about, first: metrics[first]})
    return {**metrics, "parameters": parameters, "history": history}


def _evaluated_again(config, score, finished, workdir):
    """The result of a run that is done, by its files."""
    model, variables, about = finished
    metrics = score(model, variables, about)
    if (workdir / AVERAGE).exists():
        metrics["average"] = score(model, load_model(workdir / AVERAGE)[1], about)
    parameters = sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    history = read_metrics(workdir, config.train.steps)
    return {**metrics, "parameters": parameters, "history": history}


def _note(run, entry):
    parts = [f"loss {entry['loss']:.3f}"]
    if entry["balance_loss"]:
        parts.append(f"balance {entry['balance_loss']:.3f}")
    parts += [run.progress(entry), f"{entry[f'{run.unit}_per_second']:.0f} {run.unit}/s"]
    if entry["input_wait"] > 0.05:
        parts.append(f"waits for input {entry['input_wait']:.0%}")
    return "  ".join(parts)


class _Pace:
    """How fast steps are, and how much of their time goes by waiting for batches."""

    def __init__(self, batch_size, unit):
        self.batch_size, self.unit = batch_size, unit
        self.restart()

    def restart(self):
        self._began, self._waited = time.perf_counter(), 0.0

    @contextmanager
    def waiting(self):
        began = time.perf_counter()
        yield
        self._waited += time.perf_counter() - began

    def since(self, steps):
        seconds = time.perf_counter() - self._began
        return {
            f"{self.unit}_per_second": steps * self.batch_size / seconds,
            "input_wait": self._waited / seconds,
        }


def _totals(history, batch_size, unit):
    """What all steps took by what was logged, those of earlier processes of the run too."""
    if not history:
        return {}
    steps = np.diff([entry["step"] for entry in history], prepend=0)
    seconds = steps * batch_size / np.array([entry[f"{unit}_per_second"] for entry in history])
    waited = seconds @ [entry["input_wait"] for entry in history]
    return {
        "seconds": float(seconds.sum()),
        f"{unit}_per_second": float(steps.sum() * batch_size / seconds.sum()),
        "input_wait": float(waited / seconds.sum()),
    }


def _mean_metrics(pending, step):
    """Means over the steps up to ``step``; an error where a loss is not finite."""
    pending = jax.device_get(pending)
    losses = np.array([metrics["loss"] for metrics in pending])
    if not np.isfinite(losses).all():
        bad = step - len(pending) + 1 + int(np.argmin(np.isfinite(losses)))
        raise FloatingPointError(
            f"the loss is {losses[~np.isfinite(losses)][0]} at step {bad}; "
            "lower config.train.learning_rate or raise config.train.warmup_steps"
        )
    return {name: float(np.mean([metrics[name] for metrics in pending])) for name in pending[0]}


def _write_summary(run, metrics, parameters, best, history, workdir):
    """Write ``summary.json``: what `shiftaddvit compare` shows."""
    steps, config = run.config.train.steps, run.config
    seen = steps * config.data.batch_size
    average, first = metrics.get("average"), best.first()
    summary = {
        "config": flat(config),
        "steps": steps,
        run.unit: seen,
        "epochs": seen / len(run.dataset.train),
        **_totals(history, config.data.batch_size, run.unit),
        "parameters": parameters,
        "final": _scores(run, metrics),
        **({"ema": _scores(run, average)} if average else {}),
        **({"best": first} if first else {}),
        "shift_share": metrics["shift_share"],
        "class_names": list(run.dataset.class_names),
        "version": __version__,
    }
    write_summary(workdir, summary)
