"""The folder of a run: what run it is, the steps that it saved, and what it logged."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import ml_collections
import numpy as np
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from shiftaddvit_jax.checkpoints import load_model, save_model
from shiftaddvit_jax.data.identity import class_difference, data_difference
from shiftaddvit_jax.files import file_digests, find_damage, read_object, write_json
from shiftaddvit_jax.train.config import resolved_defaults
from shiftaddvit_jax.train.devices import to_host

logger = logging.getLogger(__name__)

CONFIG = "config.json"  # what was asked for
RUN = "run.json"  # what it began with: its data, model and pixels
CHECKPOINTS, DIGESTS, ITEM = "checkpoints", "digests.json", "default"
ROOM = 1.1  # of a checkpoint's arrays, for what is written beside them
DAMAGED = "damaged"  # where checkpoints go that are not whole
MODEL, AVERAGE = "model", "average"
BEST = "best"
# The keys that may change in a workdir: the parameters at a step that is done do not depend on them.
MAY_CHANGE = (
    *(f"train.{name}" for name in ("steps", "epochs", "log_every", "evaluate_every", "checkpoint_every")),
    *("train.writers", "train.keep_best", "data.workers", "devices.model"),
)
ANOTHER = "choose another workdir"


@dataclass(frozen=True)
class Run:
    """What a workdir says of its run.

    Attributes:
      config: its keys, such as ``train.steps``, and their values.
      began: ``data`` (see `describe_data`), ``model`` (arguments of `create_model`) and ``preprocessing``;
        None in workdirs of earlier versions.
    """

    config: Mapping[str, Any]
    began: Mapping[str, Any] | None


def read_run(workdir: Path) -> Run | None:
    """The run in ``workdir``; None if there is none.

    Raises:
      ValueError: a workdir that cannot be read, or that does not say what run it holds.
    """
    try:
        config = read_object(workdir / CONFIG)
    except FileNotFoundError:
        left = [name for name in (RUN, CHECKPOINTS, MODEL) if (workdir / name).exists()]
        if left:
            raise ValueError(
                f"{workdir} holds a run ({', '.join(left)}) without its {CONFIG}; put that back, or {ANOTHER}"
            ) from None
        return None
    except OSError as error:
        raise _cannot_be_used(workdir, error) from None
    except ValueError:
        raise ValueError(f"{workdir / CONFIG} is empty or no config; put it back, or {ANOTHER}") from None
    try:
        began = read_object(workdir / RUN)
        data, (model, pixels) = began["data"], (began["model"], began["preprocessing"])
        lengths = {len(data[part]) for part in ("class_names", "train", "test")}
        if len(lengths) > 1 or not isinstance(model, dict) or not isinstance(pixels, dict):
            raise ValueError(f"{RUN} is not whole")
    except (OSError, ValueError, KeyError, TypeError):
        logger.warning("%s does not say on what data it began; taken for the data as it is", workdir)
        began = None
    return Run(_flat(config), began)


def check_same_run(workdir: Path, run: Run, config: ml_collections.ConfigDict, data: Mapping) -> None:
    """Raise a ``ValueError`` with the difference unless ``config`` and ``data`` are those of ``run``."""
    defaults, mine = _flat(_plain(resolved_defaults())), _flat(_plain(config))
    theirs = {**{name: defaults.get(name) for name in mine}, **run.config}  # a key may be newer than the run
    different = sorted(
        name for name in {*mine, *theirs} - {*MAY_CHANGE} if mine.get(name) != theirs.get(name)
    )
    if different:
        was = "; ".join(f"{name} was {theirs.get(name)!r}, is {mine.get(name)!r}" for name in different)
        raise ValueError(
            f"the workdir {workdir} holds a run with another {', '.join(different)}; {ANOTHER} ({was})"
        )
    found = data_difference(run.began["data"], data) if run.began else None
    names = (model_description(workdir) or {}).get("class_names")
    if not found and names:
        found = class_difference(names, data["class_names"])
    if found:
        raise ValueError(
            f"the workdir {workdir} holds a run on other data: {found}; put the data back, or {ANOTHER}"
        )


def claim(workdir: Path, config: ml_collections.ConfigDict, began: Mapping[str, Any]) -> None:
    """Make ``workdir`` this run's; ``config.json`` is written last.

    Raises:
      ValueError: a workdir that cannot be written.
    """
    if jax.process_index() != 0:
        return
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        write_json(workdir / RUN, began)
        write_json(workdir / CONFIG, _plain(config))
    except OSError as error:
        raise _cannot_be_used(workdir, error) from None


def model_description(workdir: Path) -> dict[str, Any] | None:
    """What ``model.json`` says of the workdir's trained model; None if it is not there or damaged."""
    try:
        return read_object(workdir / MODEL / "model.json")
    except (OSError, ValueError):
        return None


