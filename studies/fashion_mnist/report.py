"""Tables and pictures of the study from the records of its runs."""

import statistics
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shiftaddvit_jax.files import read_object, write_json
from studies.fashion_mnist import figures
from studies.fashion_mnist.rows import BY_NAME, HELD_OUT, ROWS
from studies.fashion_mnist.run import record_file
from studies.fashion_mnist.times import TIMES
from studies.pages import fill_tables, markdown

RESULTS = "results/fashion_mnist.json"
PAGE = "results.md"
GROUPS = {
    "attention": ("dense", "dense_longer"),  # in the order of rows; those named stand first
    "shift": ("dense", "hamming_linear"),
    "mixture": ("dense", "hamming_linear", "shift"),
    "convert": ("dense",),
    "int8": ("shift", "moe"),
}
Record = Mapping[str, Any]


def write_report(workdir: Path, data: Path, docs: Path) -> None:
    """Write what the records of ``workdir`` say into ``docs``: the JSON, the page's tables, the pictures.

    Raises:
      ValueError: no records in ``workdir``; what ``docs`` say stays.
    """
    times = read_object(workdir / TIMES) if (workdir / TIMES).exists() else {}
    found = {"times": times, "records": _records(workdir), "held_out": _records(workdir / HELD_OUT)}
    if not found["records"]:
        raise ValueError(f"no results in {workdir}: `run` makes them, `begin` takes those that are there")
    (docs / RESULTS).parent.mkdir(exist_ok=True)
    write_json(docs / RESULTS, found)
    page = docs / PAGE
    page.write_text(with_tables(page.read_text(), found))
    rows = summarize(found)
    figures.plot_tradeoffs(rows, docs / "images" / "fashion_mnist_tradeoffs.png")
    figures.plot_mixtures(rows, docs / "images" / "fashion_mnist_mixtures.png")
    if record_file(workdir, BY_NAME["moe"], 0).exists():
        figures.draw_routing(workdir, data, docs / "images" / "fashion_mnist_routing.png")


def _records(workdir):
    """What is known of the rows that have run in ``workdir``, in their order."""
    files = [file for row in ROWS for file in sorted(workdir.glob(f"{row.name}-[0-9]*/record.json"))]
    return [read_object(file) for file in files]


def summarize(found: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """By row, what its seeds have in common: means, deviations, and differences to dense of the same seed."""
    by_row: dict[str, dict[int, Record]] = defaultdict(dict)
    for record in found["records"]:
        by_row[record["row"]][record["seed"]] = record
    times = found["times"].get("ms", {})
    rows = {}
    for name, seeds in by_row.items():
        records = list(seeds.values())
        pairs = [100 * (one["top1"] - by_row["dense"][seed]["top1"]) for seed, one in seeds.items()]
        shares = [share for record in records if (share := _share(record, "shift_share")) is not None]
        rows[name] = {
            "label": records[0]["label"],
            "group": records[0]["group"],
            "seeds": len(records),
            "top1": _spread([100 * record["top1"] for record in records]),
            "difference": _spread(pairs),
            "loss": statistics.mean(record["loss"] for record in records),
            "share": _percent(statistics.mean(shares)) if shares else None,
            "aim": _percent(_share(records[0], "aimed_share")),
            "packed_kb": statistics.mean(record["packed_bytes"] for record in records) / 1e3,
            "energy_uj": 1e3 * statistics.mean(record["energy_mj"]["accelerator"] for record in records),
            "ms": times.get(name),
            "command": records[0]["command"],
        }
    return rows


def with_tables(page: str, found: Mapping[str, Any]) -> str:
    """``page`` with its tables, which stand between marks, written anew."""
    rows = summarize(found)
    tables = {group: _table(rows, first) for group, first in _chosen(rows).items()}
    tables["commands"] = "\n".join(f"- {row['label']}:\n  `{row['command']}`" for row in rows.values())
    tables["cost"] = _cost([*found["records"], *found["held_out"]])
    held_out = summarize({"times": {}, "records": found["held_out"]})
    tables["held_out"] = _table(held_out, list(held_out))
    return fill_tables(page, tables)


def _chosen(rows):
    """By group, the names of its table's rows."""
    return {
        group: [name for name in first if name in rows]
        + [name for name, row in rows.items() if row["group"] == group and name not in first]
        for group, first in GROUPS.items()
    }


def _table(rows, names: Sequence[str]) -> str:
    head = (
        "model", "seeds", "top-1 (%)", "to dense", "loss", "tokens on shift: wanted, got (%)", "packed (kB)",
        "energy (uJ)", "ms",
    )  # fmt: skip
    lines = []
    for name in names:
        row = rows[name]
        share = "-"
        if row["share"] is not None:
            aim = "-" if row["aim"] is None else f"{row['aim']:.1f}"
            share = f"{aim}, {row['share']:.1f}"
        cells = (
            row["label"],
            str(row["seeds"]),
            _with_deviation(row["top1"], ""),
            _with_deviation(row["difference"], "+") if name != "dense" else "-",
            f"{row['loss']:.3f}",
            share,
            f"{row['packed_kb']:.0f}",
            f"{row['energy_uj']:.1f}",
            "-" if row["ms"] is None else f"{row['ms']:.3f}",
        )
        lines.append(cells)
    return markdown(head, lines, column="--:")


def _cost(records: Sequence[Record]) -> str:
    """How much was computed, in words."""
    trained = [record for record in records if record["training_seconds"]]
    hours = sum(record["training_seconds"] * record["machine"]["cores"] for record in trained) / 3600
    cpus = ", ".join(sorted({record["machine"]["cpu"] for record in records}))
    return (
        f"{len(records)} models, {len(trained)} of them trained: {hours:.1f} core-hours on {cpus}, "
        f"{sum(record['training_images'] for record in trained) / 1e6:.1f} million images."
    )


def _spread(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; None of one value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def _with_deviation(spread, sign):
    mean, deviation = spread
    return f"{mean:{sign}.2f}" + ("" if deviation is None else f" ± {deviation:.2f}")


def _share(record, key):
    values = list(record[key].values())
    return statistics.mean(values) if values else None


def _percent(share):
    return None if share is None else 100 * share
