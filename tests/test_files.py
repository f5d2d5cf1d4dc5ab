import json

import pytest

from shiftaddvit_jax.files import whole_file, whole_folder, write_json


def test_what_is_written_replaces_the_file(tmp_path):
    file = tmp_path / "notes.txt"
    for text in ("old", "new"):
        with whole_file(file) as temporary:
            assert temporary.parent == tmp_path
            assert temporary.suffix == ".txt"
            temporary.write_text(text)
    assert file.read_text() == "new"
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize("there", [True, False])
def test_a_writer_that_raises_midway_changes_nothing(tmp_path, there):
    file = tmp_path / "notes.txt"
    if there:
        file.write_text("old")

    def write():
        with whole_file(file) as temporary:
            temporary.write_text("ne")
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        write()
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"] * there


def test_json_that_cannot_be_written_leaves_the_old_file(tmp_path):
    file = tmp_path / "report.json"
    write_json(file, {"rows": [1]})
    with pytest.raises(TypeError):
        write_json(file, {"rows": object()})
    assert json.loads(file.read_text()) == {"rows": [1]}
    assert list(tmp_path.iterdir()) == [file]


def test_a_folder_that_is_not_filled_leaves_the_old_one(tmp_path):
    folder = tmp_path / "model"
    with whole_folder(folder) as temporary:
        (temporary / "old").touch()

    def fill():
        with whole_folder(folder) as temporary:
            (temporary / "new").touch()
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        fill()
    assert list(tmp_path.iterdir()) == [folder]
    assert [path.name for path in folder.iterdir()] == ["old"]
    with whole_folder(folder) as temporary:
        (temporary / "new").touch()
    assert [path.name for path in folder.iterdir()] == ["new"]


def test_a_folder_that_a_killed_process_moved_away_is_put_back(tmp_path):
    (tmp_path / ".model.old").mkdir()
    (tmp_path / ".model.old" / "kept").touch()

    def fill():
        with whole_folder(tmp_path / "model"):
            raise OSError("the disk is full")

    with pytest.raises(OSError, match="the disk is full"):
        fill()
    assert [path.name for path in (tmp_path / "model").iterdir()] == ["kept"]
