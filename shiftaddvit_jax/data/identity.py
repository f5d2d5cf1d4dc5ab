"""Which data a run is on: the names of its classes, and a digest of its list of images."""

import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from shiftaddvit_jax.data.examples import Dataset, Examples

PARTS = {"train": "training", "test": "test"}  # of a `Dataset`, as people call them
SHOWN, LISTED = 3, 12  # differences and classes that fit a line


def describe_data(dataset: Dataset) -> dict[str, Any]:
    """The data's identity, in types that JSON can hold: ``class_names``, and by part what each class has.

    Of every class, ``train`` and ``test`` hold the number of images, and a digest of their names in order:
    paths below the data set's folder, or places in its files. What is in the images is not read.
    """
    parts = {name: _classes(getattr(dataset, name), len(dataset.class_names)) for name in PARTS}
    return {"class_names": list(dataset.class_names), **parts}


def data_summary(data: Mapping[str, Any]) -> str:
    """How many images there are of each class, in a line, from what `describe_data` returns."""
    names, train, test = data["class_names"], data["train"], data["test"]
    each = [f"{name} {a} + {b}" for name, (a, _), (b, _) in zip(names, train, test, strict=True)]
    total, total_test = (sum(count for count, _ in part) for part in (train, test))
    shown = ", ".join(each[:LISTED]) + (", ..." if len(each) > LISTED else "")
    return f"{len(names)} classes, {total} training and {total_test} test images: {shown}"


def class_difference(then: Sequence[str], now: Sequence[str]) -> str | None:
    """What became of the classes ``then``, in words; None if they are ``now``'s.

    ImageNet's 1,000 classes in their order are the same by words and by WordNet's numbers (n01440764, ...).
    """
    if (
        list(then) == list(now)
        or (_in_synsets(then) and _in_words(now))
        or (_in_words(then) and _in_synsets(now))
    ):
        return None
    gone = [name for name in then if name not in set(now)]
    new = [name for name in now if name not in set(then)]
    words = [
        f"{'class' if len(names) == 1 else 'classes'} {_some(names)} {verb}"
        for names, verb in ((gone, "gone"), (new, "new"))
        if names
    ]
    return " and ".join(words) or "the same classes in another order"


def data_difference(then: Mapping[str, Any], now: Mapping[str, Any]) -> str | None:
    """What became of the data ``then`` (see `describe_data`), in words; None if it is ``now``'s."""
    if found := class_difference(then["class_names"], now["class_names"]):
        return found
    found = [
        f"class {name!r} has {images} {words} image{'s' * (images != 1)} instead of {images_then}"
        if images != images_then
        else f"class {name!r} has other {words} images, {images} as before"
        for part, words in PARTS.items()
        for name, (images_then, digest_then), (images, digest) in zip(
            now["class_names"], then[part], now[part], strict=True
        )
        if digest != digest_then
    ]
    return "; ".join(found[:SHOWN]) + ("; ..." if len(found) > SHOWN else "") or None


def _classes(examples: Examples, classes: int) -> list[list]:
    digests = [hashlib.sha256() for _ in range(classes)]
    labels = np.asarray(examples.labels, np.int64)
    names = examples.names
    if names is None:
        names = [str(place).encode() for place in range(len(examples))]
    for name, label in zip(names, labels.tolist(), strict=True):
        digests[label].update(name + b"\0")
    counts = np.bincount(labels, minlength=classes)
    return [[int(count), digest.hexdigest()[:16]] for count, digest in zip(counts, digests, strict=True)]


def _in_synsets(names):
    """Whether these are the 1,000 synsets of ImageNet-1k's folders, whose order is that of its labels."""
    if len(names) != 1000 or (names[0], names[-1]) != ("n01440764", "n15075141"):
        return False
    return list(names) == sorted(names) and all(re.fullmatch(r"n\d{8}", name) for name in names)


def _in_words(names):
    """Whether these are words for ImageNet-1k's classes, in any of the common lists."""
    return len(names) == 1000 and names[0].startswith("tench") and names[-1].startswith("toilet tissue")


def _some(names):
    return ", ".join(map(repr, names[:SHOWN])) + (", ..." if len(names) > SHOWN else "")
