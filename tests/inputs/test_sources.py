import gzip
import hashlib
import logging
import struct

import numpy as np
import pytest
from PIL import Image

from shiftaddvit_jax.data import load_dataset


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


def test_a_folder_of_classes_is_split_by_the_names_of_its_files(tmp_path):
    names = [f"{label}/{number}.png" for label in ("cat", "dog") for number in range(20)]
    for seed, name in enumerate(names):
        write_image(tmp_path / name, seed)
    dataset = load_dataset("folder", str(tmp_path))
    held_out = {name for name in names if int.from_bytes(hashlib.sha256(name.encode()).digest()[:8]) % 3 == 0}
    assert {path.relative_to(tmp_path).as_posix() for path in dataset.test.images} == held_out
    assert {path.relative_to(tmp_path).as_posix() for path in dataset.train.images} == set(names) - held_out
    assert dataset.class_names == ("cat", "dog")
    assert all(
        dataset.class_names[example["label"]] == path.parent.name
        for example, path in zip(dataset.train, dataset.train.images, strict=False)
    )


@pytest.mark.parametrize("held_out", ["test", "val"])
def test_folders_with_a_split_keep_it_and_pixels_are_the_files(tmp_path, held_out):
    write_image(tmp_path / "train/a/x.png")
    write_image(tmp_path / "train/b/deeper/y.JPG")
    pixels = write_image(tmp_path / held_out / "b/z.png", seed=3)
    dataset = load_dataset("folder", str(tmp_path))
    assert (len(dataset.train), len(dataset.test)) == (2, 1)
    np.testing.assert_array_equal(dataset.test[0]["image"], pixels)
    assert dataset.test[0]["label"] == 1


def test_broken_files_are_named_counted_and_skipped(tmp_path, caplog):
    for number in range(3):
        write_image(tmp_path / f"train/a/{number}.png", number)
    write_image(tmp_path / "test/a/good.png")
    whole = (tmp_path / "train/a/2.png").read_bytes()
    (tmp_path / "train/a/truncated.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "train/a/text.jpg").write_text("not an image")
    with caplog.at_level(logging.WARNING):
        dataset = load_dataset("folder", str(tmp_path))
    assert len(dataset.train) == 3
    assert "truncated.png" in caplog.text
    assert "text.jpg" in caplog.text
    assert "skipped 2 of 5 training images" in caplog.text


def test_gray_and_transparent_files_become_rgb(tmp_path):
    for part in ("train", "test"):
        (tmp_path / part / "a").mkdir(parents=True)
    Image.fromarray(np.full((4, 4), 7, np.uint8)).save(tmp_path / "train/a/gray.png")
    Image.new("RGBA", (4, 4), (1, 2, 3, 128)).save(tmp_path / "test/a/alpha.png")
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