def finished_model(workdir: Path, steps: int) -> tuple[Any, PyTree, dict[str, Any]] | None:
    """Model, variables and description if a run of ``steps`` is done; None if it is not, or not whole.

    Raises:
      ValueError: the model has been trained longer.
    """
    description = model_description(workdir)
    done = (description or {}).get("steps")
    check_not_shorter(workdir, done or 0, steps)
    if done != steps:
        return None
    try:
        return load_model(workdir / MODEL)
    except ValueError as error:
        logger.warning("the trained model is not whole and will be made again: %s", error)
        return None


def check_not_shorter(workdir: Path, done: int, steps: int) -> None:
    """Raise a ``ValueError`` if more than ``steps`` are done."""
    if done > steps:
        raise ValueError(
            f"the run in {workdir} has done {done} steps, more than config.train.steps = {steps}; set it to "
            f"{done} or more, or {ANOTHER}"
        )


class Checkpoints:
    """The steps saved in ``workdir``: the two newest, with the digests of their files.

    In a run of several processes, all call its methods, and the first one writes what is not an array.

    Raises:
      ValueError: no folder can be there.
    """

    def __init__(self, workdir: Path) -> None:
        self.workdir, self.folder = workdir, workdir / CHECKPOINTS
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file, expected a folder; move it away, or {ANOTHER}")
        self._manager: Any = None
        self._has_damaged = False
        self._unsealed: int | None = None  # the step whose digests are not written

    def restore(self, shapes: PyTree, shardings: PyTree) -> tuple[int, PyTree | None]:
        """The newest whole step and its state, placed by ``shardings``; 0 and None without any.

        On how many devices it was saved does not matter. Steps that are not whole are named in the log and
        set aside.

        Raises:
          ValueError: a whole step of another model, or a folder that cannot be changed.
        """
        target = jax.tree.map(
            lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
            shapes,
            shardings,
        )
        while True:
            step, known = _same_everywhere(self._newest() if jax.process_index() == 0 else (0, False))
            if not step:
                break
            folder = self.folder / str(step)
            try:
                with ocp.StandardCheckpointer() as checkpointer:
                    return step, checkpointer.restore(folder / ITEM, target)
            except Exception as error:  # a damaged file can lead Orbax to any
                problem = " ".join(str(error).split())[:200] or type(error).__name__
                if known:
                    raise ValueError(
                        f"{folder} is whole, but not of this model: {problem}; {ANOTHER}"
                    ) from None
            if jax.process_index() == 0:
                self._set_aside(folder, problem)
        if self._has_damaged:
            logger.warning("no checkpoint is whole; the run starts from the beginning")
        return 0, None

    def save(self, step: int, state: PyTree) -> None:
        """Begin to write a step, after those before; the state may change meanwhile.

        Raises:
          ValueError: it cannot be written, or one before could not; those before that are as they were.
        """
        self.finish()
        self._check_disk(step, state)
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=True)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        try:
            self._manager.save(step, args=ocp.args.StandardSave(state))
        except OSError as error:
            raise _cannot_be_used(self.workdir, error) from None
        self._unsealed = step

    def finish(self) -> None:
        """Wait until what was saved is whole on disk, with the digests of its files.

        Raises:
          ValueError: it cannot be written; the steps before are as they were.
        """
        if self._unsealed is None:
            return
        step, self._unsealed = self._unsealed, None
        try:
            self._manager.wait_until_finished()
            if jax.process_index() == 0:
                folder = self.folder / str(step)
                write_json(folder / DIGESTS, file_digests(folder))
        except Exception as error:  # Orbax's own for a disk that is full
            raise _cannot_be_saved(self.folder / str(step), error) from None

    def _check_disk(self, step, state):
        """Orbax's threads would say what is missing in hundreds of lines."""
        leaves = jax.tree.leaves(state)
        needed = sum(shard.data.nbytes for leaf in leaves for shard in leaf.addressable_shards)
        free = shutil.disk_usage(self.workdir).free
        if free < ROOM * needed:
            reason = f"it needs {ROOM * needed / 2**20:.1f} MiB, and the disk has {free / 2**20:.1f} MiB left"
            raise _cannot_be_saved(self.folder / str(step), OSError(reason))
        if self.folder.exists() and not os.access(self.folder, os.W_OK):
            raise _cannot_be_saved(self.folder / str(step), OSError("its folder is read-only"))

    def close(self) -> None:
        """Finish, and let go of the folder."""
        if self._manager is not None:
            self.finish()
            self._manager.close()

    def _newest(self):
        """The newest step that is whole as far as files tell, and whether its digests say so; 0 if none."""
        for step in reversed(self._steps()):
            known, problem = _check(self.folder / str(step))
            if problem is None:
                return step, known
            self._set_aside(self.folder / str(step), problem)
        return 0, False

    def _steps(self):
        if not self.folder.is_dir():
            return []
        return sorted(
            int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir()
        )

    def _set_aside(self, folder, problem):
        logger.warning("the checkpoint of step %s is not whole and set aside: %s", folder.name, problem)
        self._has_damaged = True
        kept = self.workdir / DAMAGED / folder.name
        try:
            kept.parent.mkdir(exist_ok=True)
            shutil.rmtree(kept, ignore_errors=True)
            os.replace(folder, kept)
        except OSError as error:
            raise _cannot_be_used(self.workdir, error) from None


