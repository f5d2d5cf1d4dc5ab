"""Files and folders that are written whole or not at all; every floor may use them."""

import hashlib
import json
import logging
import math
import os
import shutil
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

METRICS = "metrics.jsonl"  # what a run logged


def check_parent(file: str | Path) -> None:
    """Raise a ``ValueError`` unless the folder that ``file`` is to be written into exists."""
    if not Path(file).absolute().parent.is_dir():
        raise ValueError(f"{file} cannot be written: there is no such folder; make it first")


@contextmanager
def whole_file(file: str | Path) -> Generator[Path]:
    """A path beside ``file`` to write to, which replaces ``file`` at the end of the block.

    The path has the suffix of ``file``, since some writers choose a format by it. If the block raises,
    ``file`` stays as it was, and the path is removed.
    """
    file = Path(file)
    temporary = file.with_name(f".{file.stem}.new{file.suffix}")
    try:
        yield temporary
        os.replace(temporary, file)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Generator[Path]:
    """An empty folder beside ``folder`` to fill, which replaces ``folder`` at the end of the block.

    If the block raises, ``folder`` stays as it was. A killed process's leftovers are put back or removed.

    Raises:
      ValueError: ``folder`` can't be made.
    """
    temporary, old = (folder.with_name(f".{folder.name}.{state}") for state in ("new", "old"))
    if old.exists() and not folder.exists():
        os.replace(old, folder)
    for leftover in (temporary, old):
        shutil.rmtree(leftover, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written: {error.strerror}; choose another folder") from None
    try:
        yield temporary
        if folder.exists():
            os.replace(folder, old)
        os.replace(temporary, folder)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_json(file: str | Path, value: Any) -> None:
    """Write ``value`` as JSON, whole or not at all."""
    with whole_file(file) as temporary:
        temporary.write_text(json.dumps(value, indent=2) + "\n")


def read_object(file: Path) -> dict[str, Any]:
    """The object of JSON in ``file``.

    Raises:
      OSError: it can't be read.
      ValueError: it is damaged or holds something else.
    """
    value = json.loads(file.read_text())
    if not isinstance(value, dict):
        raise ValueError(f"{file} must hold an object of JSON, got {type(value).__name__}")
    return value


def file_digests(folder: Path) -> dict[str, str]:
    """The SHA-256 digest of every file in ``folder``, by its path in there."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): _digest(path) for path in files}


def check_digests(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise a ``ValueError`` that names the first file of ``folder`` that is missing or not what it was."""
    for name in digests:
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ValueError(f"{folder} lists {name}, which is outside of it")
    if found := find_damage(folder, digests):
        raise ValueError(f"{found}; copy or download {folder} again")


def find_damage(folder: Path, digests: Mapping[str, str]) -> str | None:
    """The first file of ``folder`` that is missing or not what it was, in words; None if all are whole."""
    for name, digest in digests.items():
        path = folder / name
        if not path.is_file():
            return f"{path} is missing"
        if _digest(path) != digest:
            return f"{path} is damaged: its digest is not the one on record"
    return None


def _digest(path):
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_latencies(file: str | Path) -> dict[str, tuple[float, ...]]:
    """Both experts' latencies (dense, shift) by MoE layer, from a file of ``shiftaddvit measure-latency``.

    Raises:
      ValueError: no such file, or one of something else.
    """
    try:
        layers = json.loads(Path(file).read_text())["layers"]
        return {layer["name"]: tuple(float(latency) for latency in layer["latencies"]) for layer in layers}
    except OSError as error:
        raise ValueError(
            f"no latencies in {file}: {error.strerror}; `shiftaddvit measure-latency --json` writes them"
        ) from None
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"{file} holds no latencies; expected what `shiftaddvit measure-latency --json` writes"
        ) from None


def read_layers(file: str | Path) -> dict[str, str]:
    """Single layers' choices by path, from a file that ``shiftaddvit search`` wrote.

    Raises:
      ValueError: no such file, or one of something else.
    """
    try:
        layers = json.loads(Path(file).read_text())["layers"]
        if not layers or not all(isinstance(choice, str) for choice in layers.values()):
            raise ValueError
        return dict(layers)
    except OSError as error:
        raise ValueError(
            f"no layers in {file}: {error.strerror}; `shiftaddvit search --output` writes them"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(
            f'{file} holds no layers; expected what `shiftaddvit search --output` writes: {{"layers": '
            "{PATH: CHOICE}}"
        ) from None


def read_metrics(workdir: Path, last_step: int | None = None) -> list[dict[str, float]]:
    """What a run in ``workdir`` logged up to ``last_step``, or all: ``{"step", ...}`` in the order of steps.

    A last line that a stopped run left unfinished is no line. Where others are lost, the log says so.
    """
    try:
        text = (workdir / METRICS).read_text(encoding="utf-8", errors="replace")
    except OSError:
        if last_step:
            logger.warning(
                "%s is missing; what was logged up to step %d is lost", workdir / METRICS, last_step
            )
        return []
    lines = text[: text.rfind("\n") + 1].splitlines()
    entries = [entry for line in lines if (entry := _metrics_of(line)) is not None]
    if len(entries) < len(lines):
        logger.warning(
            "%s: %d of %d lines are not whole", workdir / METRICS, len(lines) - len(entries), len(lines)
        )
    return [entry for entry in entries if last_step is None or entry["step"] <= last_step]


def _metrics_of(line):
    """The object of a line; None if it is damaged."""
    try:
        entry = json.loads(line)
        return entry if isinstance(entry["step"], int) and all(map(math.isfinite, entry.values())) else None
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
