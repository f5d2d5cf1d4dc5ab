"""What a finished run came to, as ``summary.json`` in its workdir, and several runs side by side."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from shiftaddvit_jax.data.identity import class_difference
from shiftaddvit_jax.files import read_object, write_json

SUMMARY = "summary.json"
# The numbers of a summary: by themselves, and in groups, of which None is all that are there.
NUMBERS = ("steps", "images", "epochs", "seconds", "images_per_second", "input_wait", "parameters")
GROUPS = {
    "config": (),
    "final": ("top1", "top5", "loss"),
    "ema": ("top1", "top5", "loss"),
    "best": ("step", "top1"),
    "shift_share": None,
}
DATA_KEYS = ("data.source", "data.path")


def write_summary(workdir: Path, summary: Mapping[str, Any]) -> None:
    """Write ``summary.json``, whole or not at all.

    Args:
      workdir: the run's folder.
      summary: any of ``config`` (flat keys and their values), ``steps``, ``images``, ``epochs``, ``seconds``,
        ``images_per_second``, ``input_wait`` (the share of the time that steps waited for images),
        ``parameters``, ``final`` and ``ema`` (``top1`` and ``top5``, shares, and ``loss``, nats), ``best``
        (``step``, ``top1``, ``path``), ``shift_share`` (by layer, of tokens on shift experts),
        ``class_names`` and ``version``.

    Raises:
      ValueError: a value of another type, or a number that is not finite.
    """
    _check(summary, "the summary")
    write_json(workdir / SUMMARY, summary)


def read_summary(run: str | Path) -> dict[str, Any]:
    """What `write_summary` wrote, of a run's workdir or of the file itself.

    Raises:
      ValueError: it is not there, damaged, or something else.
    """
    file = Path(run) / SUMMARY if Path(run).is_dir() else Path(run)
    try:
        summary = read_object(file)
    except FileNotFoundError:
        raise ValueError(
            f"no file {file}; expected the workdir of a finished run, or its {SUMMARY}: run its command again"
        ) from None
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{file} is damaged or no {SUMMARY}; run the command of its run again") from None
    _check(summary, file)
    return summary


def compare_runs(runs: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A row for each run, from summaries by the runs' names; what a summary lacks is None.

    Returns:
      Of each run ``run``, its name; ``config``, its values of the keys that are not the same in all runs;
      ``steps``, ``top1``, ``top5``, ``loss``, ``ema_top1``, ``parameters``, ``images_per_second``,
      ``shift_share`` (the mean over its MoE layers) and ``best_step``; and ``note``, how its data or classes
      are not the first run's.
    """
    first, *_ = runs.values()
    keys = sorted({key for summary in runs.values() for key in _group(summary, "config")})
    different = [key for key in keys if not _agree(key, runs.values())]
    rows = []
    for name, summary in runs.items():
        config, final, ema, best = (_group(summary, key) for key in ("config", "final", "ema", "best"))
        shares = _group(summary, "shift_share").values()
        rows.append(
            {
                "run": name,
                "config": {key: config.get(key) for key in different},
                "steps": summary.get("steps"),
                "top1": final.get("top1"),
                "top5": final.get("top5"),
                "loss": final.get("loss"),
                "ema_top1": ema.get("top1"),
                "parameters": summary.get("parameters"),
                "images_per_second": summary.get("images_per_second"),
                "shift_share": sum(shares) / len(shares) if shares else None,
                "best_step": best.get("step"),
                "note": _other_data(first, summary),
            }
        )
    return rows


def _agree(key, summaries):
    """Whether all configs have the same value, or none has any."""
    values = [json.dumps(_group(summary, "config").get(key), sort_keys=True) for summary in summaries]
    return len(set(values)) == 1


def _other_data(first, summary):
    """How a run's data are not the first run's, in words; None if nothing says that they are not."""
    found = [f"another {key}" for key in DATA_KEYS if not _agree(key, [first, summary])]
    then, now = (each.get("class_names") for each in (first, summary))
    if then and now and (difference := class_difference(then, now)):
        found.append(difference)
    return "; ".join(found) or None


def _check(summary, name):
    """Raise a ``ValueError`` that names the first key whose value is not of its type; None is no value."""
    for key in GROUPS:
        if not isinstance(_group(summary, key), Mapping):
            raise ValueError(f"{name}: {key} must be an object, got {summary[key]!r:.60}")
    numbers = {key: summary.get(key) for key in NUMBERS}
    for group, keys in GROUPS.items():
        found = _group(summary, group)
        numbers |= {f"{group}.{key}": found.get(key) for key in (found if keys is None else keys)}
    for key, value in numbers.items():
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if value is not None and not (is_number and math.isfinite(value)):
            raise ValueError(f"{name}: {key} must be a finite number, got {value!r:.60}")
    names = summary.get("class_names") or []
    if not isinstance(names, list | tuple) or not all(isinstance(each, str) for each in names):
        raise ValueError(f"{name}: class_names must be a list of names, got {names!r:.60}")
    try:
        json.dumps(summary, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} is not JSON: {error}") from None


def _group(summary, key):
    return summary.get(key) or {}
