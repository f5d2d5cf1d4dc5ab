"""The command ``shiftaddvit``."""

import argparse
import dataclasses
import json
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import jax
import numpy as np
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

import shiftaddvit_jax
from kernels_tvm.gpu.targets import GPU_TARGETS, gpu_target
from kernels_tvm.library import cache_folder, user_records
from kernels_tvm.targets import host_target
from shiftaddvit_jax import main as training
from shiftaddvit_jax.analysis import (
    cost_report,
    count_operations,
    energy_savings,
    group_modules,
    measure_latency,
    plot_bench,
    plot_expert_latency,
)
from shiftaddvit_jax.analysis.bench import PEERS, bench_kernels, bench_model, random_variables
from shiftaddvit_jax.analysis.counting import PRIMITIVES
from shiftaddvit_jax.analysis.energy import FORMATS
from shiftaddvit_jax.analysis.gallery import PICTURES, draw_picture
from shiftaddvit_jax.analysis.page import write_page
from shiftaddvit_jax.analysis.pictures import check_picture
from shiftaddvit_jax.analysis.report import ENERGY_MODELS, PAPER_MODELS, SHIFT_SHARE
from shiftaddvit_jax.analysis.rounds import available_threads
from shiftaddvit_jax.analysis.subject import Subject, distinct_names, example_pixels, load_subject
from shiftaddvit_jax.checkpoints import load_model, load_pretrained, save_model
from shiftaddvit_jax.command import Parser, run_command, table_console
from shiftaddvit_jax.compile import compile_kernels, export_kernels, kernels_of, tune_kernels
from shiftaddvit_jax.data import load_dataset, load_image
from shiftaddvit_jax.data.sources import SOURCES
from shiftaddvit_jax.demo import print_report, run_demo
from shiftaddvit_jax.files import write_json
from shiftaddvit_jax.models import create_model, list_models, model_arguments, model_row
from shiftaddvit_jax.models.create import variable_shapes
from shiftaddvit_jax.nn import ATTENTION_KINDS, LINEAR_KINDS
from shiftaddvit_jax.ops.implementation import IMPLEMENTATIONS
from shiftaddvit_jax.pack import pack
from shiftaddvit_jax.progress import track
from shiftaddvit_jax.reparameterize import reparameterization_report, reparameterize
from shiftaddvit_jax.train import evaluate
from shiftaddvit_jax.train.loop import parse_kinds


def demo(arguments: argparse.Namespace) -> None:
    """Train, reparameterize and compare on handwritten digits."""
    workdir = Path(arguments.workdir).absolute()
    report = run_demo(workdir, seed=arguments.seed)
    print_report(report, workdir)


def evaluate_checkpoint(arguments: argparse.Namespace) -> None:
    """Accuracy of a checkpoint on a test set."""
    model, variables, description = load_model(arguments.checkpoint)
    dataset = load_dataset(arguments.data, arguments.path)
    known = description.get("class_names")
    if known is not None and tuple(known) != dataset.class_names:
        raise ValueError(
            f"the checkpoint's classes ({_shorten(known)}) are not the data's "
            f"({_shorten(dataset.class_names)})"
        )
    found = evaluate(model, variables, dataset.test)
    if arguments.json:
        print(json.dumps({**found, "confusion": found["confusion"].tolist(), "images": len(dataset.test)}))
        return
    print(f"top-1 {found['top1']:.2%}, loss {found['loss']:.4f} nats, on {len(dataset.test)} held-out images")
    if found["shift_share"]:
        print(f"tokens on shift experts: {np.mean(list(found['shift_share'].values())):.1%}")


def reparameterize_checkpoint(arguments: argparse.Namespace) -> None:
    """Other attentions or linear layers for a checkpoint, or pretrained weights as a checkpoint."""
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


