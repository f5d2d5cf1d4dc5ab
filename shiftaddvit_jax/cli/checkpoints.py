"""Commands that make one checkpoint from another."""

import argparse
import dataclasses
import warnings
from pathlib import Path
from typing import Any

from shiftaddvit_jax.cli.arguments import (
    Commands,
    add_checkpoint,
    add_command,
    add_json,
    add_precision,
    add_source,
    add_source_settings,
    present,
    print_notes,
    source_settings,
)
from shiftaddvit_jax.files import read_layers
from shiftaddvit_jax.names import ATTENTION_KINDS, LINEAR_KINDS, PRECISIONS, ROTATIONS


def add_reparameterize(commands: Commands) -> None:
    """Add ``reparameterize``."""
    description = "Change a checkpoint's attentions or layers, or import pretrained weights, or both."
    command = add_command(
        commands,
        "reparameterize",
        reparameterize_checkpoint,
        description,
        "reparameterize --checkpoint runs/demo/dense/model --attention hamming_linear --output runs/additive",
        "reparameterize --pretrained hf:OpenGVLab/pvt_v2_b0 --attention hamming_linear --mlp moe --output "
        "runs/b0-moe",
    )
    add_checkpoint(command, required=False)
    command.add_argument(
        "--pretrained",
        metavar="PATH_OR_NAME",
        help="instead of a checkpoint: weights of transformers, timm or the authors, a file, a folder, "
        "hf:ORG/NAME or timm:NAME",
    )
    add_source_settings(command)
    command.add_argument("--output", required=True, metavar="DIR", help="where the new checkpoint goes")
    per_stage = "one kind, or one a stage separated by commas:"
    command.add_argument("--attention", metavar="KIND", help=f"{per_stage} {', '.join(ATTENTION_KINDS)}")
    command.add_argument("--mlp", metavar="KIND", help=f"{per_stage} {', '.join(LINEAR_KINDS)}")
    command.add_argument("--projections", metavar="KIND", help="the same for the attentions' linear layers")
    command.add_argument(
        "--weight-terms",
        type=int,
        choices=(1, 2),
        help="powers of two in a shift layer's weight; default: unchanged, 1 in a dense model",
    )
    command.add_argument(
        "--rotation",
        choices=ROTATIONS,
        metavar="KIND",
        help=f"of queries and keys ahead of binarization, by additions: {', '.join(ROTATIONS)}; default: "
        "unchanged",
    )
    command.add_argument("--layers", metavar="FILE", help="of `search --output`: what single layers become")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="for what is new (default: 0)")
    add_json(command)


def reparameterize_checkpoint(arguments: argparse.Namespace) -> None:
    """Other attentions or linear layers for a checkpoint, or pretrained weights as a checkpoint."""
    import jax

    from shiftaddvit_jax.checkpoints import save_model
    from shiftaddvit_jax.checkpoints.source import open_model
    from shiftaddvit_jax.models import model_arguments
    from shiftaddvit_jax.models.kinds import parse_kinds
    from shiftaddvit_jax.reparameterize import reparameterization_report, reparameterize

    kinds: dict[str, Any] = {
        name: parse_kinds(getattr(arguments, name))
        for name in ("attention", "mlp", "projections")
        if getattr(arguments, name)
    }
    for name in ("weight_terms", "rotation"):
        if getattr(arguments, name):
            kinds[name] = getattr(arguments, name)
    if arguments.layers:
        kinds["layers"] = read_layers(arguments.layers)
    if (arguments.pretrained is None) == (arguments.checkpoint is None):
        raise ValueError("give one of --checkpoint and --pretrained")
    if arguments.checkpoint is not None and not kinds:
        raise ValueError(
            "nothing to change: give --attention, --mlp, --projections, --weight-terms, --layers or "
            "--rotation"
        )
    origin = arguments.checkpoint or arguments.pretrained
    model, variables, about, notes = open_model(origin, **source_settings(arguments))
    print_notes(notes)
    report = reparameterization_report(model, variables, **kinds)
    student, student_variables = reparameterize(model, variables, **kinds, key=jax.random.key(arguments.seed))
    save_model(arguments.output, student, student_variables, about)
    figures = {"output": arguments.output, "model": model_arguments(student), **dataclasses.asdict(report)}

    def show():
        print(report)
        print(f"written to {arguments.output}; finetune it with --config.init_from={arguments.output}")

    present(arguments, figures, show)


