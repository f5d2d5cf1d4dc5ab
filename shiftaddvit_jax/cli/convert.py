"""The commands that change a model by what images make of it, without training."""

import argparse
import dataclasses
import time
from typing import TYPE_CHECKING, Any

from shiftaddvit_jax.cli.arguments import (
    Commands,
    add_command,
    add_json,
    add_source,
    add_source_settings,
    open_folder,
    present,
    print_notes,
    source_settings,
)
from shiftaddvit_jax.command import print_table, program
from shiftaddvit_jax.files import read_latencies, read_layers
from shiftaddvit_jax.names import (
    ATTENTION_KINDS,
    PAPER_LATENCIES,
    PRECISIONS,
    PROXIES,
    ROTATIONS,
    SOURCES,
)

if TYPE_CHECKING:
    from collections.abc import Sequence

    import flax.linen as nn
    import numpy as np
    from jaxtyping import Float, Int

    from shiftaddvit_jax.calibrate import CalibratedLayer
    from shiftaddvit_jax.data import Examples
    from shiftaddvit_jax.models import Preprocessing


def add_convert(commands: Commands) -> None:
    """Add ``convert``."""
    command = add_command(
        commands,
        "convert",
        convert,
        "A dense model's linear layers as shift layers, fitted to some images without labels or training.",
        "convert runs/demo/dense --images digits --output runs/quick",
        "convert hf:OpenGVLab/pvt_v2_b0 --images photos/ --weight-terms 2 --output runs/b0-shift",
        "convert runs/demo/dense --images digits --attention hamming_linear --mlp moe --output runs/quick",
    )
    add_source(command)
    add_source_settings(command)
    add_examples(command)
    command.add_argument(
        "--count", type=int, default=256, metavar="N", help="images to take, evenly (default: %(default)s)"
    )
    add_conversion(command)
    command.add_argument(
        "--smoothing",
        type=float,
        default=0.0,
        metavar="STRENGTH",
        help="0 to 1: move outlier channels into weights, for activations in int8; SmoothQuant's is 0.5",
    )
    command.add_argument("--output", required=True, metavar="DIR", help="where the new checkpoint goes")
    add_json(command)


def add_conversion(command: argparse.ArgumentParser) -> None:
    """Add what layers become, which `conversion_settings` reads."""
    per_stage = "one kind, or one a stage separated by commas:"
    command.add_argument(
        "--mlp", default="shift", metavar="KIND", help=f"{per_stage} shift, moe, dense (default: %(default)s)"
    )
    command.add_argument(
        "--projections",
        default="dense",
        metavar="KIND",
        help="the same for the attentions' linear layers (default: %(default)s)",
    )
    command.add_argument(
        "--attention",
        metavar="KIND",
        help=f"default: unchanged; {per_stage} {', '.join(ATTENTION_KINDS)}; its last layer is fitted",
    )
    command.add_argument(
        "--rotation",
        choices=ROTATIONS,
        metavar="KIND",
        help="of queries and keys ahead of --attention's binarization, by additions: "
        f"{', '.join(ROTATIONS)}; default: unchanged",
    )
    command.add_argument(
        "--weight-terms",
        type=int,
        choices=(1, 2),
        default=1,
        help="powers of two in a shift layer's weight (default: %(default)s)",
    )
    command.add_argument(
        "--precision", choices=PRECISIONS, help="of what dense layers multiply; default: the checkpoint's"
    )
    command.add_argument(
        "--layers",
        metavar="FILE",
        help="of `search --output`: what each layer becomes, instead of what --mlp and --projections say",
    )
    command.add_argument(
        "--budget",
        type=float,
        metavar="POINTS",
        help="let each shift layer become one term, two terms, a mixture or dense in int8: the least energy "
        "that costs at most so many points of --proxy",
    )
    command.add_argument(
        "--proxy",
        choices=PROXIES,
        default="agreement",
        help="points: images in percent whose class is not the dense model's, or the logits' squared error "
        "in percent of their variance (default: %(default)s)",
    )
    command.add_argument(
        "--latencies",
        metavar="FILE",
        help="of `measure-latency --json FILE`, by which mixtures share out tokens; default: the paper's 6:4",
    )


def convert(arguments: argparse.Namespace) -> None:
    """A shift model of a dense one, and a table of how near its layers come."""
    from shiftaddvit_jax.calibrate import calibrate_with_report
    from shiftaddvit_jax.checkpoints import save_model
    from shiftaddvit_jax.checkpoints.source import describe_source, open_source

    if arguments.count < 1:
        raise ValueError(f"--count must be at least 1, got {arguments.count}")
    source = open_source(arguments.source, **source_settings(arguments))
    print_notes(source.notes)
    examples = open_examples(arguments.images, arguments.path)
    images, _ = read_evenly(examples, arguments.count, source.preprocessing)
    dense, settings = conversion_settings(source.model, arguments)
    settings["smoothing"] = arguments.smoothing
    start = time.perf_counter()
    model, variables, layers = calibrate_with_report(dense, source.variables, images, **settings)
    seconds = time.perf_counter() - start
    about = describe_source(source)
    about.pop("top1", None)  # the dense model's
    save_model(arguments.output, model, variables, about)
    figures = {"output": arguments.output, "images": len(images), **conversion_figures(layers, seconds)}

    def show():
        print_layers(layers, "image")
        print(f"written to {arguments.output}: {len(layers)} layers, {len(images)} images, {seconds:.0f} s")
        print(f"Next: {program()} pack --checkpoint {arguments.output} --output {arguments.output}-packed")

    present(arguments, figures, show)