def models(arguments: argparse.Namespace) -> None:
    """What there is to create, and how large it is."""
    names = arguments.names or list_models()
    originals = [create_model(name) for name in names]
    rows = []
    for model in track(originals, "tracing models", len(names)):
        operations = count_operations(model, variable_shapes(model))
        rows.append(model_row(model.variant) | {"multiply_adds": round(operations.macs)})
    if arguments.json:
        print(json.dumps(rows))
        return
    table = Table(title="Models, with their original attention")
    for index, column in enumerate(("model", "parameters", "multiply-adds", "image", "attention")):
        table.add_column(column, justify="right" if 0 < index < 4 else "left", no_wrap=index < 4)
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['parameters'] / 1e6:.2f} M",
            f"{row['multiply_adds'] / 1e6:,.0f} M",
            str(row["image_size"]),
            "all" if row["attention"] == ATTENTION_KINDS else "some",
        )
    table_console().print(table)
    print(f"all: {', '.join(ATTENTION_KINDS)}")
    for some in sorted({row["attention"] for row in rows} - {ATTENTION_KINDS}):
        print(f"some: {', '.join(some)}")
    print(f"mlp and projections, for every model: {', '.join(LINEAR_KINDS)}")


def predict(arguments: argparse.Namespace) -> None:
    """The five most probable classes of each image."""
    model, variables, description = load_model(arguments.checkpoint)
    images = np.stack([load_image(path, model.image_size) for path in arguments.images])
    names = description.get("class_names") or [str(label) for label in range(model.num_classes)]
    # One image at a time: one compilation serves any number of them.
    apply = jax.jit(lambda image: jax.nn.softmax(model.apply(variables, image[None]))[0])
    predictions = {}
    for path, image in zip(arguments.images, images, strict=True):
        probabilities = np.asarray(apply(image))
        best = np.argsort(-probabilities, kind="stable")[:5]
        predictions[path] = [(str(names[label]), float(probabilities[label])) for label in best]
    if arguments.json:
        entries = {
            path: [{"class": name, "probability": share} for name, share in top]
            for path, top in predictions.items()
        }
        print(json.dumps(entries))
        return
    for path, top in predictions.items():
        table = Table(title=path, title_justify="left", box=None, show_header=False)
        for name, share in top:
            table.add_row(name, f"{share:.1%}", "█" * round(30 * share))
        Console(soft_wrap=True).print(table)


def bench(arguments: argparse.Namespace) -> None:
    """How long models, or kernels, take here beside others."""
    settings = {"threads": arguments.threads, "rounds": arguments.rounds}
    if (arguments.model is None) != arguments.kernels:
        raise ValueError("give a model's name or --kernels")
    _check_folders(arguments.json, arguments.plot)
    kinds = {name: parse_kinds(getattr(arguments, name)) for name in ("attention", "mlp", "projections")}
    if arguments.device == "gpu":
        from shiftaddvit_jax.analysis.gpu_bench import bench_gpu_kernels, bench_gpu_model

        if arguments.kernels:
            report = bench_gpu_kernels(arguments.rounds)
        else:
            report = bench_gpu_model(
                arguments.model,
                rounds=arguments.rounds,
                batch=arguments.batch,
                image_size=arguments.image_size,
                activations=arguments.activations,
                **kinds,
            )
    elif arguments.kernels:
        report = bench_kernels(**settings)
    else:
        report = bench_model(
            arguments.model,
            **settings,
            batch=arguments.batch,
            image_size=arguments.image_size,
            implementations=arguments.implementation or ("tvm", "xla"),
            peers=[peer for peer in arguments.peers.split(",") if peer],
            **kinds,
            activations=arguments.activations,
        )
    _print_bench(report)
    if arguments.json:
        write_json(Path(arguments.json), report)
    if arguments.plot:
        plot_bench(report, arguments.plot)


