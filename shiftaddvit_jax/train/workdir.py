"""The folder of a run: what run it is, the steps that it saved, and what it logged."""

import json
import logging
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import ml_collections
import orbax.checkpoint as ocp
from flax.traverse_util import flatten_dict
from jaxtyping import PyTree

from shiftaddvit_jax.checkpoints import load_model
from shiftaddvit_jax.data.identity import class_difference, data_difference
from shiftaddvit_jax.files import file_digests, find_damage, read_object, write_json
from shiftaddvit_jax.train.config import resolved_defaults

logger = logging.getLogger(__name__)

CONFIG = "config.json"  # what was asked for
RUN = "run.json"  # what it began with: its data, model and pixels
HISTORY = "history.json"
CHECKPOINTS, DIGESTS, ITEM = "checkpoints", "digests.json", "default"
DAMAGED = "damaged"  # where checkpoints go that are not whole
MODEL = "model"
# The keys that may change in a workdir: the parameters at a step that is done do not depend on them.
MAY_CHANGE = ("train.steps", "train.log_every", "train.evaluate_every", "train.checkpoint_every")
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

    Raises:
      ValueError: no folder can be there.
    """

    def __init__(self, workdir: Path) -> None:
        self.workdir, self.folder = workdir, workdir / CHECKPOINTS
        if self.folder.exists() and not self.folder.is_dir():
            raise ValueError(f"{self.folder} is a file, expected a folder; move it away, or {ANOTHER}")
        self._manager: Any = None

    def restore(self, target: PyTree) -> tuple[int, PyTree | None]:
        """The newest whole step and its state, shaped as ``target``; 0 and None without any.

        Steps that are not whole are named in the log and set aside.

        Raises:
          ValueError: a whole step of another model, or a folder that cannot be changed.
        """
        steps = self._steps()
        for step in reversed(steps):
            folder = self.folder / str(step)
            known, problem = _check(folder)
            if problem is None:
                try:
                    with ocp.StandardCheckpointer() as checkpointer:
                        return step, checkpointer.restore(folder / ITEM, target)
                except Exception as error:  # a damaged file can lead Orbax to any
                    problem = " ".join(str(error).split())[:200] or type(error).__name__
                    if known:
                        raise ValueError(
                            f"{folder} is whole, but not of this model: {problem}; {ANOTHER}"
                        ) from None
            logger.warning("the checkpoint of step %d is not whole and set aside: %s", step, problem)
            self._set_aside(folder)
        if steps:
            logger.warning("no checkpoint is whole; the run starts from the beginning")
        return 0, None

    def save(self, step: int, state: PyTree) -> None:
        """Write a step, then the digests of its files."""
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        self._manager.save(step, args=ocp.args.StandardSave(state))
        folder = self.folder / str(step)
        write_json(folder / DIGESTS, file_digests(folder))

    def close(self) -> None:
        """Let go of the folder."""
        if self._manager is not None:
            self._manager.close()

    def _steps(self):
        if not self.folder.is_dir():
            return []
        return sorted(
            int(path.name) for path in self.folder.iterdir() if path.name.isdecimal() and path.is_dir()
        )

    def _set_aside(self, folder):
        kept = self.workdir / DAMAGED / folder.name
        try:
            kept.parent.mkdir(exist_ok=True)
            shutil.rmtree(kept, ignore_errors=True)
            os.replace(folder, kept)
        except OSError as error:
            raise _cannot_be_used(self.workdir, error) from None


def restore_target(state: PyTree) -> PyTree:
    """``state``'s shapes and dtypes, on one device."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), state)


def read_history(workdir: Path, step: int) -> list[dict[str, float]]:
    """What was logged up to ``step``; where it is lost, the log says so."""
    try:
        history = json.loads((workdir / HISTORY).read_text())
        return [entry for entry in history if entry["step"] <= step]
    except FileNotFoundError:
        problem = "is missing"
    except (OSError, ValueError, KeyError, TypeError):
        problem = "is not whole"
    if step:
        logger.warning("%s %s; what was logged up to step %d is lost", workdir / HISTORY, problem, step)
    return []


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


def _plain(config):
    return json.loads(config.to_json())


def _flat(tree):
    return flatten_dict(tree, sep=".")
