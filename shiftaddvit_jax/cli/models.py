"""The command that lists the models."""

import argparse

from shiftaddvit_jax.cli.arguments import Commands, add_command, add_json, present
from shiftaddvit_jax.command import print_table
from shiftaddvit_jax.names import ATTENTION_KINDS, LINEAR_KINDS


def add_models(commands: Commands) -> None:
    """Add ``models``."""
    command = add_command(
        commands,
        "models",
        models,
        "The models there are: parameters, multiply-adds, image size, kinds.",
        "models",
        "models pvt_v2_b0 deit_tiny --json",
        "models pvt_v2_b0 --pretrained",
    )
    command.add_argument("names", nargs="*", metavar="NAME", help="show these alone")
    command.add_argument(
        "--pretrained", action="store_true", help="list published weights instead, by the names to download"
    )
    add_json(command)


def models(arguments: argparse.Namespace) -> None:
    """The models that can be created, with their sizes; or what others publish for them."""
    if arguments.pretrained:
        from shiftaddvit_jax.checkpoints import list_pretrained

        variants = arguments.names or [None]
        found = [name for variant in variants for name in list_pretrained(variant)]
        present(arguments, found, lambda: print("\n".join(found)))
        return
    from shiftaddvit_jax.costs import count_operations
    from shiftaddvit_jax.models import create_model, list_models, model_row
    from shiftaddvit_jax.models.variables import variable_shapes
    from shiftaddvit_jax.progress import track

    names = arguments.names or [*list_models(), *list_models("novel_views")]
    originals = [create_model(name) for name in names]
    rows = []
    for model in track(originals, "tracing models", len(names)):
        operations = count_operations(model, variable_shapes(model))
        rows.append(model_row(model.variant) | {"multiply_adds": round(operations.macs)})
    present(arguments, rows, lambda: _print(rows))


def _print(rows):
    from rich.table import Table

    table = Table(title="Models, with their original attention")
    for index, column in enumerate(("model", "parameters", "multiply-adds", "image", "attention")):
        table.add_column(column, justify="right" if 0 < index < 4 else "left", no_wrap=index < 4)
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['multiply_adds'] / 1e6:,.0f} M",
            str(row["image_size"] or "a ray"),
            "all" if row["attention"] == ATTENTION_KINDS else "some",
        )
    print_table(table)
    print(f"all: {', '.join(ATTENTION_KINDS)}")
    for some in sorted({row["attention"] for row in rows} - {ATTENTION_KINDS}):
        print(f"some: {', '.join(some)}")
    print(f"mlp and projections, for every model: {', '.join(LINEAR_KINDS)}")
