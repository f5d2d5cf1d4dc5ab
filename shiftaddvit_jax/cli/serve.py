"""The command that answers requests."""

import argparse
import re

from shiftaddvit_jax.cli.arguments import Commands, add_command, add_source
from shiftaddvit_jax.optional import require

MEBIBYTE = 2**20


def add_serve(commands: Commands) -> None:
    """Add ``serve``."""
    command = add_command(
        commands,
        "serve",
        serve,
        "Answer requests over HTTP: classes of images.",
        "serve runs/demo/moe",
        "serve hf:OpenGVLab/pvt_v2_b0 --port 9000 --max-batch 16",
    )
    add_source(command)
    command.add_argument("--model", metavar="NAME", help="the variant, where nothing beside weights tells it")
    command.add_argument(
        "--name", metavar="NAME", help="the model's name in paths (default: SOURCE's last part)"
    )
    command.add_argument("--host", default="127.0.0.1", metavar="HOST", help="default: %(default)s")
    command.add_argument(
        "--port", type=int, default=8000, metavar="N", help="0 for any free one (default: %(default)s)"
    )
    numbers = (
        ("--max-batch", int, 8, "N", "images computed at once, at most"),
        ("--max-wait-ms", float, 2.0, "MS", "how long an image waits for others, at most"),
        ("--queue", int, 64, "N", "images held at once, at most; more are refused"),
        ("--timeout", float, 30.0, "S", "seconds to an answer, at most"),
        ("--body-timeout", float, 10.0, "S", "seconds in which a body must come"),
        ("--max-body", int, 32, "MIB", "size of a body, at most"),
        ("--max-pixels", int, 20_000_000, "N", "pixels of an image, at most"),
    )
    for name, kind, default, unit, about in numbers:
        command.add_argument(
            name, type=kind, default=default, metavar=unit, help=f"{about} (default: %(default)s)"
        )


def serve(arguments: argparse.Namespace) -> None:
    """Answer requests until SIGTERM or Ctrl-C."""
    require("serve", "serving")
    import jax

    from shiftaddvit_jax.classifier import from_pretrained
    from shiftaddvit_jax.serve import server
    from shiftaddvit_jax.serve.app import create_app
    from shiftaddvit_jax.serve.service import Settings

    settings = Settings(
        arguments.name or name_of(arguments.source),
        max_batch=arguments.max_batch,
        max_wait_ms=arguments.max_wait_ms,
        queue=arguments.queue,
        timeout=arguments.timeout,
        body_timeout=arguments.body_timeout,
        max_body=arguments.max_body * MEBIBYTE,
        max_pixels=arguments.max_pixels,
    )
    # One thread computes; it then does so itself, and the kernels' own threads stay awake.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    with server.bind(arguments.host, arguments.port) as listener:
        classifier = from_pretrained(arguments.source, model=arguments.model, max_batch=settings.max_batch)
        for note in classifier.source.notes:
            print(f"note: {note}", flush=True)
        if not server.is_loopback(listener):
            print("warning: others reach this address, without TLS or authentication; put a proxy before it")
        app = create_app(classifier, settings)
        app.state.service.warm_up()
        said = f"{settings.name} answers at {server.address(listener)} (Ctrl-C ends it)"
        server.run(app, listener, settings.body_timeout + settings.timeout, said)


def name_of(source: str) -> str:
    """A name for paths: the last part of a source that says something."""
    parts = [part for part in re.split(r"[/\\:]", source) if part not in ("", ".", "..", "model")]
    return re.sub(r"[^\w.-]", "-", parts[-1] if parts else "model", flags=re.ASCII)
