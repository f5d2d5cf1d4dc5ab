"""What the names of compiled kernels depend on, and how files are replaced."""

import shutil
from pathlib import Path

import pytest

from kernels_tvm import store

PACKAGE = Path(store.__file__).parent
SIDES = ("cpu", "gpu")


@pytest.mark.parametrize(
    ("file", "concerned"),
    [("descriptions.py", SIDES), ("cpu/linear.py", ["cpu"]), ("gpu/matshift.py", ["gpu"])],
)
def test_a_comment_renames_the_kernels_of_its_side_alone(tmp_path, file, concerned):
    copy = tmp_path / "package"
    shutil.copytree(PACKAGE, copy)

    def hashes():
        return {side: store.source_hash.__wrapped__(side, copy) for side in SIDES}

    before = hashes()
    assert before == {side: store.source_hash(side) for side in SIDES}
    with (copy / file).open("a") as text:
        text.write("# one more comment\n")
    after = hashes()
    assert [side for side in SIDES if after[side] != before[side]] == list(concerned)


@pytest.mark.parametrize(("side", "other"), [SIDES, SIDES[::-1]])
def test_neither_side_imports_the_other(side, other):
    assert not [
        path for path in (PACKAGE / side).glob("*.py") if f"from kernels_tvm.{other}" in path.read_text()
    ]


def test_what_both_sides_share_imports_neither():
    shared = "".join(path.read_text() for path in PACKAGE.glob("*.py"))
    assert not [side for side in SIDES if f"from kernels_tvm.{side}" in shared]


def test_a_failure_while_a_file_is_replaced_leaves_the_old_one_and_nothing_else(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")

    def write(file):
        Path(file).write_text("half")
        raise OSError("no space")

    with pytest.raises(OSError, match="no space"):
        store.save_entry(write, path)
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_text() == "old"
