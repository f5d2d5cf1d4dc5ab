"""Shards hold what was written into them, by the formats' own writers."""

import dataclasses
import io
import json
import os
import tarfile

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from PIL import Image

from shiftaddvit_jax.data import check_data, load_dataset, shards
from shiftaddvit_jax.data.identity import describe_data
from shiftaddvit_jax.data.protos import read_example
from shiftaddvit_jax.data.sources import load_test_set


def picture(number):
    """An image file's bytes, and its pixels."""
    pixels = np.random.default_rng(number).integers(0, 256, (5, 6, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue(), pixels


def write_tar(path, members):
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data in members.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return path


def samples(numbers, label, suffix="cls"):
    """Members of a tar: images and what says their classes."""
    members = {}
    for number in numbers:
        members[f"{number:04}.png"] = picture(number)[0]
        members[f"{number:04}.{suffix}"] = label(number)
    return members


def write_tars(root):
    for part, shard, numbers in (("train", 0, range(4)), ("train", 1, range(4, 8)), ("val", 0, range(8, 12))):
        write_tar(root / f"set-{part}-{shard:06}.tar", samples(numbers, lambda number: b"%d" % (number % 2)))


# tf.train.Example, as protobuf itself encodes it; the fields are those of TensorFlow's example.proto.
def _example_class():
    file = descriptor_pb2.FileDescriptorProto(name="example.proto", package="t", syntax="proto3")

    def message(name, *fields):
        made = file.message_type.add(name=name)
        for number, field, kind, repeated in fields:
            label = 3 if repeated else 1
            settings = {"type_name": f".t.{kind}"} if isinstance(kind, str) else {}
            number_of_kind = 11 if isinstance(kind, str) else kind
            made.field.add(name=field, number=number, type=number_of_kind, label=label, **settings)

    message("BytesList", (1, "value", 12, True))
    message("FloatList", (1, "value", 2, True))
    message("Int64List", (1, "value", 3, True))
    lists = ((1, "bytes_list", "BytesList"), (2, "float_list", "FloatList"), (3, "int64_list", "Int64List"))
    message("Feature", *((*each, False) for each in lists))
    message("Entry", (1, "key", 9, False), (2, "value", "Feature", False))
    message("Features", (1, "feature", "Entry", True))
    message("Example", (1, "features", "Features", False))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("t.Example"))


Example = _example_class()


def record(**features):
    example = Example()
    for key, values in features.items():
        entry = example.features.feature.add(key=key)
        kind = {bytes: "bytes_list", float: "float_list", int: "int64_list"}[type(values[0])]
        getattr(entry.value, kind).value.extend(values)
    return example.SerializeToString()


def write_records(root):
    from array_record.python.array_record_module import ArrayRecordWriter

    for part, numbers in (("train", range(8)), ("test", range(8, 12))):
        writer = ArrayRecordWriter(str(root / f"set-{part}.array_record-00000-of-00001"), "group_size:1")
        for number in numbers:
            image = [picture(number)[0]]
            writer.write(record(file_name=[b"x.png"], score=[0.5], image=image, label=[number % 2]))
        writer.close()


def write_arrow(root):
    pyarrow = pytest.importorskip("pyarrow")
    features = {
        "image": {"_type": "Image"},
        "label": {"names": ["ant", "bee"], "_type": "ClassLabel"},
        "id": {"dtype": "int64", "_type": "Value"},
    }
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    image = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    fields = [("image", image), ("label", pyarrow.int64()), ("id", pyarrow.int64())]
    schema = pyarrow.schema(fields).with_metadata(about)
    for part, numbers in (("train", range(8)), ("test", range(8, 12))):
        (root / part).mkdir()
        images = [{"bytes": picture(number)[0], "path": None} for number in numbers]
        table = pyarrow.table([images, [number % 2 for number in numbers], list(numbers)], schema=schema)
        file = str(root / part / "data-00000-of-00001.arrow")
        with pyarrow.OSFile(file, "wb") as out, pyarrow.ipc.new_stream(out, schema) as writer:
            writer.write_table(table, max_chunksize=3)


KINDS = {"tar": write_tars, "array_record": write_records, "huggingface": write_arrow}


@pytest.mark.parametrize("source", KINDS)
def test_images_and_labels_are_those_that_were_written_whatever_the_order(tmp_path, source):
    KINDS[source](tmp_path)
    dataset = load_dataset(source, str(tmp_path))
    assert dataset.class_names == (("ant", "bee") if source == "huggingface" else ("0", "1"))
    assert (len(dataset.train), len(dataset.test)) == (8, 4)
    for examples, first in ((dataset.train, 0), (dataset.test, 8)):
        for index in reversed(range(len(examples))):
            example = examples[index]
            np.testing.assert_array_equal(example["image"], picture(first + index)[1])
            assert example["label"] == (first + index) % 2
    assert check_data(dataset) == []


@pytest.mark.parametrize("source", KINDS)
def test_a_run_knows_shards_by_the_names_in_them(tmp_path, source):
    KINDS[source](tmp_path)
    data = describe_data(load_dataset(source, str(tmp_path)))
    assert [count for count, _ in data["train"]] == [4, 4]
    assert len({digest for part in ("train", "test") for _, digest in data[part]}) == 4
    assert data == describe_data(load_dataset(source, str(tmp_path)))


def test_shards_of_one_part_have_a_third_of_each_class_held_out(tmp_path):
    write_tar(tmp_path / "0.tar", samples(range(12), lambda number: b"%d" % (number % 2)))
    dataset = load_dataset("tar", str(tmp_path))
    assert np.bincount(dataset.train.labels).tolist() == [4, 4]
    assert np.bincount(dataset.test.labels).tolist() == [2, 2]
    names = {*dataset.train.names, *dataset.test.names}
    assert names == {f"0.tar/{number:04}.png".encode() for number in range(12)}
    for index, name in enumerate(dataset.test.names):
        number = int(name.decode()[6:10])
        np.testing.assert_array_equal(dataset.test[index]["image"], picture(number)[1])


def test_shards_of_one_part_are_evaluated_whole(tmp_path):
    write_tar(tmp_path / "val/0.tar", samples(range(6), lambda number: b"%d" % (number % 2)))
    examples, names = load_test_set("tar", str(tmp_path))
    assert (len(examples), names) == (6, ("0", "1"))


@pytest.mark.parametrize(
    ("suffix", "label"),
    [
        ("cls", lambda number: b"%d\n" % (number % 2)),
        ("txt", lambda number: (b"ant", b"bee")[number % 2]),
        ("json", lambda number: json.dumps({"id": 7, "label": number % 2}).encode()),
        ("json", lambda number: json.dumps({"label": ("ant", "bee")[number % 2]}).encode()),
    ],
)
def test_a_tars_classes_are_numbers_or_names_and_a_file_may_name_them(tmp_path, suffix, label):
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    write_tar(tmp_path / "train/0.tar", samples(range(4), label, suffix))
    write_tar(tmp_path / "test/0.tar", samples(range(4, 6), label, suffix))
    dataset = load_dataset("tar", str(tmp_path))
    assert dataset.class_names == ("ant", "bee")
    assert list(dataset.train.labels) == [0, 1, 0, 1]


def test_a_sample_without_a_label_is_left_out_and_counted(tmp_path, caplog):
    members = samples(range(4), lambda number: b"%d" % (number % 2))
    write_tar(tmp_path / "train.tar", {**members, "a/b.c.png": picture(9)[0], "c.cls": b"1"})
    write_tar(tmp_path / "val.tar", members)
    assert len(load_dataset("tar", str(tmp_path)).train) == 4
    assert "left out 2 samples in" in caplog.text


def test_a_bad_image_in_a_shard_is_known_by_its_name(tmp_path):
    write_tars(tmp_path)
    write_tar(tmp_path / "set-train-000002.tar", {"bad.png": b"no image", "bad.cls": b"1"})
    (problem,) = check_data(load_dataset("tar", str(tmp_path)))
    assert problem.startswith("set-train-000002.tar/bad.png cannot be read as an image")


@pytest.mark.parametrize("source", ["tar", "array_record"])
def test_a_shard_is_read_through_once_and_again_after_it_changed(tmp_path, monkeypatch, source):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    root = tmp_path / "set"
    root.mkdir()
    KINDS[source](root)
    for number, file in enumerate(root.iterdir()):
        os.utime(file, (1e9 + number, 1e9 + number))
    read = []

    def load():
        read.clear()
        return describe_data(load_dataset(source, str(root)))

    kind = shards.FORMATS[source]
    counting = dataclasses.replace(kind, index=lambda file: read.append(file) or kind.index(file))
    monkeypatch.setitem(shards.FORMATS, source, counting)
    first = load()
    assert len(read) == len(list(root.iterdir()))
    assert load() == first
    assert not read
    changed = sorted(root.iterdir())[0]
    os.utime(changed, (2e9, 2e9))
    assert load() == first
    assert read == [str(changed)]
    assert all(file.stat().st_mode & 0o077 == 0 for file in (tmp_path / "cache").rglob("*.json"))


def test_features_of_tfds_say_where_image_and_label_are(tmp_path):
    from array_record.python.array_record_module import ArrayRecordWriter

    kinds = {"photo": "Image", "kind": "ClassLabel", "label": "Tensor"}
    features = {name: {"pythonClassName": f"tfds.core.features.{kind}"} for name, kind in kinds.items()}
    (tmp_path / "features.json").write_text(json.dumps({"featuresDict": {"features": features}}))
    (tmp_path / "label.labels.txt").write_text("ant\nbee\n")
    for part in ("train", "test"):
        writer = ArrayRecordWriter(str(tmp_path / f"set-{part}.array_record"), "group_size:1")
        for number in range(2):
            writer.write(record(photo=[picture(number)[0]], kind=[number], label=[9]))
        writer.close()
    dataset = load_dataset("array_record", str(tmp_path))
    assert (dataset.class_names, list(dataset.train.labels)) == (("ant", "bee"), [0, 1])


def test_an_example_is_read_as_protobuf_encodes_it():
    features = {"a": [b"", b"\xff" * 300], "b": [0, 1, -1, 2**63 - 1, -(2**63)], "c": [b"x"]}
    assert read_example(record(**features, floats=[1.5])) == {**features, "floats": []}


@pytest.mark.parametrize("damage", [lambda data: data[:-3], lambda data: b"\xff" * 20, lambda data: b"\x0f"])
def test_what_is_no_example_is_refused(damage):
    with pytest.raises(ValueError, match=r"the record is no tf\.train\.Example"):
        read_example(damage(record(image=[b"x" * 100], label=[1])))


@pytest.mark.parametrize(
    ("source", "files", "message"),
    [
        ("tar", {}, "has no tar files"),
        ("tar", {"train.tar": b"\x1f\x8bx"}, "cannot be read as a tar file.*not compressed"),
        ("array_record", {}, "has no ArrayRecord files"),
        ("array_record", {"a.array_record": b"x" * 100}, "a.array_record cannot be read as an ArrayRecord"),
        ("huggingface", {"a.arrow": b"x" * 100}, "a.arrow cannot be read as an Arrow file"),
    ],
)
def test_what_are_no_shards_is_refused(tmp_path, source, files, message):
    for name, data in files.items():
        (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        load_dataset(source, str(tmp_path))


def test_several_data_sets_in_one_cache_are_refused(tmp_path):
    for name in "ab":
        (tmp_path / name).mkdir()
        write_arrow(tmp_path / name)
    with pytest.raises(ValueError, match="has several data sets; give the folder of one, such as"):
        load_dataset("huggingface", str(tmp_path))


def test_numbers_that_have_no_name_are_refused(tmp_path):
    (tmp_path / "classes.txt").write_text("ant\nbee\n")
    write_tar(tmp_path / "train.tar", samples(range(4), lambda number: b"%d" % number))
    with pytest.raises(ValueError, match=r"has images of class \d, which its 2 classes lack"):
        load_dataset("tar", str(tmp_path))
