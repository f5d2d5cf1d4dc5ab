"""The study on Fashion-MNIST: what its rows ask for, in what order they run, and their tables."""

import json
import statistics
from pathlib import Path

import jax
import numpy as np
import pytest

from shiftaddvit_jax import main
from shiftaddvit_jax.checkpoints import load_model, open_source
from shiftaddvit_jax.cli import build_parser
from shiftaddvit_jax.files import write_json
from shiftaddvit_jax.models.inspect import on_xla
from studies.fashion_mnist import run as runs
from studies.fashion_mnist.__main__ import main as study
from studies.fashion_mnist.begin import begin
from studies.fashion_mnist.report import RESULTS, summarize, with_tables
from studies.fashion_mnist.rows import BY_NAME, LATENCIES, ROWS
from studies.fashion_mnist.run import record_file, run_rows

ROOT = Path(__file__).parents[1]
DATA = Path("/usr/share/datasets/fashion-mnist")


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_a_row_is_a_command_that_shiftaddvit_takes(row, tmp_path, monkeypatch):
    write_json(tmp_path / LATENCIES, {"layers": [{"name": "stage1/block1/mlp/fc1", "latencies": [3.0, 2.0]}]})
    monkeypatch.chdir(ROOT)
    arguments, rest = build_parser().parse_known_args(row.line(tmp_path, DATA, 1))
    assert arguments.command == row.command
    if row.command == "train":
        config = main.load_config(arguments.config, rest)
        assert config.seed == 1
        assert config.init_from == (f"{tmp_path}/{row.start}-1/model" if row.start else "")
    else:
        assert not rest


def test_a_row_begins_with_one_above_it():
    names = [row.name for row in ROWS]
    assert all(names.index(row.start) < index for index, row in enumerate(ROWS) if row.start)


@pytest.fixture
def ran(monkeypatch):
    """What `run_rows` runs, in its order, where a task does nothing but write a record."""
    done = []

    def run_task(workdir, data, row, seed, cores):
        done.append(f"{row.name}-{seed}")
        if row.name == "hamming_linear" and seed == 1:
            raise RuntimeError("no")
        (row.folder(workdir, seed) / "model").mkdir(parents=True, exist_ok=True)
        write_json(record_file(workdir, row, seed), {})

    monkeypatch.setattr(runs, "_run_task", run_task)
    return done


def test_what_a_row_begins_with_runs_first(ran, tmp_path):
    assert run_rows(tmp_path, DATA, [BY_NAME["shift"]], [0], 1) == []
    assert ran == ["dense-0", "hamming_linear-0", "shift-0"]


def test_what_is_done_does_not_run_again(ran, tmp_path):
    run_rows(tmp_path, DATA, [BY_NAME["hamming_linear"]], [0], 1)
    run_rows(tmp_path, DATA, [BY_NAME["shift"]], [0], 1)
    assert ran == ["dense-0", "hamming_linear-0", "shift-0"]


def test_a_row_runs_again_where_its_model_is_gone_and_another_begins_with_it(ran, tmp_path):
    run_rows(tmp_path, DATA, [BY_NAME["hamming_linear"]], [0], 1)
    (BY_NAME["dense"].folder(tmp_path, 0) / "model").rmdir()
    (BY_NAME["hamming_linear"].folder(tmp_path, 0) / "model").rmdir()
    run_rows(tmp_path, DATA, [BY_NAME["hamming_linear"]], [0], 1)
    assert ran == ["dense-0", "hamming_linear-0"]
    run_rows(tmp_path, DATA, [BY_NAME["shift"]], [0], 1)
    assert ran == 2 * ["dense-0", "hamming_linear-0"] + ["shift-0"]


def test_what_fails_stops_only_what_begins_with_it(ran, tmp_path):
    assert run_rows(tmp_path, DATA, [BY_NAME["shift"]], [0, 1], 1) == ["hamming_linear-1", "shift-1"]
    assert ran == ["dense-0", "dense-1", "hamming_linear-0", "hamming_linear-1", "shift-0"]


