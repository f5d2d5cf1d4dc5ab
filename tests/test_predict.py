"""``shiftaddvit predict`` and ``info``: files in, rows out, whatever the files are."""

import csv
import io
import json

import jax
import numpy as np
import pytest
from PIL import Image

import shiftaddvit_jax as sav
from shiftaddvit_jax.cli import main

NAMES = ["crane [bird]", "[/red] fox", "a,b"]


pytestmark = pytest.mark.usefixtures("classifiers_on_xla")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    model = sav.create_model("pvt_v2_nano", num_classes=3, attention="msa")
    sav.save_model(path, model, sav.init_variables(model, jax.random.key(0)), {"class_names": NAMES})
    return str(path)


@pytest.fixture
def folder(tmp_path):
    """Four images, of which one is damaged, one lies deeper and one has brackets in its name."""
    rng = np.random.default_rng(0)
    (tmp_path / "images" / "deep").mkdir(parents=True)
    for name in ("a.png", "shot[1].png", "deep/c.jpg"):
        image = Image.fromarray(rng.integers(0, 256, (40, 30, 3), np.uint8))
        image.save(tmp_path / "images" / name)
    (tmp_path / "images" / "bad.jpg").write_bytes(b"no image")
    (tmp_path / "images" / ".hidden.png").write_bytes(b"")
    return tmp_path / "images"


def rows(capsys, *arguments):
    assert main(["predict", *map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_folder_is_all_of_its_images_and_a_bad_one_is_a_row(checkpoint, folder, capsys):
    found = rows(capsys, checkpoint, folder)
    assert set(found) == {str(folder / name) for name in ("a.png", "bad.jpg", "deep/c.jpg", "shot[1].png")}
    assert "cannot be read as an image" in found[str(folder / "bad.jpg")]["error"]
    good = found[str(folder / "a.png")]
    assert {entry["class"] for entry in good} == set(NAMES)
    assert sum(entry["probability"] for entry in good) == pytest.approx(1, abs=1e-5)


def test_a_pattern_is_expanded_and_a_file_with_brackets_is_itself(checkpoint, folder, capsys):
    assert set(rows(capsys, checkpoint, folder / "*.png")) == {
        str(folder / "a.png"),
        str(folder / "shot[1].png"),
    }
    assert set(rows(capsys, checkpoint, folder / "shot[1].png")) == {str(folder / "shot[1].png")}


def test_paths_come_from_standard_input(checkpoint, folder, capsys, monkeypatch):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{folder / 'a.png'}\n\n{folder / 'shot[1].png'}\n"))
    assert len(rows(capsys, checkpoint, "-")) == 2


def test_names_are_printed_as_they_are(checkpoint, folder, capsys):
    assert main(["predict", "--checkpoint", checkpoint, str(folder / "shot[1].png")]) == 0
    printed = capsys.readouterr().out
    assert all(text in printed for text in ("shot[1].png", *NAMES))


@pytest.mark.parametrize("batch", [1, 3])
def test_a_stopped_run_goes_on_where_it_was(checkpoint, folder, tmp_path, capsys, batch):
    output = tmp_path / "rows.jsonl"
    command = ["predict", checkpoint, str(folder), "--output", str(output), "--batch", str(batch)]
    assert main(command) == 0
    whole = output.read_text()
    records = [json.loads(line) for line in whole.splitlines()]
    assert [record["error"] is None for record in records] == [True, False, True, True]
    output.write_text(whole[: len(whole.splitlines()[0]) + 20])  # the second line is cut
    assert main(command) == 0
    again = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["path"] for record in again] == [record["path"] for record in records]
    assert main(command) == 0
    assert len(output.read_text().splitlines()) == 4
    assert "has 4 images already" in capsys.readouterr().err


def test_csv_has_a_column_for_each_class_and_probability(checkpoint, folder, tmp_path):
    output = tmp_path / "rows.csv"
    command = ["predict", checkpoint, str(folder), "--output", str(output), "--top-k", "2"]
    assert main(command) == main(command) == 0
    header, *lines = csv.reader(output.read_text().splitlines())
    assert header == ["path", "error", "class_1", "probability_1", "class_2", "probability_2"]
    assert len(lines) == 4
    assert lines[0][2] in NAMES
    assert lines[1][2:] == [""] * 4


def test_parquet_has_the_same_columns(checkpoint, folder, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    output = tmp_path / "rows.parquet"
    assert main(["predict", checkpoint, str(folder), "--output", str(output), "--top-k", "1"]) == 0
    table = parquet.read_table(output)
    assert table.column_names == ["path", "error", "class_1", "probability_1"]
    assert [error is None for error in table["error"].to_pylist()] == [True, False, True, True]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["images", "rows.parquet"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nothing.png"], "no image file at nothing.png"),
        (["no*.png"], "no file fits the pattern no*.png"),
        (["x.png", "--output", "rows.txt"], "--output must end in one of .jsonl, .csv, .parquet"),
        (["x.png", "--batch", "0"], "--batch must be at least 1"),
        (["x.png", "-"], "leave out the others"),
        ([], "give the images after the source"),
    ],
)
def test_wrong_arguments_are_one_line(checkpoint, capsys, arguments, message):
    assert main(["predict", checkpoint, *arguments]) == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_rows_of_something_else_are_kept(checkpoint, folder, tmp_path, capsys):
    output = tmp_path / "rows.jsonl"
    output.write_text('{"other": 1}\n')
    assert main(["predict", checkpoint, str(folder), "--output", str(output)]) == 2
    assert "holds something else" in capsys.readouterr().err
    assert output.read_text() == '{"other": 1}\n'


def test_info_says_what_a_source_holds(checkpoint, capsys):
    assert main(["info", checkpoint, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["model"]["name"], found["class_names"]) == ("pvt_v2_nano", NAMES)
    assert found["preprocessing"]["size"] == 32
    assert main(["info", checkpoint]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    assert "crane [bird]" in "".join(lines)