def report(arguments: argparse.Namespace) -> None:
    """What a model computes, and what that costs in energy."""
    if (arguments.model is None) != arguments.savings:
        raise ValueError("give a checkpoint's folder or a model's name, or --savings")
    if arguments.html and arguments.savings:
        raise ValueError("--html is a page about one model; leave out --savings")
    _check_folders(arguments.json, arguments.html)
    if arguments.savings:
        found = energy_savings(
            PAPER_MODELS,
            arguments.shift_share,
            lambda names: track(names, "tracing models", len(PAPER_MODELS)),
        )
        _print_savings(found, arguments.shift_share)
    else:
        settings = {
            "shift_share": arguments.shift_share,
            "batch": arguments.batch,
            "number_format": arguments.number_format,
        }
        subject = _reported_subject(arguments)
        subjects = [subject]
        found = cost_report(subject.model, subject.variables, **settings)
        _print_report(found)
        mixtures = found["shift_share"] is not None
        if arguments.compare:
            subjects = distinct_names([_compared_subject(arguments.compare, subject), subject])
            found["compare"] = cost_report(subjects[0].model, subjects[0].variables, **settings)
            _print_comparison(found, found["compare"])
            mixtures |= found["compare"]["shift_share"] is not None
        _print_assumptions(arguments.shift_share if mixtures else None)
        if arguments.html:
            reports = [*filter(None, [found.get("compare")]), found]
            has_images = arguments.images or subject.data
            pixels = example_pixels(subject, 2, arguments.images) if has_images else None
            write_page(arguments.html, subjects, reports, pixels)
            print(f"The page is in {arguments.html}")
    if arguments.json:
        write_json(Path(arguments.json), found)


def plot(arguments: argparse.Namespace) -> None:
    """One picture of trained models."""
    if arguments.kind not in PICTURES:
        raise ValueError(f"unknown picture {arguments.kind!r}; known: {', '.join(PICTURES)}")
    check_picture(arguments.output)
    subjects = distinct_names([load_subject(folder) for folder in arguments.folders])
    picture = PICTURES[arguments.kind]
    pixels = example_pixels(subjects[0], 10, arguments.images) if picture.sees_images else None
    draw_picture(arguments.kind, subjects, pixels, arguments.output)
    print(f"{picture.caption} Written to {arguments.output}")


def measure_experts(arguments: argparse.Namespace) -> None:
    """Latencies of the experts of a model's mixtures."""
    _check_folders(arguments.json, arguments.plot)
    if arguments.plot:
        check_picture(arguments.plot)
    subject = _reported_subject(arguments)
    settings = {"implementation": arguments.implementation}
    if arguments.activations:
        settings["activations"] = arguments.activations
    primitives = dataclasses.replace(subject.model.primitives, **settings)
    subject = dataclasses.replace(subject, model=subject.model.clone(primitives=primitives))
    model, variables = (
        (subject.model, subject.variables) if arguments.implementation == "xla" else subject.for_inference()
    )
    found = measure_latency(model, variables, batch=arguments.batch, rounds=arguments.rounds)
    _print_experts(found)
    if arguments.json:
        write_json(Path(arguments.json), found)
    if arguments.plot:
        plot_expert_latency(found, arguments.plot)


