import gzip
import hashlib
import logging
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shiftaddvit_jax.data import check_data, load_dataset

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist


def write_image(path, seed=0, size=(9, 7)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    Image.fromarray(pixels).save(path)
    return pixels


def write_idx(path, array, compress=False):
    data = (
        struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    )
    if compress:
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(data))
    else:
        path.write_bytes(data)


def test_digits_hold_out_every_third_image():
    dataset = load_dataset("digits")
    assert (len(dataset.train), len(dataset.test)) == (1198, 599)
    assert dataset.class_names == tuple("0123456789")


def test_no_held_out_digit_is_trained_on():
    dataset = load_dataset("digits")
    train = {example.tobytes() for example in np.asarray(dataset.train.images)}
    assert not any(example.tobytes() in train for example in np.asarray(dataset.test.images))


def test_digits_are_gray_pixels_of_the_full_range():
    image = load_dataset("digits").train[0]["image"]
    assert image.shape == (8, 8, 3)
    assert image.dtype == np.uint8
    assert image.min() == 0
    assert np.ptp(image, axis=-1).max() == 0


def names_of(examples, root):
    return {path.relative_to(root).as_posix() for path in examples.images}


def class_counts(dataset):
    """Training and test images of each class."""
    count = len(dataset.class_names)
    return tuple(np.bincount(part.labels, minlength=count).tolist() for part in (dataset.train, dataset.test))


def test_a_folder_of_classes_is_split_class_by_class_by_the_names_of_its_files(tmp_path):
    names = [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(20)]
    for seed, name in enumerate(names):
        write_image(tmp_path / name, seed)
    dataset = load_dataset("folder", str(tmp_path))

    def rank(name):
        drawn = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8])
        return drawn % 3 != 0, drawn

    held_out = {name for part in (names[:20], names[20:]) for name in sorted(part, key=rank)[:7]}
    assert names_of(dataset.test, tmp_path) == held_out
    assert names_of(dataset.train, tmp_path) == set(names) - held_out
    assert dataset.class_names == ("cat", "dog")
    assert all(
        dataset.class_names[example["label"]] == path.parent.name
        for example, path in zip(dataset.train, dataset.train.images, strict=False)
    )


def test_few_images_change_sides_when_others_come(tmp_path):
    names = [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(12)]
    for name in names:
        write_image(tmp_path / name)
    before = names_of(load_dataset("folder", str(tmp_path)).test, tmp_path)
    for number in range(3):
        write_image(tmp_path / f"cat/new{number}.png")
    after = names_of(load_dataset("folder", str(tmp_path)).test, tmp_path)
    assert len(before & after) >= len(before) - 3
    assert {name for name in before if name.startswith("dog")} == {
        name for name in after if name.startswith("dog")
    }


@pytest.mark.parametrize("count", range(2, 8))
def test_every_class_has_images_on_both_sides(tmp_path, count):
    for name in "abcd":
        for number in range(count):
            write_image(tmp_path / name / f"{number}.png")
    train, test = class_counts(load_dataset("folder", str(tmp_path)))
    assert test == [max(1, round(count / 3))] * 4
    assert train == [count - test[0]] * 4


def test_a_class_of_one_image_has_none_to_test_and_that_is_said(tmp_path, caplog):
    for name in ("a/0.png", "a/1.png", "a/2.png", "b/0.png"):
        write_image(tmp_path / name)
    assert class_counts(load_dataset("folder", str(tmp_path))) == ([2, 1], [1, 0])
    assert "no test images of class 'b'" in caplog.text


@pytest.mark.parametrize(
    ("folders", "split"),
    [
        (("train", "valid"), ([2, 2], [2, 2])),
        (("Train", "Val"), ([2, 2], [2, 2])),
        (("TRAIN", "validation"), ([2, 2], [2, 2])),
        (("training", "Test"), ([2, 2], [2, 2])),
        (("train",), ([1, 1], [1, 1])),
        (("data",), ([1, 1], [1, 1])),
        (("archive/data",), ([1, 1], [1, 1])),
        (("data/train", "data/val"), ([2, 2], [2, 2])),
    ],
)
def test_a_split_is_known_by_its_names_in_any_case_and_one_folder_deeper(tmp_path, folders, split):
    for folder in folders:
        for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
            write_image(tmp_path / folder / name)
    dataset = load_dataset("folder", str(tmp_path))
    assert dataset.class_names == ("cat", "dog")
    assert class_counts(dataset) == split


