"""``summary.json`` and ``shiftaddvit compare``: figures as written, and what differs between runs."""

import copy
import json

import pytest

from shiftaddvit_jax.cli import main
from shiftaddvit_jax.train.summary import compare_runs, read_summary, write_summary

CONFIG = {
    "seed": 0,
    "model.mlp": "dense",
    "data.source": "digits",
    "data.path": "",
    "train.latencies": [6.0, 4.0],
}
DENSE = {
    "config": CONFIG,
    "steps": 1000,
    "images": 64000,
    "epochs": 50.5,
    "seconds": 90.0,
    "images_per_second": 711.1,
    "input_wait": 0.02,
    "parameters": 1234567,
    "final": {"top1": 0.9925, "top5": 1.0, "loss": 0.0312},
    "best": {"step": 750, "top1": 0.9931, "path": "best"},
    "shift_share": {},
    "class_names": ["ant", "bee"],
    "version": "0.2.0",
}
MIXED = copy.deepcopy(DENSE) | {
    "config": {**CONFIG, "model.mlp": "moe", "train.ema": 0.999},
    "ema": {"top1": 0.9876, "top5": 1.0, "loss": 0.04},
    "shift_share": {"stage1.fc1": 0.5, "stage1.fc2": 0.75},
}


@pytest.fixture
def runs(tmp_path):
    for name, summary in (("dense", DENSE), ("mixed", MIXED)):
        (tmp_path / name).mkdir()
        write_summary(tmp_path / name, summary)
    return tmp_path


def compare(capsys, *arguments):
    assert main(["compare", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def test_a_summary_is_read_as_it_was_written(runs):
    assert read_summary(runs / "dense") == read_summary(runs / "dense" / "summary.json") == DENSE


def test_a_row_has_the_figures_of_its_run():
    _, row = compare_runs({"dense": DENSE, "mixed": MIXED})
    assert row == {
        "run": "mixed",
        "config": {"model.mlp": "moe", "train.ema": 0.999},
        "steps": 1000,
        "top1": 0.9925,
        "top5": 1.0,
        "loss": 0.0312,
        "ema_top1": 0.9876,
        "parameters": 1234567,
        "images_per_second": 711.1,
        "shift_share": 0.625,
        "best_step": 750,
        "note": None,
    }


def test_what_a_run_lacks_is_none():
    row, _ = compare_runs({"empty": {}, "mixed": MIXED})
    assert set(row.pop("config").values()) == {None}
    assert row.pop("run") == "empty"
    assert set(row.values()) == {None}


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"config": {**CONFIG, "data.path": "photos"}}, "another data.path"),
        ({"class_names": ["ant", "wasp"]}, "class 'bee' gone and class 'wasp' new"),
        ({"class_names": ["bee", "ant"]}, "the same classes in another order"),
        ({"config": {**CONFIG, "seed": 1}}, None),
        ({"class_names": None}, None),
    ],
)
def test_a_run_on_other_data_is_noted(change, note):
    assert compare_runs({"first": DENSE, "second": DENSE | change})[1]["note"] == note


BAD = {
    "top1 of NaN": ({"final": {"top1": float("nan")}}, "final.top1 must be a finite number, got nan"),
    "steps in words": ({"steps": "many"}, "steps must be a finite number, got 'many'"),
    "a truth": ({"parameters": True}, "parameters must be a finite number"),
    "a list of shares": ({"shift_share": [0.5]}, "shift_share must be an object"),
    "a share in words": ({"shift_share": {"fc1": "half"}}, "shift_share.fc1 must be a finite number"),
    "one name": ({"class_names": "ant"}, "class_names must be a list of names"),
    "a config of numbers": ({"config": 3}, "config must be an object"),
}


@pytest.mark.parametrize(("change", "message"), BAD.values(), ids=BAD)
def test_a_wrong_value_is_neither_written_nor_read(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        write_summary(tmp_path, DENSE | change)
    assert not list(tmp_path.iterdir())
    (tmp_path / "summary.json").write_text(json.dumps(DENSE | change))
    with pytest.raises(ValueError, match=message):
        read_summary(tmp_path)


def test_nan_anywhere_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="is not JSON"):
        write_summary(tmp_path, DENSE | {"config": {"train.learning_rate": float("inf")}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "expected the workdir of a finished run, or its summary.json"),
        ("", "is damaged or no summary.json"),
        ("[]", "is damaged or no summary.json"),
    ],
)
def test_a_missing_or_damaged_summary_is_one_line(tmp_path, capsys, text, message):
    if text is not None:
        (tmp_path / "summary.json").write_text(text)
    assert main(["compare", str(tmp_path)]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_tables_fit_100_columns_and_cut_nothing(runs, capsys):
    printed = compare(capsys, runs / "dense", runs / "mixed" / "summary.json")
    assert max(map(len, printed.splitlines())) <= 100
    for text in ("99.25%", "98.76%", "0.0312", "1,234,567", "711", "62.5%", "750", '"moe"', "train.ema"):
        assert text in printed
    assert "train.latencies" not in printed
    assert "note" not in printed


def test_a_run_on_other_data_is_noted_below_the_table(runs, capsys):
    write_summary(runs / "mixed", MIXED | {"class_names": ["ant"]})
    printed = compare(capsys, runs / "dense", runs / "mixed")
    assert "note: mixed is not of the data of dense: class 'bee' gone" in printed


def test_json_has_the_rows(runs, capsys):
    rows = json.loads(compare(capsys, runs / "dense", runs / "mixed", "--json"))
    assert rows == compare_runs({"dense": DENSE, "mixed": MIXED})


def test_folders_of_one_name_are_told_apart(runs, capsys):
    (runs / "again" / "dense").mkdir(parents=True)
    write_summary(runs / "again" / "dense", DENSE)
    rows = json.loads(compare(capsys, runs / "dense", runs / "again" / "dense", "--json"))
    assert [row["run"] for row in rows] == [str(runs / "dense"), str(runs / "again" / "dense")]
    assert main(["compare", str(runs / "dense"), str(runs / "dense")]) == 2
    assert "a run is named twice" in capsys.readouterr().err
