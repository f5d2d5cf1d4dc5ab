"""Config-driven training: ``python -m shiftaddvit_jax.main --config=FILE --workdir=DIR``."""

import argparse
import functools
import inspect
import operator
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiftaddvit_jax.command import Parser, run_command
from shiftaddvit_jax.names import SCENE
from shiftaddvit_jax.optional import require

if TYPE_CHECKING:
    import ml_collections

# What a value on the command line must be, by the type that its key has.
WANTED = {int: "a whole number, such as 1000", float: "a number, such as 1e-3"}


def find_config(file: str) -> Path:
    """The path of a config: ``file`` itself, or the config of that name that comes with the project.

    Raises:
      ValueError: there is no such config.
    """
    package = Path(__file__).parent
    # A wheel has its configs in the package, a clone of the repository beside the package.
    folder = next(filter(Path.is_dir, (package / "configs", package.parent / "configs")))
    shipped = {f"configs/{path.name}": path for path in sorted(folder.glob("*.py"))}
    for path in (Path(file), shipped.get(file), shipped.get(f"configs/{file}")):
        if path and path.is_file():
            return path
    raise ValueError(f"no config file at {file}; those that come with the project: {', '.join(shipped)}")


def load_config(file: str, overrides: Sequence[str]) -> "ml_collections.ConfigDict":
    """The config of ``file`` with overrides such as ``--config.train.steps=10``.

    Raises:
      ValueError: no such file, one that is no config (with its line), an unknown key, a value of the wrong
        type, or ml_collections missing.
    """
    require("train", "reading a config", "absl", "ml_collections")
    from absl import flags
    from ml_collections import config_flags

    values = flags.FlagValues()
    command = ["main", *overrides]
    file, _, argument = file.partition(":")
    config: Any = _run_config(find_config(file), argument)
    try:
        config_flags.DEFINE_config_dict("config", config, flag_values=values, sys_argv=command)
        rest = values(command)[1:]
    except flags.Error as error:
        _check_overrides(overrides, config)
        raise ValueError(f"bad config override: {error}") from None
    except (AttributeError, KeyError) as error:
        _check_overrides(overrides, config)
        reason = error.args[0]
        if isinstance(reason, KeyError):  # str() would quote its text
            reason = reason.args[0]
        raise ValueError(f"bad config override: {reason}") from None
    if rest:
        raise ValueError(f"unexpected argument {rest[0]!r}; overrides look like --config.train.steps=10")
    overridden: Any = values["config"].value
    return overridden


def _run_config(path: Path, argument: str) -> "ml_collections.ConfigDict":
    """What ``get_config`` of the file returns, for ``argument`` where there is one.

    Raises:
      ValueError: in one line, whatever the file raises, with its line.
    """
    import ml_collections

    module = types.ModuleType("config")
    module.__file__ = str(path)
    try:
        exec(compile(path.read_bytes(), str(path), "exec"), module.__dict__)
        if not callable(module.__dict__.get("get_config")):
            raise ValueError(f"the config file {path} has no function get_config")
        if argument and not inspect.signature(module.get_config).parameters:
            raise ValueError(f"the config file {path} takes nothing after a colon; leave out ':{argument}'")
        config = module.get_config(*[argument] * bool(argument))
    except (Exception, SystemExit) as error:
        reason = " ".join(str(error).split())
        lines = [
            frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)
        ]
        line = error.lineno if isinstance(error, SyntaxError) and error.filename == str(path) else None
        line = line or (lines[-1] if lines else None)
        if line is None and isinstance(error, ValueError) and reason.startswith("the config file"):
            raise
        where = f"{path}, line {line}" if line else str(path)
        reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        raise ValueError(f"the config file {where}: {reason}") from None
    if not isinstance(config, ml_collections.ConfigDict):
        raise ValueError(
            f"get_config of the config file {path} returns {type(config).__name__}, expected a ConfigDict, "
            "such as shiftaddvit_jax.train.default_config()"
        )
    return config


