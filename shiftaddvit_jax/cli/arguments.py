"""Arguments that several commands share, and how they are read."""

import argparse
import json
import math
import os
import sys
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiftaddvit_jax.command import Parser
from shiftaddvit_jax.files import read_latencies, write_json
from shiftaddvit_jax.names import ENGINES, PRECISIONS, SHIFT_SHARE, SOURCES

if TYPE_CHECKING:
    from shiftaddvit_jax.classifier import Classifier
    from shiftaddvit_jax.cluster import MapOnWorkers
    from shiftaddvit_jax.data import Examples
    from shiftaddvit_jax.nn.moe import ShiftShare

Commands = argparse._SubParsersAction  # what `add_subparsers` returns


PRINTED = "-"  # the file of ``--json`` without one: standard output


def add_command(
    commands: Commands,
    name: str,
    function: Callable[[argparse.Namespace], None] | None,
    description: str,
    *examples: str,
) -> Parser:
    """Add a command that runs ``function``.

    Args:
      commands: where it is added.
      name: what is typed.
      function: what it runs; None for one whose own commands run.
      description: in its own help and in the list of all.
      examples: worked ones, without the program's name; its help ends with them.
    """
    command = commands.add_parser(
        name,
        help=description,
        description=description,
        examples=[f"shiftaddvit {example}" for example in examples],
    )
    command.set_defaults(run=function, parser=command)
    return command


def add_json(command: argparse.ArgumentParser) -> None:
    """Add what `present` reads."""
    command.add_argument(
        "--json",
        nargs="?",
        const=PRINTED,
        type=_json_file,
        metavar="FILE",
        help="print all figures as JSON and nothing else; with a FILE in .json, write them there too",
    )


def _json_file(text):
    """A file's name, which can't be a word that was meant as something else, such as an image."""
    if text != PRINTED and not text.endswith(".json"):
        raise argparse.ArgumentTypeError(
            f"what follows is a file in .json or another option, got {text!r}; put --json last to print"
        )
    return text


def present(arguments: argparse.Namespace, figures: Any, show: Callable[[], None]) -> None:
    """Give ``figures`` as ``--json`` asks: printed as JSON; or shown to a person, and written where it says.

    Args:
      arguments: with those of `add_json`.
      figures: in types that JSON can hold; infinities become null.
      show: prints them for a person.
    """
    if arguments.json == PRINTED:
        print(json.dumps(_finite(figures)))
        return
    show()
    if arguments.json:
        write_json(arguments.json, _finite(figures))