def test_what_the_package_has_is_where_rows_begin(ran, tmp_path):
    begin(tmp_path, ROOT / "docs")
    rows = [BY_NAME["distilled"], BY_NAME["shift_3_bits"]]
    for row in rows:
        record_file(tmp_path, row, 0).unlink(missing_ok=True)
    assert run_rows(tmp_path, DATA, rows, [0], 1) == []
    assert ran == ["distilled-0", "shift_3_bits-0"]
    images = np.random.default_rng(0).normal(size=(2, 28, 28, 3)).astype(np.float32)
    shipped = open_source("fashion_mnist_nano_additive")
    model, variables, about = load_model(tmp_path / "hamming_linear-0" / "model")
    expected = jax.jit(on_xla(shipped.model).apply)(shipped.variables, images)
    found = jax.jit(on_xla(model).apply)(variables, images)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-4)
    assert tuple(about["class_names"]) == shipped.class_names


def test_more_jobs_than_cores_are_refused(tmp_path):
    with pytest.raises(ValueError, match="--jobs must be 1 to"):
        run_rows(tmp_path, DATA, [BY_NAME["dense"]], [0], 10**6)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("run --rows nosuch", "unknown row 'nosuch'"),
        ("run --seeds 0", "--seeds must be at least 1, got 0"),
        ("run --data nosuch", "no folder nosuch"),
        ("report", "no results in "),
        ("time", "no model of seed 0 in "),
    ],
)
def test_an_error_is_one_line(line, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert study([*line.split(), "--workdir", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"python -m studies.fashion_mnist: error: {message}")
    assert error.count("\n") == 1


def record(row, seed, top1, **others):
    return {
        "row": row, "label": row, "group": "mixture" if row == "moe" else "main", "seed": seed, "top1": top1,
        "loss": 0.5, "shift_share": {}, "aimed_share": {}, "packed_bytes": 1000, "command": "shiftaddvit",
        "energy_mj": {"accelerator": 0.002}, "training_seconds": 60.0, "training_images": 1000,
        "machine": {"cpu": "a CPU", "cores": 1}, **others,
    }  # fmt: skip


FOUND = {
    "times": {"ms": {"moe": 0.25}},
    "records": [
        *(record("dense", seed, top1) for seed, top1 in enumerate((0.92, 0.93, 0.94))),
        *(
            record("moe", seed, top1, shift_share={"a": 0.5, "b": 0.7}, aimed_share={"a": 0.6, "b": 0.6})
            for seed, top1 in enumerate((0.91, 0.93))
        ),
    ],
    "held_out": [record("dense", 0, 0.95)],
}


def test_differences_are_between_models_of_the_same_seed():
    row = summarize(FOUND)["moe"]
    assert row["difference"] == pytest.approx((-0.5, statistics.stdev([-1.0, 0.0])))
    assert row["top1"] == pytest.approx((92.0, statistics.stdev([91.0, 93.0])))
    assert (row["share"], row["aim"]) == pytest.approx((60.0, 60.0))


def test_tables_stand_between_their_marks():
    page = "before\n<!-- table: mixture -->\nold\n<!-- end -->\nafter\n"
    found = with_tables(page, FOUND)
    assert found.startswith("before\n<!-- table: mixture -->\n| model |")
    assert found.endswith("|\n<!-- end -->\nafter\n")
    assert "| moe | 2 | 92.00 ± 1.41 | -0.50 ± 0.71 | 0.500 | 60.0, 60.0 | 1 | 2.0 | 0.250 |" in found
    assert with_tables(found, FOUND) == found


def test_the_page_shows_what_the_records_say():
    page = (ROOT / "docs" / "results.md").read_text()
    assert with_tables(page, json.loads((ROOT / "docs" / RESULTS).read_text())) == page