def add_pack(commands: Commands) -> None:
    """Add ``pack``."""
    command = add_command(
        commands,
        "pack",
        pack_checkpoint,
        "Lay a checkpoint's weights out for inference: those of shift layers as codes, dense ones in blocks.",
        "pack --checkpoint runs/demo/moe/model --output runs/packed",
        "pack --checkpoint runs/demo/moe/model --activations int8 --output runs/packed",
    )
    add_checkpoint(command)
    command.add_argument(
        "--activations", choices=("float", "int8"), default="float", help="default: %(default)s"
    )
    add_precision(command)
    command.add_argument("--output", required=True, metavar="DIR", help="where the packed checkpoint goes")
    add_json(command)


def pack_checkpoint(arguments: argparse.Namespace) -> None:
    """A checkpoint for inference, its shift weights as codes."""
    import jax

    from shiftaddvit_jax.checkpoints import save_model
    from shiftaddvit_jax.checkpoints.source import open_model
    from shiftaddvit_jax.models import model_arguments
    from shiftaddvit_jax.pack import pack

    model, variables, about, _ = open_model(arguments.checkpoint)
    formats = {"activations": arguments.activations, "precision": arguments.precision}
    primitives = dataclasses.replace(model.primitives, **formats)
    model = model.clone(primitives=primitives)
    with warnings.catch_warnings(record=True) as losses:
        packed = pack(model, variables)
    notes = [str(loss.message) for loss in losses]
    print_notes(notes)
    save_model(arguments.output, model, packed, about)
    before, after = (sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) for tree in (variables, packed))
    figures = {
        "output": arguments.output,
        "model": model_arguments(model),
        "bytes_before": before,
        "bytes": after,
        "notes": notes,
    }
    said = f"written to {arguments.output}: {before / 1e3:,.0f} kB became {after / 1e3:,.0f} kB"
    present(arguments, figures, lambda: print(said))


def add_export(commands: Commands) -> None:
    """Add ``export``."""
    command = add_command(
        commands,
        "export",
        export_checkpoint,
        "Write a bundle: a packed model with its classes and pixels, that runs on other machines.",
        "export runs/demo/moe --output bundle",
        "export runs/demo/moe --output bundle --kernels avx512_vnni,avx2 --stablehlo --onnx",
    )
    add_source(command)
    add_source_settings(command)
    command.add_argument("--output", required=True, metavar="DIR", help="where the bundle goes")
    command.add_argument(
        "--kernels",
        default="",
        metavar="TARGETS",
        help="compile kernels for these, separated by commas: amx, avx512_vnni, avx512, avx_vnni, avx2, "
        "neon, cuda-sm_86, ...; their machines need no compiler (up to a minute each)",
    )
    command.add_argument(
        "--threads", type=int, metavar="N", help="that share a CPU kernel's work; default: as many as here"
    )
    command.add_argument(
        "--stablehlo", action="store_true", help="add the model as a program of jax.export, for a quick start"
    )
    command.add_argument("--onnx", action="store_true", help="add the model for other runtimes")
    command.add_argument(
        "--activations", choices=("float", "int8"), help="of shift layers; default: the checkpoint's"
    )
    command.add_argument(
        "--precision", choices=PRECISIONS, help="of what dense layers multiply; default: the checkpoint's"
    )
    add_json(command)


def export_checkpoint(arguments: argparse.Namespace) -> None:
    """A bundle of a checkpoint."""
    from shiftaddvit_jax.checkpoints.bundle import export_bundle
    from shiftaddvit_jax.checkpoints.source import describe_source, open_source

    source = open_source(arguments.source, **source_settings(arguments))
    print_notes(source.notes)
    formats = {name: getattr(arguments, name) for name in ("activations", "precision")}
    formats = {name: value for name, value in formats.items() if value is not None}
    model = source.model.clone(primitives=dataclasses.replace(source.model.primitives, **formats))
    with warnings.catch_warnings(record=True) as losses:
        manifest = export_bundle(
            arguments.output,
            model,
            source.variables,
            describe_source(source),
            targets=tuple(filter(None, arguments.kernels.replace(" ", "").split(","))),
            threads=arguments.threads,
            stablehlo=arguments.stablehlo,
            onnx=arguments.onnx,
        )
    notes = [*source.notes, *(str(loss.message) for loss in losses)]
    print_notes(notes[len(source.notes) :])
    folder = Path(arguments.output)
    size = sum((folder / name).stat().st_size for name in manifest["files"])
    figures = {"output": arguments.output, **manifest, "bytes": size, "notes": notes}
    said = f"written to {folder}: {len(manifest['files']) + 1} files, {size / 1e6:.1f} MB"
    present(arguments, figures, lambda: print(said))