def _finite(value):
    """``value`` with null for each number that JSON has not: an infinity, or what is no number."""
    if isinstance(value, Mapping):
        return {name: _finite(each) for name, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_machine(machine: Mapping[str, Any]) -> None:
    """Print what a report of times says of its machine."""
    if "gpu" in machine:
        print(f"{machine['gpu']}, compute capability {machine['compute_capability']}")
    else:
        print(f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores; {machine['system']}")


def print_notes(notes: Iterable[str]) -> None:
    """Print what a reader must know on standard error, a line each: standard output is for results."""
    for note in notes:
        print(f"note: {note}", file=sys.stderr)


def add_kinds(command: argparse.ArgumentParser) -> None:
    """Add the kinds of layers of a ShiftAddViT that is made by its name."""
    command.add_argument(
        "--attention",
        default="hamming_linear",
        metavar="KIND",
        help="one kind, or one a stage separated by commas (default: %(default)s)",
    )
    command.add_argument("--mlp", default="moe", metavar="KIND", help="the same (default: %(default)s)")
    command.add_argument(
        "--projections", default="dense", metavar="KIND", help="the same (default: %(default)s)"
    )
    command.add_argument(
        "--activations",
        choices=("float", "int8"),
        default="float",
        help="of shift layers; default: %(default)s",
    )
    add_precision(command)
    command.add_argument("--image-size", type=int, metavar="N", help="default: the model's own")


def add_precision(command: argparse.ArgumentParser) -> None:
    """Add the number format of dense layers' factors."""
    command.add_argument(
        "--precision",
        choices=PRECISIONS,
        default="float32",
        help="of what dense layers multiply; default: %(default)s",
    )


def add_subject(command: argparse.ArgumentParser, **settings) -> None:
    """Add the checkpoint or model that a command is about; ``settings`` are that argument's."""
    command.add_argument(
        "model", metavar="CHECKPOINT_OR_MODEL", help="a checkpoint's folder or a model's name", **settings
    )
    for name in ("attention", "mlp", "projections"):
        command.add_argument(f"--{name}", metavar="KIND", help="instead of the model's own")
    command.add_argument("--image-size", type=int, metavar="N", help="default: the model's own")


def add_source(command: argparse.ArgumentParser) -> None:
    """Add the model from anywhere that a command uses."""
    command.add_argument(
        "source",
        metavar="SOURCE",
        help="a checkpoint or bundle of this project; or weights of transformers, timm or the authors: a "
        "folder, a file, hf:ORG/NAME or timm:NAME",
    )


def add_source_settings(command: argparse.ArgumentParser) -> None:
    """Add what weights of others may leave open."""
    command.add_argument("--model", metavar="NAME", help="whose weights they are, where no config.json tells")
    command.add_argument("--num-classes", type=int, metavar="N", help="default: the weights' own")
    command.add_argument("--image-size", type=int, metavar="N", help="in pixels; default: the weights' own")
    command.add_argument("--layer-norm-eps", type=float, metavar="X", help="default: the weights' own")


def source_settings(arguments: argparse.Namespace) -> dict[str, Any]:
    """The arguments of `open_source` that a person gave."""
    names = ("model", "num_classes", "image_size", "layer_norm_eps")
    return {name: getattr(arguments, name) for name in names}


def add_shift_share(command: argparse.ArgumentParser) -> None:
    """Add the share of tokens on shift experts."""
    command.add_argument(
        "--shift-share",
        type=_shift_share,
        default=SHIFT_SHARE,
        metavar="X",
        help="of tokens on shift experts: a number, a file of what `eval --json` printed (a trained model's "
        "shares), or one that `measure-latency --json` wrote (those that the balancing loss aims at on this "
        "machine); default: %(default)s, its aim with the authors' latencies",
    )


def _shift_share(text):
    """One share, or the shares of MoE layers in a file of ``eval --json`` or ``measure-latency --json``."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        found = json.loads(Path(text).read_text())
        if "layers" in found:
            from shiftaddvit_jax.nn.moe import aimed_shift_share

            return {layer: aimed_shift_share(pair) for layer, pair in read_latencies(text).items()}
        return found["shift_share"]
    except (OSError, ValueError, KeyError, TypeError):
        expected = "neither a number nor a file of `eval --json` or `measure-latency --json`"
        raise argparse.ArgumentTypeError(f"{text!r} is {expected}") from None


def print_shift_share(shift_share: "ShiftShare | None") -> None:
    """Print the share of tokens that figures are for; nothing without mixtures."""
    if shift_share is not None:
        from shiftaddvit_jax.costs.report import describe_shift_share

        print(f"{describe_shift_share(shift_share)} of tokens on shift experts (--shift-share).")


def add_engine(command: argparse.ArgumentParser) -> None:
    """Add the choice of the machines that compute."""
    command.add_argument(
        "--engine",
        choices=ENGINES,
        default="local",
        help="local: this process; ray: workers of Ray, one for each GPU or else for each machine "
        "(default: %(default)s)",
    )
    command.add_argument(
        "--address",
        metavar="HOST:PORT",
        help="of a cluster of Ray that runs; default: RAY_ADDRESS, or a Ray of this machine alone",
    )


@contextmanager
def open_engine(arguments: argparse.Namespace) -> "Generator[MapOnWorkers | None]":
    """What maps over Ray's workers, see `shiftaddvit_jax.cluster.connect`; None for this process.

    With workers, JAX leaves GPUs to them in this process.
    """
    if arguments.engine == "local":
        if arguments.address:
            raise ValueError("--address is a cluster's of Ray; add --engine ray")
        yield None
        return
    from shiftaddvit_jax.cluster import connect

    with connect(arguments.address) as map_on_workers:
        import jax

        jax.config.update("jax_platforms", "cpu")
        yield map_on_workers


def add_images(command: argparse.ArgumentParser) -> None:
    """Add the images that pictures show."""
    command.add_argument(
        "--images",
        nargs="+",
        default=(),
        metavar="IMAGE",
        help="image files to show routing and attention on; default: held-out ones of the run's data",
    )


def add_checkpoint(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    """Add the checkpoint that a command reads."""
    parser.add_argument(
        "--checkpoint",
        required=required,
        metavar="DIR",
        help="a trained model's folder, such as runs/demo/moe/model",
    )


def open_folder(option: str, folder: str) -> "Examples":
    """The images in a folder and the folders in it, without labels, known by their paths from there.

    Raises:
      ValueError: no such folder, or one without images; ``option`` is where it was named.
    """
    from shiftaddvit_jax.classifier import image_files
    from shiftaddvit_jax.data import Examples
    from shiftaddvit_jax.data.images import SUFFIXES, open_image

    if not Path(folder).is_dir():
        raise ValueError(f"{option} must be a folder or one of {', '.join(SOURCES)}; got {folder}")
    files = image_files(Path(folder))
    if not files:
        raise ValueError(f"{folder} has no image files; expected {', '.join(SUFFIXES)}")
    names = [os.fsencode(file.relative_to(folder)) for file in files]
    return Examples(files, [0] * len(files), open_image, names)


def open_test_set(
    data: str, path: str, sources: Sequence[str], models: Sequence["Classifier"]
) -> "tuple[Examples, bool, str | None]":
    """A data source's held-out images, whether their labels are the models' classes, and a note on that.

    Args:
      data: one of `SOURCES`.
      path: where its images lie.
      sources: where the models came from; a run may say how its data was read.
      models: with the same classes.
    """
    from shiftaddvit_jax.checkpoints.source import is_named
    from shiftaddvit_jax.data.identity import class_difference
    from shiftaddvit_jax.data.sources import load_test_set
    from shiftaddvit_jax.subject import training_data

    places = [trained[1] for trained in map(training_data, sources) if trained is not None]
    same = [place for place in places if Path(place).absolute() == Path(path).absolute()]
    examples, names = load_test_set(data, path, same[0] if same else None)
    known = next((model.class_names for model in models if is_named(model.source)), None)
    count = len(models[0].class_names)
    if len(names) != count or (known is not None and class_difference(known, names)):
        classes = shorten(known) if known else f"{count} without names"
        return examples, False, f"the models' classes ({classes}) are not the data's ({shorten(names)})"
    note = None if known else f"no model names its classes; taken for {shorten(names)}"
    return examples, True, note


def model_notes(models: "Sequence[Classifier]", names: Sequence[str]) -> list[str]:
    """What a reader must know of how models that are set side by side were opened."""
    from shiftaddvit_jax.checkpoints.source import is_named

    notes = [
        f"{name}: {text}" for model, name in zip(models, names, strict=True) for text in model.source.notes
    ]
    named = [is_named(model.source) for model in models]
    if any(named) and not all(named):
        notes.append(f"{names[named.index(False)]} does not name its classes; taken for the other's")
    first, *others = (asdict(model.preprocessing) for model in models)
    for other in others:
        different = [f"{key} {first[key]} and {other[key]}" for key in first if first[key] != other[key]]
        if different:
            notes.append(f"each model gets its own pixels of an image: {'; '.join(different)}")
    return notes


def shorten(names: Sequence[str]) -> str:
    """The first four names, and how many there are."""
    shown = ", ".join(names[:4])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 4 else shown