def test_of_val_and_test_the_log_says_which_evaluates(tmp_path, caplog):
    for count, part in enumerate(("train", "val", "test"), 1):
        for name in ("cat", "dog"):
            for number in range(count):
                write_image(tmp_path / part / name / f"{number}.png")
    with caplog.at_level(logging.INFO):
        assert class_counts(load_dataset("folder", str(tmp_path))) == ([1, 1], [2, 2])
    assert f"evaluating on {tmp_path}/val; {tmp_path}/test is left alone" in caplog.text


@pytest.mark.parametrize("held_out", [("val",), ()])
def test_test_images_without_classes_are_left_alone(tmp_path, caplog, held_out):
    for part in ("train", *held_out):
        for name in ("cat/0.png", "cat/1.png", "dog/0.png", "dog/1.png"):
            write_image(tmp_path / part / name)
    write_image(tmp_path / "test/0.png")
    counts = ([2, 2], [2, 2]) if held_out else ([1, 1], [1, 1])
    assert class_counts(load_dataset("folder", str(tmp_path))) == counts
    assert "test has no class folders and is left alone" in caplog.text


def test_each_class_may_have_a_split_of_its_own(tmp_path):
    for name in ("cat", "dog"):
        for number in range(3):
            write_image(tmp_path / name / "train" / f"{number}.png")
        write_image(tmp_path / name / "val" / "0.png")
    assert class_counts(load_dataset("folder", str(tmp_path))) == ([3, 3], [1, 1])


def test_a_class_named_train_is_a_class(tmp_path):
    for name in ("bus", "train"):
        for number in range(3):
            write_image(tmp_path / name / f"{number}.png")
    assert load_dataset("folder", str(tmp_path)).class_names == ("bus", "train")


def test_hidden_and_system_entries_are_ignored_and_other_files_counted(tmp_path, caplog):
    for part in ("train", "val"):
        for name in ("cat/0.png", "cat/1.png", "dog/0.png"):
            write_image(tmp_path / part / name)
        for name in (".ipynb_checkpoints", "__MACOSX", "@eaDir", "cat/.ipynb_checkpoints", "cat/@eaDir"):
            write_image(tmp_path / part / name / "0-copy.png")
        for name in ("cat/._0.png", "cat/Thumbs.db", ".DS_Store", "labels.csv"):
            (tmp_path / part / name).write_bytes(b"x")
    for name in ("train/cat/notes.txt", "train/cat/x.avif", "train/dog/y.avif"):
        (tmp_path / name).write_bytes(b"x")
    write_image(tmp_path / "train/loose.png")
    dataset = load_dataset("folder", str(tmp_path))
    assert dataset.class_names == ("cat", "dog")
    assert class_counts(dataset) == ([2, 1], [2, 1])
    assert "left out 3 files in" in caplog.text
    assert "2 .avif, 1 .txt" in caplog.text
    assert "left out 1 images in" in caplog.text


def test_every_suffix_that_is_decoded_counts(tmp_path):
    for part in ("train", "val"):
        for number, suffix in enumerate((".JPG", ".Jpeg", ".webp", ".bmp", ".tif", ".gif")):
            write_image(tmp_path / part / "cat" / f"{number}{suffix}")
        write_image(tmp_path / part / "dog" / "0.png")
    assert class_counts(load_dataset("folder", str(tmp_path))) == ([6, 1], [6, 1])


def test_links_are_followed_and_end(tmp_path, caplog):
    root, real = tmp_path / "data", tmp_path / "real"
    for name in ("cat", "dog"):
        for number in range(3):
            write_image(real / name / f"{number}.png")
    for part in ("train", "val"):
        write_image(root / part / "dog" / "a.png")
        (root / part / "cat").symlink_to(real / "cat")
        (root / part / "dog" / "more").symlink_to(real / "dog")
        (root / part / "dog" / "linked.png").symlink_to(real / "dog" / "0.png")
        (root / part / "dog" / "dangling.png").symlink_to(real / "none.png")
        (root / part / "dog" / "self").symlink_to(root / part / "dog")
        (root / part / "owl").symlink_to(real / "owl")
    assert class_counts(load_dataset("folder", str(root))) == ([3, 5], [3, 5])
    for name in ("dog/dangling.png", "owl"):
        assert f"left out {root}/train/{name}, a link to nothing" in caplog.text


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (("train/a/0.png", "val/a/0.png"), "has one class, 'a'; expected two or more"),
        (("a/0.png", "a/1.png"), "has one class, 'a'; expected two or more"),
        (("train/a/0.png", "train/b/0.txt", "val/a/0.png"), "no training images of class 'b'"),
        (("train/a/0.png", "val/a/0.png", "val/c/0.png", "train/b/0.png"), "has classes that .*: c"),
        (("train/a/0.png", "Train/b/0.png", "val/a/0.png"), "has Train and train; keep one of them"),
        (("train/a/0.png", "train/b/0.png", "val/a/x.txt"), "has no test images"),
    ],
)
def test_folders_that_cannot_be_learned_from_are_refused(tmp_path, files, message):
    for name in files:
        path = tmp_path / name
        write_image(path) if path.suffix == ".png" else (path.parent.mkdir(parents=True), path.touch())
    with pytest.raises(ValueError, match=message):
        load_dataset("folder", str(tmp_path))


