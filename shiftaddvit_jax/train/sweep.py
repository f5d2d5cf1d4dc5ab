"""Several runs of one config whose numbers vary, at points that are spread evenly."""

import logging
from pathlib import Path
from typing import Any

import ml_collections

from shiftaddvit_jax import qmc
from shiftaddvit_jax.command import print_table
from shiftaddvit_jax.files import write_json
from shiftaddvit_jax.train.config import RANGES, check_config
from shiftaddvit_jax.train.loop import train_and_evaluate
from shiftaddvit_jax.validation import check_choice

logger = logging.getLogger(__name__)

SWEEP = "sweep.json"
SCORES = ("top1", "top5", "loss")


def sweep_configs(config: ml_collections.ConfigDict, count: int) -> list[tuple[dict[str, Any], Any]]:
    """The first ``count`` configs of a sweep, each with the numbers that vary, by their keys.

    The points are Halton's, randomized by the config's seed: those of a smaller number come first.

    Args:
      config: with ``sweep``.
      count: of configs, any number.

    Raises:
      ValueError: no such keys (with the nearest), distributions that do not parse or leave a key's range, a
        count below 1.
    """
    if count < 1:
        raise ValueError(f"--sweep must be at least 1 run, got {count}")
    if not config.sweep:
        raise ValueError(
            "there is nothing to sweep: set config.sweep, such as "
            '(("train.learning_rate", "loguniform:1e-4:1e-2"),)'
        )
    for pair in config.sweep:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and all(isinstance(x, str) for x in pair)):
            raise ValueError(
                'config.sweep must hold pairs such as ("train.learning_rate", "loguniform:1e-4:1e-2"), '
                f"got {pair!r}"
            )
        check_choice("number of the config", pair[0], RANGES)
    names = [name for name, _ in config.sweep]
    if len(set(names)) < len(names):
        raise ValueError(f"config.sweep names a number twice: {', '.join(names)}")
    points = qmc.sample([text for _, text in config.sweep], count, seed=config.seed)
    found = []
    for point in points.tolist():
        values: dict[str, Any] = {
            name: round(value) if RANGES[name].whole else value
            for name, value in zip(names, point, strict=True)
        }
        varied = config.copy_and_resolve_references()
        varied.sweep = ()
        for name, value in values.items():
            *groups, key = name.split(".")
            (varied[groups[0]] if groups else varied)[key] = value
        check_config(varied)
        found.append((values, varied))
    return found


def run_sweep(config: ml_collections.ConfigDict, workdir: str | Path, count: int) -> list[dict[str, Any]]:
    """Train ``count`` runs that vary what ``config.sweep`` says, each in a folder of ``workdir``.

    A sweep that was stopped goes on: finished runs are evaluated again, and one under way is resumed. More
    runs than before continue the same sweep. A run whose loss is not finite is noted, and the others go on.

    Returns:
      A row for each run, the best ``top1`` first: ``run``, the folder's name; ``values``, by the config's
      keys; ``top1``, ``top5`` and ``loss`` on the test set; ``failed``, why there are none, or None. The file
      ``sweep.json`` has them too.

    Raises:
      ValueError: see `sweep_configs` and `train_and_evaluate`.
    """
    configs = sweep_configs(config, count)
    workdir = Path(workdir).absolute()
    rows: list[dict[str, Any]] = []
    for number, (values, varied) in enumerate(configs):
        name = f"{number:03d}"
        shown = ", ".join(f"{key} {value:.4g}" for key, value in values.items())
        logger.info("run %d of %d: %s", number + 1, count, shown)
        scores, failed = dict.fromkeys(SCORES), None
        try:
            metrics = train_and_evaluate(varied, workdir / name)
            scores = {key: metrics[key] for key in SCORES}
        except FloatingPointError as error:
            failed = str(error)
            logger.warning("run %s failed: %s", name, failed)
        rows.append({"run": name, "values": values, **scores, "failed": failed})
        rows.sort(key=lambda row: (row["failed"] is not None, -(row["top1"] or 0.0), row["run"]))
        write_json(workdir / SWEEP, rows)
    return rows


def print_sweep(rows: list[dict[str, Any]]) -> None:
    """Print what `run_sweep` returns as a table."""
    from rich.table import Table

    table = Table(title=f"{len(rows)} runs, the best first")
    table.add_column("run")
    for name in (*rows[0]["values"], "top-1", "top-5", "loss"):
        table.add_column(name, justify="right")
    for row in rows:
        scores = ("failed", "", "")
        if not row["failed"]:
            scores = f"{row['top1']:.2%}", f"{row['top5']:.2%}", f"{row['loss']:.4f}"
        table.add_row(row["run"], *(f"{value:.4g}" for value in row["values"].values()), *scores)
    print_table(table)