def _check_overrides(overrides, config):
    """Raise a ``ValueError`` for an unknown key, with the nearest keys, or a value of another type."""
    from flax.traverse_util import flatten_dict

    from shiftaddvit_jax.validation import check_choice

    known = flatten_dict(config.to_dict(), sep=".")
    for index, override in enumerate(overrides):
        key, separator, value = override.partition("=")
        if not key.startswith("--config."):
            continue
        key = key.removeprefix("--config.")
        check_choice("config key", key, known)
        if not separator:
            value = overrides[index + 1] if index + 1 < len(overrides) else ""
        *groups, name = key.split(".")
        kind = functools.reduce(operator.getitem, groups, config).get_type(name)
        if kind in WANTED:
            try:
                kind(value)
            except ValueError:
                raise ValueError(f"config.{key} must be {WANTED[kind]}, got {value!r}") from None


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments of a training run, the same here and in ``shiftaddvit train``."""
    parser.add_argument(
        "--config",
        required=True,
        metavar="FILE[:WHICH]",
        help="a config, such as configs/digits.py or configs/pvt_v2_b0_imagenet.py:moe",
    )
    parser.add_argument("--workdir", metavar="DIR", help="where the run is written, and resumed")
    only = parser.add_mutually_exclusive_group()
    only.add_argument(
        "--plan", action="store_true", help="show what the run would be and what a step costs here; no run"
    )
    only.add_argument(
        "--sweep",
        type=int,
        metavar="N",
        help="N runs with the numbers that config.sweep varies, each in a folder of the workdir, and a table",
    )
    only.add_argument(
        "--check-data", action="store_true", help="decode every image and name those that can't be; no run"
    )
    together = parser.add_argument_group("several processes")
    together.add_argument(
        "--distributed", action="store_true", help="join those that SLURM, Kubernetes or a TPU pod started"
    )
    together.add_argument("--coordinator", metavar="HOST:PORT", help="or those that find each other here")
    together.add_argument("--processes", type=int, metavar="N", help="how many there are")
    together.add_argument("--process", type=int, metavar="I", help="which this is, from 0")
    parser.epilog = (
        "Any key of the config can be set: --config.train.steps=10 --config.model.attention=linear"
    )


def train(arguments: argparse.Namespace, overrides: Sequence[str]) -> None:
    """Run what ``--config`` says and print the accuracy; or look at its plan or its data alone.

    Raises:
      ValueError: as `train_and_evaluate`; of data that is checked, an image that can't be read.
    """
    config = load_config(arguments.config, overrides)
    if config.data.source == SCENE and (arguments.plan or arguments.check_data or arguments.sweep):
        raise ValueError("--plan, --check-data and --sweep are for images with labels, not for a scene")
    if arguments.check_data:
        check(config.data.source, config.data.path)
        return
    if not arguments.workdir and not arguments.plan:
        raise ValueError("--workdir is missing; give the run a folder, such as --workdir runs/digits")
    processes = (arguments.coordinator, arguments.processes, arguments.process)
    if arguments.distributed or any(value is not None for value in processes):
        from shiftaddvit_jax.train.devices import start_processes

        start_processes(*processes)
    if arguments.plan:
        from shiftaddvit_jax.train.plan import plan_run, print_plan

        print_plan(plan_run(config))
        return
    if arguments.sweep is not None:
        from shiftaddvit_jax.train.sweep import print_sweep, run_sweep

        print_sweep(run_sweep(config, arguments.workdir, arguments.sweep))
        return
    from shiftaddvit_jax.train import train_and_evaluate

    metrics = train_and_evaluate(config, arguments.workdir)
    found = _score(metrics)
    average = f" (average {_score(metrics['average'])})" if "average" in metrics else ""
    print(f"{found}{average} on the test set; the model is in {arguments.workdir}/model")


def _score(metrics):
    """How good a model is, in words."""
    return f"PSNR {metrics['psnr']:.2f} dB" if "psnr" in metrics else f"top-1 {metrics['top1']:.2%}"


def check(source: str, path: str) -> None:
    """Decode every image of a data set and print those that can't be.

    Raises:
      ValueError: there are such images; the message says how many.
    """
    from shiftaddvit_jax.data import check_data, load_dataset

    dataset = load_dataset(source, path)
    count, problems = len(dataset.train) + len(dataset.test), check_data(dataset)
    for problem in problems:
        print(problem)
    if problems:
        raise ValueError(f"{len(problems)} of {count} images can't be read; mend or remove them")
    print(f"all {count} images can be read")


def main(argv: Sequence[str] | None = None) -> int:
    """Train from the command line; the exit code is 0, or 2 after a one-line error."""
    parser = Parser(
        prog="python -m shiftaddvit_jax.main",
        description="Train as a config says and evaluate; everything written lies under the workdir.",
    )
    add_arguments(parser)
    return run_command("main", lambda: train(*parser.parse_known_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