def test_a_name_that_is_no_unicode_is_a_class(tmp_path):
    name = os.fsdecode(b"bad\xff")
    for number in range(3):
        write_image(tmp_path / name / f"{number}.png")
        write_image(tmp_path / "a" / f"{number}.png")
    assert load_dataset("folder", str(tmp_path)).class_names == ("a", name)


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folders_with_a_split_keep_it_and_pixels_are_the_files(tmp_path, held_out):
    write_image(tmp_path / "train/a/x.png")
    write_image(tmp_path / "train/b/deeper/y.JPG")
    pixels = write_image(tmp_path / held_out / "b/z.png", seed=3)
    dataset = load_dataset("folder", str(tmp_path))
    assert (len(dataset.train), len(dataset.test)) == (2, 1)
    np.testing.assert_array_equal(dataset.test[0]["image"], pixels)
    assert dataset.test[0]["label"] == 1


def test_no_image_is_read_to_load_a_data_set_and_a_check_names_the_broken_ones(tmp_path):
    for name in ("train/a/0.png", "train/b/0.png", "test/a/good.png"):
        write_image(tmp_path / name)
    whole = (tmp_path / "train/a/0.png").read_bytes()
    (tmp_path / "train/a/truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "test/a/text.jpg").write_text("not an image")
    dataset = load_dataset("folder", str(tmp_path))
    assert (len(dataset.train), len(dataset.test)) == (3, 2)
    truncated, text = check_data(dataset)
    assert "train/a/truncated.png cannot be read" in truncated
    assert "test/a/text.jpg cannot be read" in text


def test_gray_and_transparent_files_become_rgb(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "train/a/gray.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 128)).save(tmp_path / "test/a/alpha.png")
    write_image(tmp_path / "train/b/0.png")
    dataset = load_dataset("folder", str(tmp_path))
    np.testing.assert_array_equal(dataset.train[0]["image"], np.full((4, 4, 3), 7))
    np.testing.assert_array_equal(dataset.test[0]["image"][0, 0], [128, 128, 129])  # half white


@pytest.mark.parametrize("compress", [False, True])
def test_idx_files_are_read_as_written(tmp_path, compress):
    rng = np.random.default_rng(0)
    images, labels = {}, {}
    for part, count in (("train", 5), ("t10k", 3)):
        images[part] = rng.integers(0, 256, (count, 28, 27), np.uint8)
        labels[part] = np.arange(count, dtype=np.uint8)
        write_idx(tmp_path / f"{part}-images-idx3-ubyte", images[part], compress)
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", labels[part], compress)
    dataset = load_dataset("idx", str(tmp_path))
    assert dataset.class_names == tuple("01234")
    np.testing.assert_array_equal(dataset.train[4]["image"][..., 2], images["train"][4])
    assert dataset.test[2]["label"] == 2


@pytest.mark.skipif(not FASHION_MNIST.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_fashion_mnist_has_names_for_its_classes():
    dataset = load_dataset("idx", str(FASHION_MNIST))
    assert dataset.class_names[:2] == ("T-shirt/top", "Trouser")
    assert len(dataset.class_names) == 10


def test_a_truncated_idx_file_is_refused(tmp_path):
    write_idx(tmp_path / "train-images-idx3-ubyte", np.zeros((5, 4, 4), np.uint8))
    file = tmp_path / "train-images-idx3-ubyte"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match=r"truncated: its header says \(5, 4, 4\), it holds 79 bytes"):
        load_dataset("idx", str(tmp_path))


@pytest.mark.parametrize(
    ("source", "make", "message"),
    [
        ("digit", None, "unknown data source 'digit'; did you mean 'digits'"),
        ("folder", None, "has no class folders"),
        ("folder", "a", "has no training images"),
        ("idx", None, "has no train-images-idx3-ubyte"),
    ],
)
def test_data_that_is_not_there_is_refused(tmp_path, source, make, message):
    if make:
        (tmp_path / make).mkdir()
    with pytest.raises(ValueError, match=message):
        load_dataset(source, str(tmp_path))


def test_a_path_that_is_no_folder_is_refused():
    with pytest.raises(ValueError, match="needs a folder as data path, got ''"):
        load_dataset("folder")
