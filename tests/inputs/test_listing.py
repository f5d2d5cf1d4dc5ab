"""Folders are read once, and again when names in them came or went."""

import os

import pytest

from shiftaddvit_jax.data import cache, listing
from shiftaddvit_jax.data.listing import Listing, PackedNames, walk


@pytest.fixture
def root(tmp_path, monkeypatch):
    """A folder of images that changed long ago; what is found in it is kept at any size."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(listing, "REMEMBERED_FROM", 1)
    root = tmp_path / "root"
    for name in ("a/1.jpg", "a/b/2.png", "a/b/notes.txt", "c/3.gif"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()
    settle(root)
    return root


def settle(root):
    for number, (folder, *_) in enumerate(os.walk(root)):
        os.utime(folder, (1e9 + number, 1e9 + number))


@pytest.fixture
def read(monkeypatch):
    """The folders that are read, in their order."""
    folders, scandir = [], os.scandir

    def counted(path):
        folders.append(os.path.basename(path))
        return scandir(path)

    monkeypatch.setattr(listing.os, "scandir", counted)
    return folders


def images(root):
    held = Listing(root)
    found = [path + name for path, folder in walk(held, root) for name in folder.images]
    held.close()
    return found


def test_folders_that_are_as_they_were_are_not_read_again(root, read):
    first = images(root)
    assert first == ["a/1.jpg", "a/b/2.png", "c/3.gif"]
    assert read == ["root", "a", "b", "c"]
    assert images(root) == first
    assert read == ["root", "a", "b", "c"]


@pytest.mark.parametrize(
    ("change", "found", "again"),
    [
        (lambda root: (root / "a/b/0.jpg").touch(), "a/1.jpg a/b/0.jpg a/b/2.png c/3.gif", "b"),
        (lambda root: (root / "c/3.gif").unlink(), "a/1.jpg a/b/2.png", "c"),
        (lambda root: (root / "a/b").rename(root / "c/b"), "a/1.jpg c/3.gif c/b/2.png", "a c b"),
    ],
)
def test_what_came_and_went_is_noticed(root, read, change, found, again):
    images(root)
    read.clear()
    change(root)
    assert images(root) == found.split()
    assert read == again.split()


def test_a_folder_that_changed_just_now_is_read_again(root, read):
    os.utime(root / "c")
    images(root)
    read.clear()
    images(root)
    assert read == ["c"]


@pytest.mark.parametrize("damage", [b"", b"{", b"[]", b'{"ROOT": [1]}', b'{"ROOT": 5}'])
def test_a_damaged_cache_is_not_used(root, damage):
    first = images(root)
    (file,) = cache.cache_folder().iterdir()
    assert file.stat().st_mode & 0o077 == 0
    file.write_bytes(damage.replace(b"ROOT", os.fsencode(root)))
    assert images(root) == first


def test_a_cache_that_cannot_be_written_is_said(root, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert len(images(root)) == 3
    assert "cannot be written" in caplog.text


def test_packed_names_are_the_names():
    names = ["a", "\udcff/b.jpg", "c" * 300, "d"]
    packed = PackedNames(names)
    expected = [os.fsencode(name) for name in names]
    assert list(packed) == [packed[index] for index in range(len(packed))] == expected
    assert len(PackedNames([])) == 0
    with pytest.raises(IndexError):
        packed[4]
