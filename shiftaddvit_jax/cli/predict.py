"""Commands that use a model from anywhere: what it is, and what it says of images."""

import argparse
import csv
import glob
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shiftaddvit_jax.cli.arguments import (
    PRINTED,
    Commands,
    add_command,
    add_engine,
    add_json,
    add_source,
    add_source_settings,
    open_engine,
    present,
    print_notes,
    source_settings,
)
from shiftaddvit_jax.files import check_parent, whole_file
from shiftaddvit_jax.optional import require

if TYPE_CHECKING:
    from shiftaddvit_jax.classifier import Answer, Classifier
    from shiftaddvit_jax.cluster import MapOnWorkers

FORMATS = (".jsonl", ".csv", ".parquet")
PART = 16  # batches that a worker of Ray gets at a time: it decodes images of one while it computes another


def add_info(commands: Commands) -> None:
    """Add ``info``."""
    command = add_command(
        commands,
        "info",
        info,
        "What a source of weights holds: model, classes, pixels, and what is not known.",
        "info runs/demo/moe",
        "info hf:OpenGVLab/pvt_v2_b0 --json",
        "info weights.pth --model pvt_v2_b0",
    )
    add_source(command)
    add_source_settings(command)
    add_json(command)


def info(arguments: argparse.Namespace) -> None:
    """What a source holds."""
    import dataclasses

    import jax

    from shiftaddvit_jax.checkpoints.source import open_source
    from shiftaddvit_jax.models import count_parameters, model_arguments
    from shiftaddvit_jax.nn.kernels import is_packed

    source = open_source(arguments.source, **source_settings(arguments))
    described = model_arguments(source.model)
    found = {
        "source": source.name,
        "model": described,
        "parameters": count_parameters(source.model),
        "bytes": sum(leaf.nbytes for leaf in jax.tree.leaves(source.variables)),
        "packed": is_packed(source.variables["params"]),
        "preprocessing": dataclasses.asdict(source.preprocessing),
        "class_names": source.class_names,
        "notes": source.notes,
    }
    present(arguments, found, lambda: _print_source(found, source.preprocessing))


def _print_source(found, pixels):
    described = found["model"]
    rows = {
        "model": f"{described['name']}, {found['parameters'] / 1e6:.2f} M parameters, "
        + f"{found['bytes'] / 1e6:.1f} MB"
        + (", packed" if found["packed"] else ""),
        **{name: ", ".join(dict.fromkeys(described[name])) for name in ("attention", "mlp", "projections")},
        **_formats(described),
        "LayerNorm epsilon": described["layer_norm_eps"] or "the authors'",
        "classes": _classes(found["class_names"]),
        "image": f"{pixels.resize.replace('_', ' ')} to {pixels.resize_to} pixels ({pixels.interpolation}), "
        f"the middle {pixels.size} x {pixels.size}",
        "pixels": f"{pixels.channels}, times {pixels.rescale:.5g}, mean {_numbers(pixels.mean)}, deviation "
        f"{_numbers(pixels.deviation)}",
    }
    width = max(map(len, rows))
    for name, value in rows.items():
        print(f"{name:{width}}  {value}")
    for note in found["notes"]:
        print(f"{'note':{width}}  {note}")


def _formats(described):
    """What differs from one power of two a weight and float32, by name."""
    counts = Counter((described["layers"] or {}).values())
    found = {
        "layers of their own": ", ".join(f"{count} {choice}" for choice, count in sorted(counts.items())),
        "weight terms": "" if described["weight_terms"] == 1 else described["weight_terms"],
        "rotation": "" if described["rotation"] == "none" else described["rotation"],
        "precision": "" if described["precision"] == "float32" else described["precision"],
    }
    return {name: value for name, value in found.items() if value}


def add_predict(commands: Commands) -> None:
    """Add ``predict``."""
    command = add_command(
        commands,
        "predict",
        predict,
        "The most probable classes of images.",
        "predict runs/demo/moe runs/demo/samples/*.png",
        "predict hf:OpenGVLab/pvt_v2_b0 cat.jpg --top-k 3 --json",
        "predict timm:pvt_v2_b0.in1k photos/ --output rows.csv",
    )
    add_source(command)
    command.add_argument(
        "paths",
        nargs="*",
        metavar="PATH",
        help="an image file, a folder, a pattern such as 'photos/*.jpg', or - to read paths from standard "
        "input, a line each",
    )
    command.add_argument(
        "--checkpoint", metavar="SOURCE", help="the source by name: then all others are paths"
    )
    add_source_settings(command)
    command.add_argument(
        "--top-k", type=int, default=5, metavar="N", help="classes an image (default: %(default)s)"
    )
    command.add_argument(
        "--batch", type=int, default=8, metavar="N", help="images at a time (default: %(default)s)"
    )
    command.add_argument(
        "--output",
        metavar="FILE",
        help=f"write a row an image there, as {', '.join(FORMATS)} by its suffix; a stopped run goes on",
    )
    add_engine(command)
    add_json(command)


