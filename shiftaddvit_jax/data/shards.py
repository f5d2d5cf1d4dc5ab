"""Images in a few large files: tar (WebDataset's layout), ArrayRecord (TFDS's), Arrow (Hugging Face's).

Each file is read through once, for what its images are and where they lie; of tar and ArrayRecord that is
kept for later runs. Then any image is read by its place.
"""

import json
import logging
import os
import re
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from shiftaddvit_jax.data.cache import recall, remember
from shiftaddvit_jax.data.examples import Dataset, Examples
from shiftaddvit_jax.data.folders import TEST, TRAIN, VALIDATION, held_out, in_order
from shiftaddvit_jax.data.images import SUFFIXES, Jpeg, Pixels, UnreadableImage, named, open_image
from shiftaddvit_jax.data.listing import SETTLED, PackedNames
from shiftaddvit_jax.data.protos import read_example
from shiftaddvit_jax.optional import require
from shiftaddvit_jax.progress import track

logger = logging.getLogger(__name__)

CLASS_FILES = ("classes.txt", "classnames.txt", "label.labels.txt")  # a name a line: ours, CLIP's, TFDS's
LABEL_SUFFIXES = ("cls", "json", "txt")  # of what beside an image in a tar says its class, first choice first
MOST_LABEL_BYTES = 1 << 20
# Where records of tf.train.Example keep them if no features.json says it: TFDS, and TF-Slim's ImageNet.
IMAGE_KEYS, LABEL_KEYS = ("image", "image/encoded"), ("label", "image/class/label")

Label = int | str


class Member(NamedTuple):
    """Where an image lies.

    Attributes:
      file: the shard.
      place: byte of a tar, number of a record or a row.
      size: bytes of a tar.
      name: what it is known by: the shard and its name in there.
    """

    file: str
    place: int
    size: int
    name: str


@dataclass
class Index:
    """What a shard holds.

    Attributes:
      names: of its images.
      labels: their classes, as numbers from 0 or as names.
      places: see `Member`.
      sizes: see `Member`.
      left_out: number of samples without an image or a label.
    """

    names: list[str] = field(default_factory=list)
    labels: list[Label] = field(default_factory=list)
    places: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    left_out: int = 0

    def add(self, name: str, label: Label, place: int, size: int = 0) -> None:
        """Add an image."""
        self.names.append(name)
        self.labels.append(label)
        self.places.append(place)
        self.sizes.append(size)


class Members:
    """The places of many images, in little memory.

    Args:
      files: the shards.
      counts: images of each.
      places: of all images, shard by shard.
      sizes: of all images.
      names: of all images.
    """

    def __init__(
        self, files: Sequence[str], counts: Sequence[int], places: Any, sizes: Any, names: PackedNames
    ) -> None:
        self._files, self._shards = files, np.repeat(np.arange(len(files)), counts)
        self._places, self._sizes = np.asarray(places, np.int64), np.asarray(sizes, np.int64)
        self._names = names

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Member:
        file = self._files[self._shards[index]]
        name = os.fsdecode(self._names[index])
        return Member(file, int(self._places[index]), int(self._sizes[index]), name)

    def chosen(self, these: Any, names: PackedNames) -> "Members":
        """Those of the images, whose names are ``names``."""
        counts = np.bincount(self._shards[these], minlength=len(self._files))
        return Members(self._files, counts.tolist(), self._places[these], self._sizes[these], names)


@dataclass(frozen=True)
class Format:
    """How shards of a kind are read.

    Attributes:
      is_shard: whether a file is one, by its name.
      index: what a shard holds.
      read: an image of a shard.
      class_names: what a shard itself says of the names of classes; None if nothing.
      keeps_index: whether the index costs reading the whole shard, and so is kept.
      expected: what is looked for, in words.
    """

    is_shard: Callable[[str], bool]
    index: Callable[[str], Index]
    read: Callable[[Member], Pixels | Jpeg]
    class_names: Callable[[str], Sequence[str] | None]
    keeps_index: bool
    expected: str