def add_balance(commands: Commands) -> None:
    """Add ``balance``."""
    command = add_command(
        commands,
        "balance",
        balance,
        "A mixture's routers, set so that shift experts get the share of tokens that latencies ask for.",
        "balance runs/demo/moe --images digits --output runs/balanced",
        "balance runs/demo/moe --images photos/ --latencies latencies.json --output runs/balanced",
    )
    add_source(command)
    add_examples(command)
    command.add_argument(
        "--count", type=int, default=64, metavar="N", help="images to take, evenly (default: %(default)s)"
    )
    command.add_argument(
        "--latencies",
        metavar="FILE",
        help="of `measure-latency --json FILE`, on the machine that will answer; default: the paper's 6:4",
    )
    command.add_argument("--output", required=True, metavar="DIR", help="where the new checkpoint goes")
    add_json(command)


def balance(arguments: argparse.Namespace) -> None:
    """The same model with other routers' biases, and its shares before and after."""
    from shiftaddvit_jax.balance import balance_routers, measured_shares
    from shiftaddvit_jax.checkpoints import save_model
    from shiftaddvit_jax.checkpoints.source import describe_source, open_source

    if arguments.count < 1:
        raise ValueError(f"--count must be at least 1, got {arguments.count}")
    latencies = read_latencies(arguments.latencies) if arguments.latencies else PAPER_LATENCIES
    source = open_source(arguments.source)
    print_notes(source.notes)
    examples = open_examples(arguments.images, arguments.path)
    images, _ = read_evenly(examples, arguments.count, source.preprocessing)
    variables = balance_routers(source.model, source.variables, images, latencies)
    before, after = (measured_shares(source.model, each, images) for each in (source.variables, variables))
    about = describe_source(source)
    about.pop("top1", None)  # that of the routers as they were
    save_model(arguments.output, source.model, variables, about)
    figures = {"output": arguments.output, "images": len(images), "before": before, "now": after}

    def show():
        _print_shares(before, after)
        print(f"written to {arguments.output}: {len(after)} routers, {len(images)} images")

    present(arguments, figures, show)


def _print_shares(before, after):
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE, title="Tokens on the shift expert, %")
    table.add_column("layer")
    for name in ("before", "now"):
        table.add_column(name, justify="right")
    for layer, share in after.items():
        table.add_row(Text(layer), f"{100 * before[layer]:.1f}", f"{100 * share:.1f}")
    print_table(table)


def conversion_settings(
    model: "nn.Module", arguments: argparse.Namespace
) -> "tuple[nn.Module, dict[str, Any]]":
    """The dense model to convert, and arguments of `calibrate`, from options that `add_conversion` added."""
    from shiftaddvit_jax.models.kinds import parse_kinds

    names = ("attention", "mlp", "projections")
    settings: dict[str, Any] = {
        name: parse_kinds(getattr(arguments, name)) for name in names if getattr(arguments, name)
    }
    settings |= {name: getattr(arguments, name) for name in ("weight_terms", "rotation", "budget", "proxy")}
    if arguments.latencies:
        settings["latencies"] = read_latencies(arguments.latencies)
    if arguments.layers:
        if arguments.budget is not None:
            raise ValueError("--layers says what each layer becomes; leave out --budget")
        settings |= {"mlp": "dense", "projections": "dense", "layers": read_layers(arguments.layers)}
    if arguments.precision:
        primitives = dataclasses.replace(model.primitives, precision=arguments.precision)
        model = model.clone(primitives=primitives)
    return model, settings


def conversion_figures(layers: "Sequence[CalibratedLayer]", seconds: float) -> dict[str, Any]:
    """How near layers come, and the seconds that this took on what machine, as values of JSON."""
    from shiftaddvit_jax.bench.rounds import describe_timing

    return {"layers": [layer._asdict() for layer in layers], "seconds": seconds, **describe_timing()}


def print_layers(layers: "Sequence[CalibratedLayer]", unit: str) -> None:
    """A table of how near layers come, with their energy for one ``unit``."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE)
    table.add_column("layer")
    table.add_column("is now")
    for name in ("rounded, dB", "calibrated, dB", "energy, µJ"):
        table.add_column(name, justify="right")
    for layer in layers:
        numbers = f"{layer.rounded:.1f}", f"{layer.calibrated:.1f}", f"{layer.energy:.3g}"
        table.add_row(Text(layer.name), layer.choice, *numbers)
    print_table(table)
    print(f"Energy: products of one {unit} on an accelerator in 45 nm CMOS, activations in int8.")


def add_examples(command: argparse.ArgumentParser) -> None:
    """Add the images that `open_examples` opens."""
    command.add_argument(
        "--images",
        required=True,
        metavar="DIR_OR_DATA",
        help=f"a folder of images, or the training images of a data source: {', '.join(SOURCES)}",
    )
    command.add_argument("--path", default="", metavar="DIR", help="where the data source's images lie")


def open_examples(images: str, path: str) -> "Examples":
    """The images in a folder, or those that a data source trains on."""
    from shiftaddvit_jax.data import load_dataset

    return load_dataset(images, path).train if images in SOURCES else open_folder("--images", images)


def read_evenly(
    examples: "Examples", count: int, preprocessing: "Preprocessing"
) -> "tuple[Float[np.ndarray, 'images size size 3'], Int[np.ndarray, 'images']]":
    """``count`` of the images, or all, as inputs of a model, and labels; what can't be read is left out."""
    import numpy as np

    from shiftaddvit_jax.data import evaluation_batches

    some = examples.evenly(count)
    batches = list(evaluation_batches(some, preprocessing=preprocessing, batch_size=min(64, len(some))))
    images, labels = (
        np.concatenate([batch[name][batch["real"]] for batch in batches]) for name in ("image", "label")
    )
    if not len(images):
        raise ValueError("none of the images can be read")
    return images, labels
