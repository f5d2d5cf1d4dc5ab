"""Commands that make one checkpoint from another."""

import argparse
import dataclasses
import warnings

from shiftaddvit_jax.cli.arguments import Commands, add_checkpoint, add_command, add_precision
from shiftaddvit_jax.names import ATTENTION_KINDS, LINEAR_KINDS


def add_reparameterize(commands: Commands) -> None:
    """Add ``reparameterize``."""
    description = "Change a checkpoint's attentions or layers, or import pretrained weights, or both."
    command = add_command(commands, "reparameterize", reparameterize_checkpoint, description)
    add_checkpoint(command, required=False)
    command.add_argument(
        "--pretrained",
        metavar="PATH_OR_NAME",
        help="instead of a checkpoint: weights of transformers, timm or the authors, a file, a folder, "
        "hf:ORG/NAME or timm:NAME",
    )
    command.add_argument("--model", metavar="NAME", help="whose weights --pretrained are")
    command.add_argument("--num-classes", type=int, default=1000, metavar="N", help="default: %(default)s")
    command.add_argument("--image-size", type=int, metavar="N", help="default: the model's own")
    command.add_argument("--layer-norm-eps", type=float, metavar="X", help="default: the original authors'")
    command.add_argument("--output", required=True, metavar="DIR", help="where the new checkpoint goes")
    per_stage = "one kind, or one a stage separated by commas:"
    command.add_argument("--attention", metavar="KIND", help=f"{per_stage} {', '.join(ATTENTION_KINDS)}")
    command.add_argument("--mlp", metavar="KIND", help=f"{per_stage} {', '.join(LINEAR_KINDS)}")
    command.add_argument("--projections", metavar="KIND", help="the same for the attentions' linear layers")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="for what is new (default: 0)")


def reparameterize_checkpoint(arguments: argparse.Namespace) -> None:
    """Other attentions or linear layers for a checkpoint, or pretrained weights as a checkpoint."""
    import jax

    from shiftaddvit_jax.checkpoints import load_model, load_pretrained, save_model
    from shiftaddvit_jax.models import create_model
    from shiftaddvit_jax.models.kinds import parse_kinds
    from shiftaddvit_jax.reparameterize import reparameterization_report, reparameterize

    kinds = {
        name: parse_kinds(getattr(arguments, name))
        for name in ("attention", "mlp", "projections")
        if getattr(arguments, name)
    }
    if (arguments.pretrained is None) == (arguments.checkpoint is None):
        raise ValueError("give one of --checkpoint and --pretrained")
    if arguments.checkpoint is not None:
        if not kinds:
            raise ValueError("nothing to change: give --attention, --mlp or --projections")
        model, variables, description = load_model(arguments.checkpoint)
    else:
        if arguments.model is None:
            raise ValueError("--pretrained needs --model, one of those that `shiftaddvit models` lists")
        settings = {
            name: getattr(arguments, name) for name in ("num_classes", "image_size", "layer_norm_eps")
        }
        model = create_model(arguments.model, **settings)
        variables, description = load_pretrained(model, arguments.pretrained), {}
    print(reparameterization_report(model, variables, **kinds))
    student, student_variables = reparameterize(model, variables, **kinds, key=jax.random.key(arguments.seed))
    about = {"class_names": description["class_names"]} if "class_names" in description else {}
    save_model(arguments.output, student, student_variables, about)
    print(f"written to {arguments.output}; finetune it with --config.init_from={arguments.output}")


def add_pack(commands: Commands) -> None:
    """Add ``pack``."""
    command = add_command(
        commands,
        "pack",
        pack_checkpoint,
        "Lay a checkpoint's weights out for inference: those of shift layers as codes, dense ones in blocks.",
    )
    add_checkpoint(command)
    command.add_argument(
        "--activations", choices=("float", "int8"), default="float", help="default: %(default)s"
    )
    add_precision(command)
    command.add_argument("--output", required=True, metavar="DIR", help="where the packed checkpoint goes")


def pack_checkpoint(arguments: argparse.Namespace) -> None:
    """A checkpoint for inference, its shift weights as codes."""
    import jax

    from shiftaddvit_jax.checkpoints import load_model, save_model
    from shiftaddvit_jax.pack import pack

    model, variables, description = load_model(arguments.checkpoint)
    formats = {"activations": arguments.activations, "precision": arguments.precision}
    primitives = dataclasses.replace(model.primitives, **formats)
    model = model.clone(primitives=primitives)
    with warnings.catch_warnings(record=True) as losses:
        packed = pack(model, variables)
    for loss in losses:
        print(loss.message)
    about = {name: value for name, value in description.items() if name != "model"}
    save_model(arguments.output, model, packed, about)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e3 for tree in (variables, packed)]
    print(f"written to {arguments.output}: {sizes[0]:,.0f} kB became {sizes[1]:,.0f} kB")
