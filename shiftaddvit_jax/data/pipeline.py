"""From images to batches: an order that can be resumed and shared out, decoded ahead of use."""

import itertools
import logging
import math
import os
from collections.abc import Callable, Generator, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8

from shiftaddvit_jax.data.examples import Dataset, Examples
from shiftaddvit_jax.data.images import Jpeg, UnreadableImage, decode_file, whole
from shiftaddvit_jax.data.preprocessing import preprocess, resize
from shiftaddvit_jax.data.stream import map_ahead
from shiftaddvit_jax.models.preprocessing import IMAGENET_DEVIATION, IMAGENET_MEAN, Preprocessing
from shiftaddvit_jax.optional import require
from shiftaddvit_jax.progress import track

logger = logging.getLogger(__name__)

MEAN = np.array(IMAGENET_MEAN, np.float32)
STANDARD_DEVIATION = np.array(IMAGENET_DEVIATION, np.float32)
ENDLESS = 2**40  # elements; Grain's own endless length overflows in places
MOST_BAD = 100  # neighbours that can't be read before a set is taken to be unreadable
CHUNK = 64  # images that one thread makes at a time, at most
MOST_THREADS = 16  # of this process; beyond, threads wait for Python's lock, and `workers` do not

Augment = Callable[
    [UInt8[np.ndarray, "height width 3"] | Jpeg, Preprocessing, np.random.Generator],
    Float[np.ndarray, "size size 3"],
]


def normalize(image: UInt8[np.ndarray, "*shape 3"]) -> Float[np.ndarray, "*shape 3"]:
    """Pixels less ImageNet's mean, over its standard deviation, channel by channel, float32."""
    return (image.astype(np.float32) / 255 - MEAN) / STANDARD_DEVIATION


def load_image(path: str | Path, size: int) -> Float[np.ndarray, "size size 3"]:
    """The centre square of an image file at a size, with ImageNet's normalization.

    What a model expects may be something else: `preprocess` makes that.

    Raises:
      ValueError: as `decode_file`.
    """
    return normalize(resize(decode_file(path), size))


def train_iterator(
    examples: Examples,
    *,
    preprocessing: Preprocessing,
    batch_size: int,
    augment: Augment,
    seed: int,
    first_batch: int = 0,
    repeats: int = 1,
    workers: int = 0,
    host: int = 0,
    hosts: int = 1,
) -> Generator[dict[str, np.ndarray]]:
    """Endless batches ``{"image": float32 [rows, size, size, 3], "label": int32 [rows]}``.

    Batch n depends on the arguments and n alone, neither on ``workers`` nor, all hosts' rows together, on
    ``hosts``. So a run that stopped goes on at ``first_batch`` with the batches it would have seen, on
    another number of hosts too. Every epoch has each image once, in an order of its own; the last of one
    epoch and the first of the next share a batch.

    Closing the iterator ends its threads or processes.

    An image that can't be read is named in the log, once, and the next one in the list that can be comes in
    its place.

    Args:
      examples: what to draw from.
      preprocessing: the model's.
      batch_size: images a batch, over all hosts.
      augment: from an image, as `Examples.open` returns it, to the model's input, such as an `Augmentation`
        or `no_augmentation`. Its random numbers depend on the seed and the image's place among all that are
        drawn.
      seed: seed of the order and the augmentation.
      first_batch: number of the first batch.
      repeats: how often an image comes, in as many places in a row, before the next does (repeated
        augmentation: Hoffer et al., "Augment your batch", 2019).
      workers: processes that make the batches; 0 for threads in this one. Processes start a new Python, so
        the program's own file must do nothing when it is imported.
      host: number of this host, whose rows of each batch are returned: the ``host``-th of ``hosts`` equal
        shares.
      hosts: how many there are.

    Raises:
      ValueError: no examples, a number out of range, or a batch that hosts do not divide.
      UnreadableImage: from the iterator, if many images in a row can't be read.
    """
    require("train", "the order of training images", "grain")
    rows = _rows(batch_size, host, hosts)
    for name, value, least in (
        ("repeats", repeats, 1),
        ("workers", workers, 0),
        ("first_batch", first_batch, 0),
    ):
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")
    if not len(examples):
        raise ValueError("there is nothing to train on: expected at least one image, got none")
    first = first_batch * batch_size + host * rows
    drawn = _Drawn(examples, preprocessing, augment, seed, repeats, first, rows, batch_size)
    return _batches(drawn, rows, workers)


def _rows(batch_size, host, hosts):
    """Rows of a batch on each host."""
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    if not 0 <= host < hosts:
        raise ValueError(f"host must be from 0 to hosts - 1, got host {host} of {hosts}")
    if batch_size % hosts:
        raise ValueError(
            f"batch_size {batch_size} must be a multiple of the number of hosts, {hosts}; such as "
            f"{math.ceil(batch_size / hosts) * hosts}"
        )
    return batch_size // hosts