def load_shards(source: str, root: Path) -> Dataset:
    """The data set of shards in ``root``, or below it.

    Folders or files with ``train`` in their names, and ``val`` (``valid``, ``validation``) or ``test``, are
    its parts; of files of one part, a third of the images of each class is held out.

    Raises:
      ValueError: no shards, shards that can't be read, or labels that don't fit the names of classes.
    """
    kind, parts = FORMATS[source], find_shards(source, root)
    held = next((parts[part] for part in ("validation", "test") if part in parts), None)
    if "train" not in parts:
        raise ValueError(f"{root} has no training shards; expected 'train' in a file's or folder's name")
    found = [_read_index(kind, root, files) for files in (parts["train"], held) if files]
    names = _class_names(kind, root, parts["train"], found)
    train, *rest = (_examples(kind, index, names, root) for index in found)
    if rest:
        return Dataset(train, rest[0], names)
    assert train.names is not None
    out = held_out(list(train.names), np.asarray(train.labels))
    train, test = (_chosen(train, these) for these in (~out, out))
    return Dataset(train, test, names)


def all_images(source: str, root: Path) -> tuple[Examples, tuple[str, ...]] | None:
    """All images of shards that are no two parts, and the names of their classes; None if there are two.

    Raises:
      ValueError: as `load_shards`.
    """
    kind, parts = FORMATS[source], find_shards(source, root)
    if len(parts) > 1:
        return None
    (files,) = parts.values()
    index = _read_index(kind, root, files)
    names = _class_names(kind, root, files, [index])
    return _examples(kind, index, names, root), names