def _print_experts(found):
    title = f"Experts of {found['model']['name']}, {found['batch']} x {found['model']['image_size']} px"
    table = Table(title=f"{title}; median µs, and their line for n tokens")
    for column in ("layer", "tokens", "dense", "line", "shift", "line", "ratio"):
        table.add_column(column, justify="left" if column == "layer" else "right", no_wrap=True)
    for layer in found["layers"]:
        dense_ms, shift_ms = layer["latencies"]
        lines = [
            f"{1e3 * layer[expert]['base_ms']:.1f} {layer[expert]['us_per_token']:+.3f} n"
            for expert in ("dense", "shift")
        ]
        times = (f"{1e3 * dense_ms:,.1f}", lines[0], f"{1e3 * shift_ms:,.1f}", lines[1])
        table.add_row(layer["name"], str(layer["tokens"]), *times, f"{dense_ms / shift_ms:.2f}")
    table_console().print(table)
    machine = found["machine"]
    print(f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores; {machine['system']}")
    print("Ratio: dense over shift. To train with these: --config.train.latencies=FILE, of --json FILE.")


def _shift_share(text):
    """A share, or by MoE layer those that ``eval --json`` printed into a file."""
    try:
        return float(text)
    except ValueError:
        pass
    try:
        return json.loads(Path(text).read_text())["shift_share"]
    except (OSError, ValueError, KeyError, TypeError):
        message = f"{text!r} is neither a number nor a file with what `shiftaddvit eval --json` prints"
        raise argparse.ArgumentTypeError(message) from None


def _reported_subject(arguments):
    """The model of ``report``: a checkpoint as it is, or any model with random weights."""
    changes = {
        name: parse_kinds(getattr(arguments, name))
        for name in ("attention", "mlp", "projections")
        if getattr(arguments, name)
    }
    if arguments.image_size:
        changes["image_size"] = arguments.image_size
    subject = _subject(arguments.model)
    return _changed(subject, changes) if changes else subject


def _compared_subject(name, subject):
    if name not in ATTENTION_KINDS:
        return _subject(name)
    return _changed(subject, {"attention": name, "mlp": "dense", "projections": "dense"})


def _changed(subject, changes):
    """Another model than the one that was trained, with random weights."""
    model = create_model(**model_arguments(subject.model) | changes)
    kinds = dict.fromkeys([*model.attention, *model.mlp, *model.projections])
    return Subject(f"{model.variant} ({', '.join(kinds)})", model, random_variables(model), is_trained=False)


def _subject(name):
    if Path(name).is_dir():
        return load_subject(name)
    model = create_model(name)
    return Subject(name, model, random_variables(model), is_trained=False)


def _check_folders(*files: str | None) -> None:
    """Raise a ``ValueError`` unless the folders of files to be written exist."""
    for file in filter(None, files):
        if not Path(file).absolute().parent.is_dir():
            raise ValueError(f"{file} cannot be written: there is no such folder")


def pack_checkpoint(arguments: argparse.Namespace) -> None:
    """A checkpoint for inference, its shift weights as codes."""
    model, variables, description = load_model(arguments.checkpoint)
    primitives = dataclasses.replace(model.primitives, activations=arguments.activations)
    model = model.clone(primitives=primitives)
    with warnings.catch_warnings(record=True) as losses:
        packed = pack(model, variables)
    for loss in losses:
        print(loss.message)
    about = {name: value for name, value in description.items() if name != "model"}
    save_model(arguments.output, model, packed, about)
    sizes = [sum(leaf.nbytes for leaf in jax.tree.leaves(tree)) / 1e3 for tree in (variables, packed)]
    print(f"written to {arguments.output}: {sizes[0]:,.0f} kB became {sizes[1]:,.0f} kB")


def _kernel_model(arguments):
    return create_model(
        arguments.model,
        image_size=arguments.image_size,
        **{name: parse_kinds(getattr(arguments, name)) for name in ("attention", "mlp", "projections")},
        activations=arguments.activations,
        implementation="tvm",
    )


def compile_model(arguments: argparse.Namespace) -> None:
    """A model's kernels, compiled into the cache, or for a GPU into a folder."""
    if (arguments.target is None) != (arguments.output is None):
        raise ValueError("--target and --output come together: a GPU's libraries go to a folder")
    target = gpu_target(arguments.target) if arguments.target else None
    model = _kernel_model(arguments)
    start = time.perf_counter()
    if target:
        manifest = export_kernels(model, target, Path(arguments.output))
        seconds = time.perf_counter() - start
        print(f"{len(manifest['kernels'])} kernels for {target.name} in {seconds:.1f} s: {arguments.output}")
        return
    kernels = kernels_of(model)
    traced = time.perf_counter() - start
    compile_kernels(kernels)
    seconds = time.perf_counter() - start - traced
    found = f"{len(kernels)} kernels for {host_target().name} in {seconds:.2f} s"
    print(f"{found}, after {traced:.2f} s to trace the model; kept in {cache_folder()}")


def tune_model(arguments: argparse.Namespace) -> None:
    """Tile sizes for a model's kernels, measured here."""
    results = tune_kernels(_kernel_model(arguments), arguments.batch)
    table = Table(title=f"Kernels of {arguments.model} on {host_target().name}")
    for column in ("kernel", "before (ms)", "after (ms)", "changed"):
        table.add_column(column, justify="right" if "ms" in column else "left")
    for kernel, facts, before, after in results:
        changed = ", ".join(f"{name} {value}" for name, value in facts.items()) or "nothing"
        table.add_row(kernel.name, f"{before * 1e3:.3f}", f"{after * 1e3:.3f}", changed)
    table_console().print(table)
    print(f"written to {user_records(host_target())}")


def gpu_report(arguments: argparse.Namespace) -> None:
    """What the GPU kernels take and can reach, said without a GPU."""
    from shiftaddvit_jax.analysis.gpu_report import static_report

    report = static_report()
    _print_gpu_report(report)
    if arguments.json:
        write_json(Path(arguments.json), report)


def _print_gpu_report(report: dict) -> None:
    kernels = {}
    for row in report["rows"]:
        kernels.setdefault(row["kernel"], []).append(row)
    takes = Table(title="What a launch takes, on the GPU where it takes most", box=SIMPLE)
    bounds = Table(title="Lower bounds of times in µs, in brackets those of dense float32", box=SIMPLE)
    for table, columns in (
        (takes, ("kB", "Mop", "registers", "shared kB", "occupancy", "spills")),
        (bounds, [row["gpu"] for row in next(iter(kernels.values()))]),
    ):
        table.add_column("kernel", no_wrap=True)
        for column in columns:
            table.add_column(column, justify="right", no_wrap=True)
    for name, rows in kernels.items():
        launches = [launch for row in rows for launch in row["launches"].values()]
        takes.add_row(
            name,
            f"{rows[0]['bytes'] / 1e3:,.0f}",
            f"{sum(rows[0]['operations'].values()) / 1e6:,.1f}",
            str(max(launch["registers"] for launch in launches)),
            f"{max(launch['shared_memory'] for launch in launches) / 1e3:.1f}",
            f"{min(launch['occupancy'] for launch in launches):.0%}",
            str(max(launch["spills"] for launch in launches)),
        )
        dense = [row["dense_bound_seconds"] for row in rows]
        bounds.add_row(
            name,
            *(
                f"{1e6 * row['bound_seconds']:.1f}" + (f" ({1e6 * other:.1f})" if other else "")
                for row, other in zip(rows, dense, strict=True)
            ),
        )
    for table in (takes, bounds):
        table_console().print(table)


def _print_bench(report):
    kernels = "model" not in report
    if kernels:
        title, unit, scale, digits = "Kernels; ratios are to XLA's dense float32", "µs", 1e3, 1
    else:
        size, references = report["model"]["image_size"], [row.get("reference") for row in report["rows"]]
        title = f"{report['model']['name']}, {report['batch']} x {size} x {size}"
        title += f"; ratios are to {next(filter(None, references), 'none')}"
        unit, scale, digits = "ms", 1, 2
    table = Table(title=title)
    table.add_column("contestant", no_wrap=True)
    for column in (f"median ({unit})", f"10 to 90 % ({unit})", "ratio", "Gop/s" if kernels else "numbers"):
        table.add_column(column, justify="right", no_wrap=True)
    refused = {}
    for row in report["rows"]:
        if "refused" in row:
            refused.setdefault(row["refused"], []).append(row["name"])
            continue
        median, low, high = (f"{scale * row[key]:,.{digits}f}" for key in ("median_ms", "p10_ms", "p90_ms"))
        share = f"{row['ratio']:.2f}" if "ratio" in row else ""
        numbers = f"{row['giga_operations_a_second']:,.0f}" if kernels else row["precision"]
        table.add_row(row["name"], median, f"{low} to {high}", share, numbers)
    table_console().print(table)
    for message, names in refused.items():
        print(f"not run: {_shorten(names)}: {message}")
    machine = report["machine"]
    if "gpu" in machine:
        print(f"{machine['gpu']}, compute capability {machine['compute_capability']}")
    else:
        print(f"{machine['cpu']}, {machine['threads']} of {machine['cores']} cores; {machine['system']}")
    print(", ".join(f"{package} {version}" for package, version in report["versions"].items()))


def _report_title(report):
    model = report["model"]
    kinds = [model[name] for name in ("attention", "mlp", "projections")]
    kinds = ["/".join(dict.fromkeys(kind)) for kind in kinds]
    return f"{model['name']}, {', '.join(kinds)}, {report['batch']} x {model['image_size']} px"


def _print_report(report):
    operations = [name for name in PRIMITIVES if report[name]]
    energies = [name for name in ENERGY_MODELS if name in report["energy_mj"]]
    table = Table(title=f"{_report_title(report)}; energies in mJ")
    table.add_column("module", no_wrap=True)
    for column in [*(f"{name} (M)" for name in operations), *energies, "weights (kB)"]:
        table.add_column(column, justify="right")
    groups = group_modules(report["modules"])
    for name, costs in {**groups, "total": report}.items():
        if not any(costs[operation] for operation in operations):
            continue
        if name == "total":
            table.add_section()
        table.add_row(
            name,
            *(f"{costs[operation] / 1e6:,.1f}" if costs[operation] else "" for operation in operations),
            *(f"{costs['energy_mj'][model]:,.3f}" for model in energies),
            f"{costs['weight_bytes'] / 1e3:,.1f}",
        )
    table_console().print(table)


def _print_comparison(report, other):
    rows = [(f"{name} (M)", report[name] / 1e6, other[name] / 1e6) for name in PRIMITIVES]
    for name in ENERGY_MODELS:
        if name in report["energy_mj"]:
            energies = [found["energy_mj"][name] for found in (report, other)]
            rows.append((f"energy, {name} (mJ)", *energies))
    rows.append(("accelerator latency (ms)", report["latency_ms"], other["latency_ms"]))
    for name in ("weight", "activation"):
        rows.append((f"{name}s (kB)", *(found[f"{name}_bytes"] / 1e3 for found in (report, other))))
    table = Table(title="Comparison")
    table.add_column("", no_wrap=True)
    for column in (_report_title(report), _report_title(other), "saved"):
        table.add_column(column, justify="right")
    for name, ours, theirs in rows:
        if ours or theirs:
            table.add_row(
                name, f"{ours:,.3f}", f"{theirs:,.3f}", f"{1 - ours / theirs:.1%}" if theirs else ""
            )
    table_console().print(table)


def _print_savings(rows, shift_share):
    table = Table(title="Energy that ShiftAddViT (hamming_linear, moe) saves of msa and sra, at 224 px")
    table.add_column("model", no_wrap=True)
    for dense in ("msa", "sra"):
        for name in ENERGY_MODELS:
            table.add_column(f"{dense}: {name}", justify="right")
    for row in rows:
        ours = row["energy_mj"]["shiftaddvit"]
        saved = [
            f"{1 - ours[name] / row['energy_mj'][dense][name]:.1%}" if dense in row["energy_mj"] else "-"
            for dense in ("msa", "sra")
            for name in ENERGY_MODELS
        ]
        table.add_row(row["name"], *saved)
    table_console().print(table)
    _print_assumptions(shift_share)


def _print_assumptions(shift_share):
    print("Energy: compute is arithmetic alone; accelerator and authors are two models with data movement.")
    if isinstance(shift_share, Mapping):
        print(f"{np.mean(list(shift_share.values())):.1%} of tokens on shift experts, as measured.")
    elif shift_share is not None:
        print(f"{shift_share:.0%} of tokens on shift experts (--shift-share).")


def _shorten(names: Sequence[str]) -> str:
    shown = ", ".join(names[:4])
    return f"{shown}, ... ({len(names)} in all)" if len(names) > 4 else shown


def build_parser() -> argparse.ArgumentParser:
    """The parser of all commands."""
    parser = Parser(
        prog="shiftaddvit",
        description="Vision transformers reparameterized into shifts and adds.",
        epilog="Start with `shiftaddvit demo`; `shiftaddvit COMMAND --help` says more of each.",
    )
    parser.add_argument("--version", action="version", version=shiftaddvit_jax.__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(name, function, description):
        command = commands.add_parser(name, help=description, description=description)
        command.set_defaults(run=function)
        return command

    command = add(
        "demo", demo, "On real handwritten digits: train a dense model, reparameterize it, compare (minutes)."
    )
    command.add_argument("--workdir", default="runs/demo", metavar="DIR", help="default: %(default)s")
    command.add_argument("--seed", type=int, default=0, metavar="N", help="default: %(default)s")

    command = add("train", None, "Train and evaluate what a config describes; run again to resume.")
    training.add_arguments(command)

    command = add("eval", evaluate_checkpoint, "Accuracy of a checkpoint on held-out images.")
    _add_checkpoint(command)
    command.add_argument("--data", choices=SOURCES, default="digits", help="default: %(default)s")
    command.add_argument("--path", default="", metavar="DIR", help="where a folder or IDX data set lies")
    command.add_argument("--json", action="store_true", help="print JSON")

    command = add("models", models, "The models there are: parameters, multiply-adds, image size, kinds.")
    command.add_argument("names", nargs="*", metavar="NAME", help="show these alone")
    command.add_argument("--json", action="store_true", help="print JSON")

    description = "Change a checkpoint's attentions or layers, or import pretrained weights, or both."
    command = add("reparameterize", reparameterize_checkpoint, description)
    _add_checkpoint(command, required=False)
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

    description = "Time a ShiftAddViT beside its dense model, in JAX and in other runtimes, or the kernels."
    command = add("bench", bench, description)
    command.add_argument("model", nargs="?", metavar="MODEL", help="one of those of `shiftaddvit models`")
    command.add_argument(
        "--device",
        choices=("cpu", "gpu"),
        default="cpu",
        help="where; default: %(default)s. On a GPU peers, threads and implementations do not count",
    )
    command.add_argument(
        "--kernels",
        action="store_true",
        help="every kernel instead of a model; of the options, only the last four count",
    )
    _add_kinds(command)
    command.add_argument(
        "--implementation",
        action="append",
        choices=IMPLEMENTATIONS,
        help="may be repeated; default: tvm and xla",
    )
    command.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time (default: 1)")
    command.add_argument(
        "--peers",
        default="",
        metavar="NAMES",
        help=f"other runtimes, separated by commas: {', '.join(PEERS)}",
    )
    command.add_argument(
        "--threads", type=int, default=available_threads(), metavar="N", help="default: %(default)s, all"
    )
    command.add_argument(
        "--rounds", type=int, default=10, metavar="N", help="turns of each contestant; default: %(default)s"
    )
    command.add_argument("--json", metavar="FILE", help="write all figures there")
    command.add_argument("--plot", metavar="FILE", help="draw them there, as PNG or SVG")

    description = "What a model computes and what energy that takes, module by module."
    command = add("report", report, description)
    _add_subject(command, nargs="?")
    command.add_argument("--batch", type=int, default=1, metavar="N", help="images (default: %(default)s)")
    command.add_argument(
        "--number-format", choices=FORMATS, help="for energies; default: those that the model computes in"
    )
    command.add_argument(
        "--shift-share",
        type=_shift_share,
        default=SHIFT_SHARE,
        metavar="X",
        help="of tokens on shift experts: a number, or the file that `eval --json` printed (default: "
        "%(default)s, the balancing loss's aim)",
    )
    command.add_argument(
        "--compare",
        metavar="OTHER",
        help="a checkpoint, a model's name, or a kind of attention: the same model, dense, with that",
    )
    command.add_argument(
        "--savings",
        action="store_true",
        help=f"instead of a model: what ShiftAddViT saves on {', '.join(PAPER_MODELS)}",
    )
    command.add_argument("--html", metavar="FILE", help="write one page there with all of it, and pictures")
    _add_images(command)
    command.add_argument("--json", metavar="FILE", help="write all figures there")

    description = "What the GPU kernels move, take and can reach at most, said by nvcc without a GPU."
    command = add("gpu-report", gpu_report, description)
    command.add_argument("--json", metavar="FILE", help="write all figures there")

    command = add("plot", plot, "Draw what a trained model does, or what it costs beside others.")
    command.add_argument("kind", metavar="KIND", help=", ".join(PICTURES))
    command.add_argument(
        "folders",
        nargs="+",
        metavar="FOLDER",
        help="of checkpoints or runs, such as runs/demo/moe; costs are compared with the first one's",
    )
    _add_images(command)
    command.add_argument("--output", required=True, metavar="FILE", help="a PNG or SVG")

    description = "Time both experts of each mixture here, for a balancing loss that follows them."
    command = add("measure-latency", measure_experts, description)
    _add_subject(command)
    command.add_argument(
        "--activations",
        choices=("float", "int8"),
        default="float",
        help="of shift experts; default: %(default)s",
    )
    command.add_argument(
        "--implementation", choices=IMPLEMENTATIONS, help="default: the kernels where they run"
    )
    command.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time (default: 1)")
    command.add_argument(
        "--rounds", type=int, default=5, metavar="N", help="turns of each expert; default: %(default)s"
    )
    command.add_argument("--json", metavar="FILE", help="write all figures there")
    command.add_argument("--plot", metavar="FILE", help="draw them there, as PNG or SVG")

    command = add("pack", pack_checkpoint, "Pack a checkpoint's shift weights into codes, for inference.")
    _add_checkpoint(command)
    command.add_argument(
        "--activations", choices=("float", "int8"), default="float", help="default: %(default)s"
    )
    command.add_argument("--output", required=True, metavar="DIR", help="where the packed checkpoint goes")

    description = (
        "Compile a model's TVM kernels into the cache, ahead of its use, or for a GPU into a folder."
    )
    command = add("compile", compile_model, description)
    command.add_argument("model", metavar="MODEL", help="one of those of `shiftaddvit models`")
    _add_kinds(command)
    targets = ", ".join(target.name for target in GPU_TARGETS)
    command.add_argument("--target", metavar="GPU", help=f"instead of this CPU: {targets}")
    command.add_argument("--output", metavar="DIR", help="where a GPU's libraries and manifest.json go")

    description = "Measure which tile sizes suit a model's TVM kernels here, and keep them (minutes)."
    command = add("tune", tune_model, description)
    command.add_argument("model", metavar="MODEL", help="one of those of `shiftaddvit models`")
    _add_kinds(command)
    command.add_argument("--batch", type=int, default=1, metavar="N", help="images at a time (default: 1)")

    command = add("predict", predict, "The five most probable classes of images.")
    _add_checkpoint(command)
    command.add_argument("images", nargs="+", metavar="IMAGE", help="JPEG or PNG files")
    command.add_argument("--json", action="store_true", help="print JSON")
    return parser


def _add_kinds(command: argparse.ArgumentParser) -> None:
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
    command.add_argument("--image-size", type=int, metavar="N", help="default: the model's own")


def _add_subject(command: argparse.ArgumentParser, **settings) -> None:
    """The checkpoint or model that a command is about; ``settings`` of that argument."""
    command.add_argument(
        "model", metavar="CHECKPOINT_OR_MODEL", help="a checkpoint's folder or a model's name", **settings
    )
    for name in ("attention", "mlp", "projections"):
        command.add_argument(f"--{name}", metavar="KIND", help="instead of the model's own")
    command.add_argument("--image-size", type=int, metavar="N", help="default: the model's own")


def _add_images(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "--images",
        nargs="+",
        default=(),
        metavar="IMAGE",
        help="JPEG or PNG files to show routing and attention on; default: held-out ones of the run's data",
    )


def _add_checkpoint(parser: argparse.ArgumentParser, *, required: bool = True) -> None:
    parser.add_argument(
        "--checkpoint",
        required=required,
        metavar="DIR",
        help="a trained model's folder, such as runs/demo/moe/model",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command that ``argv`` names and return the exit code."""
    parser = build_parser()
    arguments, rest = parser.parse_known_args(argv)
    if arguments.command == "train":
        return run_command("shiftaddvit train", partial(training.train, arguments, rest))
    if rest:
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    return run_command(f"shiftaddvit {arguments.command}", partial(arguments.run, arguments))


if __name__ == "__main__":
    sys.exit(main())
