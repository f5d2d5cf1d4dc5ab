"""Where a run's figures go while it trains: a file of lines, TensorBoard, Weights & Biases, Trackio."""

import json
import logging
import math
import os
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shiftaddvit_jax.files import METRICS, read_metrics, read_object, whole_file, write_json
from shiftaddvit_jax.names import WRITERS
from shiftaddvit_jax.optional import PACKAGES, require
from shiftaddvit_jax.validation import check_choice

logger = logging.getLogger(__name__)

IDENTITY = "run_id.json"  # of the run among those of other folders that are watched
PROJECT = "shiftaddvit_jax"


class Writer(Protocol):
    """One of the places."""

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step."""

    def flush(self) -> None:
        """Have what was written outlive the process."""


@dataclass(frozen=True)
class Writers:
    """All places that a run writes its figures to; `open_writers` makes it.

    Attributes:
      writers: one for each place.
      first_step: the first step that may be written.
    """

    writers: Sequence[Writer]
    first_step: int

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Write the values of a step by their names.

        Raises:
          ValueError: a step before the first, a value that is not finite, or one with the name ``step``. Then
            nothing is written anywhere.
        """
        if step < self.first_step:
            raise ValueError(f"step {step} is before the first, {self.first_step}; open the writers at it")
        if "step" in values:
            raise ValueError("a value is called 'step', as the number of the step is; give it another name")
        values = {name: float(value) for name, value in values.items()}
        for name, value in values.items():
            if not math.isfinite(value):
                raise ValueError(f"{name} is {value} at step {step}; expected a finite number")
        for writer in self.writers:
            writer.write(step, values)

    def flush(self) -> None:
        """Have what was written outlive the process, as far as each place can."""
        for writer in self.writers:
            writer.flush()


@contextmanager
def open_writers(
    names: Sequence[str], workdir: Path, config: Mapping[str, Any], first_step: int
) -> Generator[Writers]:
    """Places for a run's figures, closed at the end of the block.

    - ``jsonl``: ``metrics.jsonl`` in the workdir, a JSON object ``{"step": ..., ...}`` a line; see
      `read_metrics`.
    - ``tensorboard``: events in the workdir.
    - ``wandb``: Weights & Biases, offline in the workdir's ``wandb/`` unless the user is logged in there.
    - ``trackio``: Trackio, on this machine unless its environment variables name a Space or a server.

    What a stopped run wrote of ``first_step`` and later steps is dropped from the first two. The others go on
    with the same run, and keep it.

    Args:
      names: which of them, each once.
      workdir: the run's folder, which is there.
      config: the run's keys and values, for those that show them.
      first_step: the first step that will be written, from 1.

    Raises:
      ValueError: an unknown name, or a package that is missing (with what to install). Then nothing was
        opened.
    """
    for name in names:
        check_choice("writer", name, WRITERS)
        if name in PACKAGES:
            require(name, f"the writer {name!r}")
    with ExitStack() as opened:
        writers = [
            opened.enter_context(OPEN[name](workdir, config, first_step)) for name in dict.fromkeys(names)
        ]
        yield Writers(writers, first_step)


class _Lines:
    def __init__(self, stream):
        self.stream = stream

    def write(self, step, values):
        self.stream.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self.stream.flush()

    def flush(self):
        os.fsync(self.stream.fileno())


@contextmanager
def _open_lines(workdir, config, first_step):
    kept = read_metrics(workdir, first_step - 1)
    with whole_file(workdir / METRICS) as temporary:
        temporary.write_text("".join(json.dumps(entry) + "\n" for entry in kept), encoding="utf-8")
    with (workdir / METRICS).open("a", encoding="utf-8") as stream:
        yield _Lines(stream)


class _Events:
    def __init__(self, writer):
        self.writer = writer

    def write(self, step, values):
        for name, value in values.items():
            self.writer.add_scalar(name, value, step)

    def flush(self):
        self.writer.flush()


@contextmanager
def _open_events(workdir, config, first_step):
    from tensorboardX import SummaryWriter  # imports an installed torch, which takes seconds

    # Files are named by the second; without the step, a run resumed within it would overwrite its own.
    suffix = f".{first_step}"
    with SummaryWriter(str(workdir), purge_step=first_step, filename_suffix=suffix) as writer:
        yield _Events(writer)


class _Tracked:
    """A run of Weights & Biases, or of Trackio, whose runs have the same methods."""

    def __init__(self, run):
        self.run = run

    def write(self, step, values):
        self.run.log(dict(values), step=step)

    def flush(self):
        pass  # they write and send by themselves


@contextmanager
def _open_wandb(workdir, config, first_step):
    import wandb

    # Without a login, anything else would ask for one.
    mode = None if wandb.login(prompt=False) else "offline"
    if os.environ.get("WANDB_MODE") == "disabled":
        mode = "disabled"
    with wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=_identity(workdir),
        name=workdir.name,
        dir=str(workdir),
        config=dict(config),
        resume="allow",
        mode=mode,
    ) as run:
        yield _Tracked(run)


@contextmanager
def _open_trackio(workdir, config, first_step):
    import trackio

    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=f"{workdir.name}-{_identity(workdir)}",
        config=dict(config),
        resume="allow",
        embed=False,  # no dashboard in a notebook
    )
    try:
        yield _Tracked(run)
    finally:
        run.finish()


def _identity(workdir):
    """Eight digits that this run alone has, the same when it is resumed."""
    try:
        return str(read_object(workdir / IDENTITY)["id"])
    except (OSError, ValueError, KeyError):
        identity = uuid.uuid4().hex[:8]
        write_json(workdir / IDENTITY, {"id": identity})
        return identity


Open = Callable[[Path, Mapping[str, Any], int], AbstractContextManager[Writer]]
OPEN: dict[str, Open] = {
    "jsonl": _open_lines,
    "tensorboard": _open_events,
    "wandb": _open_wandb,
    "trackio": _open_trackio,
}