def find_shards(source: str, root: Path) -> dict[str, list[str]]:
    """The shards below ``root`` by part: ``"train"``, ``"validation"``, ``"test"``.

    Where no name says a part, all are ``"train"``; where some do, others are left alone.

    Raises:
      ValueError: there are none.
    """
    kind = FORMATS[source]
    parts: dict[str, list[str]] = {}
    for folder, folders, files in os.walk(root, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and kind.is_shard(name):
                below = os.path.relpath(os.path.join(folder, name), root)
                parts.setdefault(_part(below), []).append(os.path.join(folder, name))
    others = parts.pop("", [])
    if not parts and not others:
        raise ValueError(f"{root} has no {kind.expected}")
    if source == "huggingface":
        for files in (others, *parts.values()):
            if len(folders := sorted({os.path.dirname(file) for file in files})) > 1:
                raise ValueError(
                    f"{root} has several data sets; give the folder of one, such as {folders[0]}"
                )
    if not parts:
        return {"train": others}
    if others:
        logger.warning("left alone in %s, of no part that its name says: %d files", root, len(others))
    return parts


def _part(below):
    """The part that a path's names say, the file's before its folders'; an empty string if none."""
    for name in reversed(Path(below.lower()).parts):
        for word in re.split(r"[^a-z]+", name):
            for part, words in (("train", TRAIN), ("validation", VALIDATION), ("test", TEST)):
                if word in words:
                    return part
    return ""


def _read_index(kind: Format, root: Path, files: Sequence[str]) -> dict[str, Index]:
    """What each shard holds."""
    found = {file: _index(kind, file) for file in track(files, "reading shards", len(files))}
    if left_out := sum(index.left_out for index in found.values()):
        logger.warning("left out %d samples in %s without an image or a label", left_out, root)
    if not any(index.names for index in found.values()):
        raise ValueError(f"the {kind.expected} in {root} have no images with labels")
    return found


def _index(kind, file):
    status = os.stat(file)
    version = [status.st_size, status.st_mtime_ns]
    if kind.keeps_index:
        match recall("shard", file):
            case {"version": kept, "index": dict(index)} if kept == version:
                return Index(**index)
    index = kind.index(file)
    if kind.keeps_index and status.st_mtime_ns < time.time_ns() - SETTLED:
        remember("shard", file, {"version": version, "index": asdict(index)})
    return index


def _class_names(kind, root, files, indices) -> tuple[str, ...]:
    """Names of the classes: from a file of them, from the shards, or as the labels have them."""
    labels = {label for index in indices for shard in index.values() for label in shard.labels}
    texts = {label for label in labels if isinstance(label, str)}
    if texts and len(texts) < len(labels):
        raise ValueError(f"{root} has labels that are numbers and others that are names; expected one kind")
    names = _class_file(root, files) or kind.class_names(files[0])
    if names is None:
        return in_order(sorted(texts)) if texts else tuple(map(str, range(max(labels) + 1)))
    unknown = sorted(texts - set(names)) or [label for label in labels - texts if label >= len(names)]
    if unknown:
        raise ValueError(f"{root} has images of class {unknown[0]!r}, which its {len(names)} classes lack")
    return tuple(names)


def _class_file(root, files):
    for folder in (Path(files[0]).parent, root):
        for name in CLASS_FILES:
            if (folder / name).is_file():
                return (folder / name).read_text().splitlines()
    return None


def _examples(kind, indices: dict[str, Index], names, root) -> Examples:
    numbers = {name: number for number, name in enumerate(names)}
    shards = list(indices.values())
    labels = [
        label if isinstance(label, int) else numbers[label] for shard in shards for label in shard.labels
    ]
    known = PackedNames(
        [f"{os.path.relpath(file, root)}/{name}" for file, shard in indices.items() for name in shard.names]
    )
    places = [place for shard in shards for place in shard.places]
    sizes = [size for shard in shards for size in shard.sizes]
    members = Members(list(indices), [len(shard.names) for shard in shards], places, sizes, known)
    return Examples(members, np.array(labels, np.int32), kind.read, known)


def _chosen(examples, these):
    names = PackedNames([os.fsdecode(examples.names[index]) for index in np.flatnonzero(these).tolist()])
    return Examples(examples.images.chosen(these, names), examples.labels[these], examples.read, names)


# Tar shards: https://github.com/webdataset/webdataset


def _index_tar(file: str) -> Index:
    """The samples of a tar: files that share all of their path up to the first dot of its last part."""
    samples: dict[str, dict[str, Any]] = {}
    try:
        with tarfile.open(file, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, extensions = base.partition(".")
                suffix = extensions.lower().rpartition(".")[2]
                if not member.isfile() or not stem:
                    continue
                sample = samples.setdefault(f"{folder}/{stem}" if folder else stem, {})
                if f".{suffix}" in SUFFIXES:
                    sample.setdefault("image", (member.name, member.offset_data, member.size))
                elif suffix in LABEL_SUFFIXES and member.size <= MOST_LABEL_BYTES:
                    label = tar.extractfile(member)
                    sample[suffix] = _tar_label(suffix, label.read() if label else b"")
    except (tarfile.TarError, EOFError, OSError) as error:
        raise ValueError(
            f"{file} cannot be read as a tar file: {error}; expected a whole one, not compressed"
        ) from None
    index = Index()
    for sample in samples.values():
        label = next((found for suffix in LABEL_SUFFIXES if (found := sample.get(suffix)) is not None), None)
        if label is None or "image" not in sample:
            index.left_out += 1
        else:
            name, place, size = sample["image"]
            index.add(name, label, place, size)
    return index


def _tar_label(suffix, data) -> Label | None:
    """A class, a number or a name: all of a ``.cls`` or ``.txt``, or ``label`` or ``cls`` of a ``.json``."""
    try:
        if suffix == "json":
            found = json.loads(data)
            label = next((found[key] for key in ("label", "cls") if key in found), None)
            text = "" if label is None or isinstance(label, bool | float | list | dict) else str(label)
        else:
            text = data.decode().strip()
    except (ValueError, TypeError):
        return None
    return int(text) if text.isascii() and text.isdigit() else text or None


def _read_tar(member: Member) -> Pixels | Jpeg:
    with named(member.name), open(member.file, "rb") as file:
        file.seek(member.place)
        data = file.read(member.size)
    return open_image(data, name=member.name)


# ArrayRecord: https://github.com/google/array_record


@lru_cache(maxsize=256)
def _record_reader(file: str) -> Any:
    """What reads a file's records, from any thread."""
    require("train", "the data source 'array_record'", "array_record")
    from array_record.python import array_record_module

    # Nothing is read ahead, since the order is random.
    options = {"options": "readahead_buffer_size:0", "file_reader_buffer_size": 32768}
    reader = array_record_module.ArrayRecordReader(file, **options)
    if not reader.ok():
        raise ValueError(f"{file} cannot be read as an ArrayRecord file; expected a whole one")
    return reader


def _feature_keys(file: str) -> tuple[Sequence[str], Sequence[str]]:
    """The names that image and label may have, from TFDS's ``features.json`` beside a file if it is there."""
    beside = Path(file).parent / "features.json"
    try:
        features = json.loads(beside.read_text())["featuresDict"]["features"]
        kinds = {name: feature["pythonClassName"].rpartition(".")[2] for name, feature in features.items()}
    except FileNotFoundError:
        return IMAGE_KEYS, LABEL_KEYS
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{beside} is not what TFDS writes; expected its description of features") from None
    images, labels = ([name for name in kinds if kinds[name] == kind] for kind in ("Image", "ClassLabel"))
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(f"{beside} has {len(images)} images and {len(labels)} labels; expected one of each")
    return images, labels


def _index_records(file: str) -> Index:
    image_keys, label_keys = _feature_keys(file)
    index = Index()
    for number, example in enumerate(_records(file)):
        label = next((example[key][0] for key in label_keys if example.get(key)), None)
        has_image = any(example.get(key) for key in image_keys)
        if has_image and isinstance(label, bytes):
            index.add(str(number), label.decode(errors="replace"), number)
        elif has_image and isinstance(label, int) and label >= 0:
            index.add(str(number), label, number)
        else:
            index.left_out += 1
    return index


def _records(file: str) -> Iterator[dict[str, list]]:
    reader, step = _record_reader(file), 64
    for first in range(0, reader.num_records(), step):
        numbers = list(range(first, min(first + step, reader.num_records())))
        try:
            found = reader.read(numbers)
        except RuntimeError as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"{file} cannot be read as an ArrayRecord file: {reason}") from None
        for number, record in zip(numbers, found, strict=True):
            try:
                yield read_example(record)
            except ValueError:
                raise ValueError(
                    f"record {number} of {file} is no tf.train.Example; expected what TFDS writes"
                ) from None


def _read_record(member: Member) -> Pixels | Jpeg:
    with named(member.name):
        image_keys, _ = _feature_keys(member.file)
        example = read_example(_record_reader(member.file).read([member.place])[0])
        data = next(example[key][0] for key in image_keys if example.get(key))
    return open_image(data, name=member.name)


# Arrow files of Hugging Face's `datasets`: https://huggingface.co/docs/datasets/about_arrow


@lru_cache(maxsize=256)
def _arrow(file: str) -> Any:
    """A file's table, mapped into memory."""
    require("datasets", "the data source 'huggingface'")
    import pyarrow

    try:
        mapped = pyarrow.memory_map(file)
        try:
            return pyarrow.ipc.open_stream(mapped).read_all()
        except pyarrow.ArrowInvalid:
            return pyarrow.ipc.open_file(mapped).read_all()
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise ValueError(f"{file} cannot be read as an Arrow file: {error}") from None


@lru_cache(maxsize=256)
def _arrow_columns(file: str) -> tuple[str, str, tuple[str, ...] | None]:
    """The columns of image and label, and the names of classes, as `datasets` says them in the schema."""
    metadata = _arrow(file).schema.metadata or {}
    try:
        about = json.loads(metadata[b"huggingface"])
        features = about["info"]["features"]
        kinds = {name: feature.get("_type") for name, feature in features.items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise ValueError(f"{file} does not describe its columns; expected what `datasets` writes") from None
    images, labels = ([name for name in kinds if kinds[name] == kind] for kind in ("Image", "ClassLabel"))
    if len(images) != 1 or len(labels) != 1:
        raise ValueError(
            f"{file} has {len(images)} columns of images and {len(labels)} of classes; expected one of each"
        )
    names = features[labels[0]].get("names")
    return images[0], labels[0], tuple(names) if names else None


def _index_rows(file: str) -> Index:
    _, column, _ = _arrow_columns(file)
    labels = _arrow(file).column(column).to_pylist()
    index = Index()
    for row, label in enumerate(labels):
        if label is None or label < 0:  # as test sets without labels have it
            index.left_out += 1
        else:
            index.add(str(row), label, row)
    return index


def _read_row(member: Member) -> Pixels | Jpeg:
    with named(member.name):
        column, _, _ = _arrow_columns(member.file)
        image = _arrow(member.file).column(column)[member.place].as_py() or {}
        data = image.get("bytes") or image.get("path")
        if not data:
            raise UnreadableImage("the row has no image")
    return open_image(data, name=member.name)


FORMATS = {
    "tar": Format(
        lambda name: name.lower().endswith(".tar"),
        _index_tar,
        _read_tar,
        lambda file: None,
        keeps_index=True,
        expected="tar files of images and their labels",
    ),
    "array_record": Format(
        lambda name: re.search(r"\.array_?record($|-)", name.lower()) is not None,
        _index_records,
        _read_record,
        lambda file: None,
        keeps_index=True,
        expected="ArrayRecord files",
    ),
    "huggingface": Format(
        # Files of that name are what the library computed from others.
        lambda name: name.endswith(".arrow") and not name.startswith(("cache-", "tmp")),
        _index_rows,
        _read_row,
        lambda file: _arrow_columns(file)[2],
        keeps_index=False,
        expected="Arrow files, as `datasets` prepares or saves them",
    ),
}