def predict(arguments: argparse.Namespace) -> None:
    """The most probable classes of each image; one that can't be read is a row with its error."""
    source, paths = arguments.source, arguments.paths
    if arguments.checkpoint:
        source, paths = arguments.checkpoint, [source, *paths]
    if not paths:
        raise ValueError(
            "give the images after the source: files, folders, patterns, or - for standard input"
        )
    for name in ("batch", "top_k"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    if arguments.output:
        if arguments.json:
            raise ValueError("--output writes the rows, and so does --json; leave one out")
        check_parent(arguments.output)
        if Path(arguments.output).suffix not in FORMATS:
            raise ValueError(f"--output must end in one of {', '.join(FORMATS)}, got {arguments.output}")
        if arguments.output.endswith(".parquet"):
            require("parquet", "writing .parquet", "pyarrow")
    files = _expand(paths)
    with open_engine(arguments) as map_on_workers:
        if map_on_workers is None:
            from shiftaddvit_jax.classifier import from_pretrained

            classifier = from_pretrained(source, max_batch=arguments.batch, **source_settings(arguments))
            print_notes(classifier.source.notes)
            rows = partial(_rows, classifier, arguments.top_k)
        else:
            rows = partial(_rows_of_workers, map_on_workers, source, arguments)
        if arguments.output:
            failed, total = _write(rows, files, arguments.output, arguments.top_k)
        else:
            failed, total = _print(rows, files, arguments)
    if failed:
        if len(failed) == total:
            raise ValueError(failed[0] if total == 1 else f"none of {total} images can be read; {failed[0]}")
        print(f"{len(failed)} of {total} images can't be read; {failed[0]}", file=sys.stderr)


Row = tuple[str, "list[Answer] | None", str | None]


def _rows(classifier: "Classifier", top_k: int, files: Iterable[str]) -> Iterator[Row]:
    """Path, answers and error of each file, with a progress bar."""
    from shiftaddvit_jax.progress import progress_bar

    total = len(files) if isinstance(files, Sequence) else None
    with progress_bar() as progress:
        task = progress.add_task("images", total=total, note="")
        for prepared, probabilities in classifier.stream(files):
            for one, ranking in zip(prepared, classifier.rank(probabilities, top_k), strict=True):
                yield str(one.source), None if one.error else ranking, one.error
            progress.advance(task, len(prepared))


def _rows_of_workers(
    map_on_workers: "MapOnWorkers", source: str, arguments: argparse.Namespace, files: Iterable[str]
) -> Iterator[Row]:
    """The same rows, from workers, who compute the same batches."""
    from shiftaddvit_jax.classifier import Answer
    from shiftaddvit_jax.progress import progress_bar

    # Workers may have another working directory; rows have the paths as they were given.
    source = os.path.abspath(source) if os.path.exists(source) else source
    settings = source_settings(arguments) | {"max_batch": arguments.batch}
    files, size = list(files), PART * arguments.batch
    parts = [
        [os.path.abspath(file) for file in files[first : first + size]]
        for first in range(0, len(files), size)
    ]
    make = partial(file_classification, source, settings, arguments.top_k)
    names = iter(files)
    with progress_bar() as progress:
        task = progress.add_task("images", total=len(files), note="")
        for number, (notes, rows) in enumerate(map_on_workers(make, parts)):
            if not number:
                print_notes(notes)
            for (path, answers, error), name in zip(rows, names, strict=False):
                error = error and error.replace(path, name)
                yield name, answers and [Answer(*answer) for answer in answers], error
            progress.advance(task, len(rows))


def file_classification(
    source: str, settings: dict[str, Any], top_k: int
) -> Callable[[list[str]], tuple[list[str], list[Row]]]:
    """What a worker does: from the paths of some files to notes on the source, and the files' rows."""
    from shiftaddvit_jax.classifier import from_pretrained

    classifier = from_pretrained(source, **settings)

    def work(files):
        return list(classifier.source.notes), list(_rows(classifier, top_k, files))

    return work


def _print(rows, files, arguments):
    """Print rows as they come, or all as JSON; the errors, and the number of rows."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    entries, failed, total = {}, [], 0
    console = Console(soft_wrap=True, quiet=arguments.json == PRINTED)
    for path, answers, error in rows(files):
        total += 1
        if error:
            failed.append(error)
        entries[path] = {"error": error} if error else _entries(answers)
        if answers:
            table = Table(title=Text(path), title_justify="left", box=None, show_header=False)
            for answer in answers:
                bar = "█" * round(30 * answer.probability)
                table.add_row(Text(answer.label), f"{answer.probability:.1%}", bar)
            console.print(table)
    if len(failed) < total:
        present(arguments, entries, lambda: None)
    return failed, total


def _write(rows, files, output, top_k):
    """Write rows that ``output`` lacks; the errors, and the number of rows."""
    output = Path(output)
    is_parquet = output.suffix == ".parquet"
    # Parquet can't be appended to: rows are kept in lines beside it until all are there.
    lines = output.with_name(f".{output.name}.jsonl") if is_parquet else output
    done = _paths_in(lines, top_k)
    if is_parquet and not lines.exists() and output.exists():
        raise ValueError(f"{output} is there already, and whole; delete it, or write another")
    if done:
        print(f"{lines} has {len(done)} images already", file=sys.stderr)
        kept = (file for file in files if file not in done)
        files = list(kept) if isinstance(files, Sequence) else kept
    failed, total = [], 0
    with _writer(lines, top_k) as write:
        for row in rows(files):
            total += 1
            if row[2]:
                failed.append(row[2])
            write(row)
    if is_parquet:
        _write_parquet(lines, output, top_k)
    print(f"{total} images; written to {output}")
    return failed, total


@contextmanager
def _writer(file: Path, top_k: int) -> Generator[Callable[[Row], None]]:
    """A function that appends a row to ``file``, whole."""
    is_new = not file.exists() or file.stat().st_size == 0
    with file.open("a", newline="", encoding="utf-8") as stream:
        if file.suffix != ".csv":

            def write(row):
                path, answers, error = row
                record = {"path": path, "top": _entries(answers), "error": error}
                stream.write(json.dumps(record, ensure_ascii=False) + "\n")
                stream.flush()

        else:
            rows = csv.writer(stream)
            if is_new:
                rows.writerow(_columns(top_k))

            def write(row):
                rows.writerow(_flat(row, top_k))
                stream.flush()

        yield write


def _paths_in(file: Path, top_k: int) -> set[str]:
    """The paths of the rows in ``file``; a last line that a stopped run left unfinished is cut off.

    Raises:
      ValueError: a file with other rows.
    """
    try:
        text = file.read_text(encoding="utf-8")
    except FileNotFoundError:
        return set()
    whole = text[: text.rfind("\n") + 1]
    try:
        if file.suffix == ".csv":
            rows = list(csv.reader(whole.splitlines(keepends=True)))
            if rows and rows[0] != _columns(top_k):
                raise ValueError(f"its columns are {', '.join(rows[0][:4])}, ...")
            paths = {row[0] for row in rows[1:]}
        else:
            paths = {json.loads(line)["path"] for line in whole.splitlines()}
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise ValueError(
            f"{file} holds something else than rows of such a run ({error}); write another file"
        ) from None
    if whole != text:
        with file.open("r+b") as stream:
            stream.truncate(len(whole.encode()))
    return paths


def _write_parquet(lines, output, top_k):
    import pyarrow
    from pyarrow import parquet

    records = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    columns = _columns(top_k)
    rows = []
    for record in records:
        flat = [value for each in record["top"] or () for value in (each["class"], each["probability"])]
        rows.append([record["path"], record["error"], *flat, *[None] * (len(columns) - 2 - len(flat))])
    types = [pyarrow.float32() if name.startswith("probability") else pyarrow.string() for name in columns]
    arrays = [pyarrow.array([row[index] for row in rows], kind) for index, kind in enumerate(types)]
    with whole_file(output) as temporary:
        parquet.write_table(pyarrow.table(arrays, names=columns), temporary)
    lines.unlink()


def _columns(top_k):
    return [
        "path",
        "error",
        *(f"{name}_{rank}" for rank in range(1, top_k + 1) for name in ("class", "probability")),
    ]


def _flat(row: Row, top_k: int) -> list[Any]:
    path, answers, error = row
    flat = [value for answer in answers or () for value in (answer.label, f"{answer.probability:.6g}")]
    return [path, error or "", *flat, *[""] * (2 * top_k - len(flat))]


def _entries(answers):
    return answers and [{"class": answer.label, "probability": answer.probability} for answer in answers]


def _expand(paths: Sequence[str]) -> "list[str] | Iterator[str]":
    """The files that ``paths`` stand for: files, those in a folder, a pattern's, or standard input's."""
    if "-" in paths:
        if len(paths) > 1:
            raise ValueError("- reads all paths from standard input; leave out the others")
        return (line.rstrip("\r\n") for line in sys.stdin if line.strip())
    from shiftaddvit_jax.classifier import image_files

    files: list[str] = []
    for path in paths:
        if Path(path).is_dir():
            inside = image_files(Path(path))
            if not inside:
                raise ValueError(f"{path} has no image files; the source comes first, then images")
            files += map(str, inside)
        elif not Path(path).exists() and glob.has_magic(path):
            found = sorted(glob.glob(path, recursive=True))
            if not found:
                raise ValueError(f"no file fits the pattern {path}; name files, folders or other patterns")
            files += found
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def _classes(names):
    shown = "; ".join(names[:4])
    return f"{len(names)}: {shown}" + ("; ..." if len(names) > 4 else "")


def _numbers(values):
    return " ".join(f"{value:g}" for value in values)