class Best:
    """The models of a run with the highest score on the test set, each in a folder named after its step.

    In a run of several processes, all call its methods, and the first one writes.
    """

    def __init__(self, workdir: Path, keep: int, score: str) -> None:
        self.folder, self.keep, self.score = workdir / BEST, keep, score

    def offer(self, step: int, value: float, model: nn.Module, variables: PyTree, about: Mapping) -> None:
        """Save a model that is among the best, remove those no longer; ties go to the earlier."""
        kept = [entry for entry in self._entries() if entry[1] != step]
        ranked = sorted([*kept, (-value, step)])
        if (-value, step) in ranked[: self.keep]:
            save_whole_model(self.folder / str(step), model, variables, {**about, self.score: value})
        if jax.process_index() == 0:
            for _, old in kept:
                if old not in [step for _, step in ranked[: self.keep]]:
                    shutil.rmtree(self.folder / str(old), ignore_errors=True)

    def first(self) -> dict[str, Any] | None:
        """The best one's ``step``, score (by its name) and ``path`` in the workdir; None without any."""
        for negative, step in sorted(self._entries()):
            return {"step": step, self.score: -negative, "path": f"{BEST}/{step}"}
        return None

    def _entries(self):
        """Their scores, negative, and steps."""
        found = []
        for folder in self.folder.iterdir() if self.folder.is_dir() else ():
            try:
                found.append((-float(read_object(folder / "model.json")[self.score]), int(folder.name)))
            except (OSError, ValueError, KeyError, TypeError):
                continue  # not whole, or not ours
        return found


def save_whole_model(path: Path, model: nn.Module, variables: PyTree, about: Mapping[str, Any]) -> None:
    """`save_model` by the first process, of variables on all devices of all processes.

    Raises:
      ValueError: it cannot be written.
    """
    variables = to_host(variables)
    if jax.process_index() == 0:
        try:
            save_model(path, model, variables, dict(about))
        except OSError as error:
            raise _cannot_be_saved(path, error) from None


def _same_everywhere(values):
    """The first process's numbers, in all."""
    if jax.process_count() == 1:
        return values
    from jax.experimental import multihost_utils

    return tuple(int(value) for value in multihost_utils.broadcast_one_to_all(np.array(values, np.int32)))


def _check(folder):
    """Whether there are digests of a checkpoint's files, and what is wrong with them, in words."""
    try:
        digests = read_object(folder / DIGESTS)
    except FileNotFoundError:
        # Of an earlier version, or stopped before they were written: restoring will tell.
        return False, None if (folder / ITEM).is_dir() else f"{folder / ITEM} is missing"
    except (OSError, ValueError):
        return False, f"{folder / DIGESTS} is damaged"
    if not digests:
        return False, f"{folder / DIGESTS} is empty"
    return True, find_damage(folder, digests)


def _cannot_be_used(workdir, error):
    return ValueError(f"the workdir {workdir} cannot be used: {error.strerror or error}; choose another")


def _cannot_be_saved(path, error):
    reason = " ".join(str(error).split())[:200] or type(error).__name__
    return ValueError(
        f"{path} cannot be written: {reason}; what was saved before is whole, and the same command goes on "
        "from there"
    )


def _plain(config):
    return json.loads(config.to_json())


def _flat(tree):
    return flatten_dict(tree, sep=".")