class _Drawn:
    """The training images of a host in their order, prepared: what Grain reads in threads or processes."""

    def __init__(self, examples, preprocessing, augment, seed, repeats, first, rows, batch_size):
        import grain

        self._examples, self._preprocessing, self._augment = examples, preprocessing, augment
        self._seed, self._repeats = seed, repeats
        self._first, self._rows, self._batch_size = first, rows, batch_size
        count = len(examples)
        self._order = grain.MapDataset.range(count).seed(seed).shuffle().repeat(ENDLESS // count)

    def __len__(self):
        return ENDLESS

    def __getitem__(self, index):
        batch, row = divmod(index, self._rows)
        place = self._first + batch * self._batch_size + row  # among all that hosts draw
        drawn = int(self._order[place // self._repeats])
        problem = None
        for skipped in range(min(len(self._examples), MOST_BAD)):
            chosen = (drawn + skipped) % len(self._examples)
            rng = np.random.default_rng((self._seed, place))
            try:
                image = self._augment(self._examples.open(chosen), self._preprocessing, rng)
            except UnreadableImage as error:
                problem = error
                continue
            label = np.int32(self._examples.labels[chosen])
            return {"image": image, "label": label, "drawn": drawn, "skipped": skipped}
        tried = min(len(self._examples), MOST_BAD)
        raise UnreadableImage(f"none of {tried} images in a row can be read; the last: {problem}")

    def unreadable(self, batch):
        """The examples that ``batch`` has others in the place of."""
        count = len(self._examples)
        return [
            (int(drawn) + each) % count
            for drawn, skipped in zip(batch["drawn"], batch["skipped"], strict=True)
            for each in range(skipped)
        ]


def _batches(drawn, rows, workers):
    """Batches of ``rows``, made in chunks that fill them, by threads or workers two batches ahead."""
    import grain
    from absl import flags

    chunk = max(size for size in range(1, min(rows, CHUNK) + 1) if rows % size == 0)
    ahead = max(2 * rows // chunk, 2)
    threads = min(_cpus(), MOST_THREADS)
    if workers:
        reading = grain.ReadOptions(num_threads=1, prefetch_buffer_size=1)
    else:
        reading = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=max(ahead, threads))
    processes = grain.MultiprocessingOptions(
        workers, per_worker_buffer_size=math.ceil(ahead / max(workers, 1))
    )
    chunks = grain.MapDataset.source(drawn).batch(chunk).to_iter_dataset(reading)
    if workers:
        if not flags.FLAGS.is_parsed():  # Grain asks for its flags, which are left at their defaults
            flags.FLAGS.mark_as_parsed()
        chunks = chunks.mp_prefetch(processes)
    iterator = iter(chunks)
    bad: set[int] = set()
    try:
        while True:
            parts: Any = list(itertools.islice(iterator, rows // chunk))
            for index in itertools.chain.from_iterable(map(drawn.unreadable, parts)):
                if index not in bad:
                    bad.add(index)
                    _log_skipped(drawn._examples, index, len(bad))
            yield {
                name: parts[0][name] if len(parts) == 1 else np.concatenate([part[name] for part in parts])
                for name in ("image", "label")
            }
    finally:
        iterator.close()


def _log_skipped(examples, index, count):
    problem = examples.problem(index) or f"image {index} could not be read a moment ago"
    logger.warning("skipped: %s (%d of %d images so far)", problem, count, len(examples))


def _cpus():
    """Processors that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def evaluation_batches(
    examples: Examples, *, preprocessing: Preprocessing, batch_size: int, host: int = 0, hosts: int = 1
) -> Iterator[dict[str, np.ndarray]]:
    """Every example once, in order: batches as in `train_iterator`, with ``"real"``, bool [rows].

    What fills the last batch up, blank, is not real; nor is an image that can't be read, which the log names.

    Args:
      examples: what to evaluate on.
      preprocessing: the model's.
      batch_size: images a batch, over all hosts.
      host: number of this host, as in `train_iterator`; each has as many batches.
      hosts: how many there are.

    Raises:
      ValueError: as `train_iterator`.
    """
    rows = _rows(batch_size, host, hosts)
    blank = np.zeros((preprocessing.size, preprocessing.size, 3), np.float32)

    def prepared(index):
        if index >= len(examples):
            return None
        try:
            return preprocess(whole(examples.open(index)), preprocessing), examples.labels[index]
        except UnreadableImage as error:
            return error

    def batches():
        firsts = range(host * rows, math.ceil(len(examples) / batch_size) * batch_size, batch_size)
        indices = (first + row for first in firsts for row in range(rows))
        made = map_ahead(prepared, indices, ahead=2 * rows)
        while found := list(itertools.islice(made, rows)):
            for error in found:
                if isinstance(error, UnreadableImage):
                    logger.warning("left out: %s", error)
            real = [isinstance(one, tuple) for one in found]
            shown = [one if isinstance(one, tuple) else (blank, 0) for one in found]
            images, labels = zip(*shown, strict=True)
            yield {
                "image": np.stack(images),
                "label": np.array(labels, np.int32),
                "real": np.array(real),
            }

    return batches()


def check_data(dataset: Dataset) -> list[str]:
    """Why images of ``dataset`` can't be read, in a line each, after all of them have been decoded."""
    found = []
    for what, examples in (("training", dataset.train), ("test", dataset.test)):
        problems = map_ahead(examples.problem, range(len(examples)), ahead=256)
        found += filter(None, track(problems, f"checking {what} images", len(examples)))
    return found
