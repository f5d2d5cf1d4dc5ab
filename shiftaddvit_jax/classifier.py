"""From a name to an answer: a model with its pixels and the names of its classes, ready to call on images."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property, partial
from itertools import compress, islice
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from jaxtyping import Array, Float, PyTree, UInt8
from PIL import Image

from shiftaddvit_jax.checkpoints import Source, open_source, push_to_hub, save_pretrained
from shiftaddvit_jax.compile import runs_on_kernels
from shiftaddvit_jax.data.images import SUFFIXES
from shiftaddvit_jax.data.listing import Listing, walk
from shiftaddvit_jax.data.preprocessing import preprocess
from shiftaddvit_jax.data.stream import Prepared, prepare_all
from shiftaddvit_jax.pack import inference_variables
from shiftaddvit_jax.validation import check_head

OneImage = UInt8[np.ndarray, "height width 3"] | str | Path | bytes | BinaryIO | Image.Image
MAX_BATCH = 32
LARGE = 64 * 1024  # bytes of a variable from which on programs take it as an argument


class Answer(NamedTuple):
    """A class that an image may show.

    Attributes:
      label: the class's name.
      probability: how probable the model takes it to be.
      index: the class's number, from 0.
    """

    label: str
    probability: float
    index: int


class Classifier:
    """A model that answers for images: from files, bytes, or arrays to labels and probabilities.

    Images are computed in batches of 1, 2, 4, ... up to ``max_batch``, the last one padded, so that a stream
    of them compiles no more programs than that. Threads may share a classifier.

    Attributes:
      source: what it was made of: the name, ``notes`` on what could not be known, and what follows.
      model: plain Flax.
      variables: the model's, as the source has them.
      preprocessing: the pixels that the model expects.
      class_names: a name for each class.
      max_batch: images that are computed at once, at most.
    """

    def __init__(self, source: Source, max_batch: int = MAX_BATCH) -> None:
        if max_batch < 1:
            raise ValueError(f"max_batch must be at least 1, got {max_batch}")
        check_head(source.model)
        self.source = source
        self.max_batch = max_batch
        self.model, self.variables = source.model, source.variables
        self.preprocessing, self.class_names = source.preprocessing, source.class_names

    def __call__(self, images: Any, top_k: int = 5) -> Any:
        """The ``top_k`` most probable classes of an image or of several.

        Args:
          images: an image: a path, the bytes of a file, a binary file, a Pillow image, or pixels as uint8
            [height, width, 3]; several: a list of these, or pixels as uint8 [batch, height, width, 3]; or a
            folder, whose image files are read, those in its folders too.
          top_k: classes to name, at most all.

        Returns:
          For one image a list of `Answer`, the most probable first; for several a list of such lists; for a
          folder a dictionary of them by the files' paths in their order.

        Raises:
          ValueError: an image that can't be read (with its name), or a folder without images.
        """
        if isinstance(images, str | Path) and Path(images).is_dir():
            files = image_files(Path(images))
            if not files:
                raise ValueError(f"{images} has no image files; expected {', '.join(SUFFIXES)}")
            return dict(zip(files, self.rank(self.probabilities(files), top_k), strict=True))
        array = np.asarray(images) if isinstance(images, np.ndarray | Array) else None
        if isinstance(images, list | tuple) or (array is not None and array.ndim == 4):
            return self.rank(self.probabilities(images if array is None else list(array)), top_k)
        return self.rank(self.probabilities([images if array is None else array]), top_k)[0]

    def probabilities(self, images: Sequence[OneImage]) -> Float[np.ndarray, "batch classes"]:
        """The probability of each class, of several images.

        Raises:
          ValueError: as for a call.
        """
        found = [np.zeros((0, self.model.num_classes), np.float32)]
        for prepared, probabilities in self.stream(images):
            error = next((each.error for each in prepared if each.error), None)
            if error:
                raise ValueError(error)
            found.append(probabilities)
        return np.concatenate(found)

    def stream(
        self, images: Any, batch_size: int | None = None
    ) -> Iterator[tuple[list[Prepared], Float[np.ndarray, "batch classes"]]]:
        """Batches of any number of images, decoded in threads beside the computation, in their order.

        What can't be read has an ``error``, and NaN for its probabilities.
        """
        if not self.model.num_classes:
            raise ValueError("the model has no head, so no classes; `shiftaddvit_jax.features` takes images")
        batch_size = batch_size or self.max_batch
        prepared = iter(prepare_all(images, self.preprocessing, ahead=2 * batch_size))
        while batch := list(islice(prepared, batch_size)):
            good = {index: each.pixels for index, each in enumerate(batch) if each.pixels is not None}
            probabilities = np.full((len(batch), self.model.num_classes), np.nan, np.float32)
            if good:
                probabilities[list(good)] = softmax(self.logits(np.stack(list(good.values()))))
            yield batch, probabilities

    def preprocess(self, image: OneImage) -> Float[np.ndarray, "size size 3"]:
        """An image as the model takes it, float32.

        Raises:
          ValueError: an image that can't be read.
        """
        return preprocess(image, self.preprocessing)

    def logits(self, inputs: Float[np.ndarray, "batch size size 3"]) -> Float[np.ndarray, "batch classes"]:
        """The logits of inputs that `preprocess` made."""
        found = [np.zeros((0, self.model.num_classes), np.float32)]
        for first in range(0, len(inputs), self.max_batch):
            part = inputs[first : first + self.max_batch]
            padding = min(1 << (len(part) - 1).bit_length(), self.max_batch) - len(part)
            padded = np.pad(part, [(0, padding), (0, 0), (0, 0), (0, 0)])
            found.append(np.asarray(self._program(padded))[: len(part)])
        return np.concatenate(found)

    def rank(self, probabilities: Float[np.ndarray, "batch classes"], top_k: int = 5) -> list[list[Answer]]:
        """The ``top_k`` most probable classes of each row."""
        best = np.argsort(-probabilities, axis=-1, kind="stable")[:, : max(top_k, 0)]
        return [
            [Answer(self.class_names[index], float(row[index]), int(index)) for index in indices]
            for row, indices in zip(probabilities, best, strict=True)
        ]

    def with_model(self, model: nn.Module, variables: PyTree) -> "Classifier":
        """A classifier with the same pixels and classes, and another model, such as one made of this one's.

        Args:
          model: what `reparameterize` or `calibrate` made.
          variables: its variables, packed or not.
        """
        about = {name: value for name, value in (self.source.about or {}).items() if name != "top1"}
        source = replace(
            self.source, model=model, variables=variables, about=about, notes=(), program=None, place=None
        )
        return Classifier(source, self.max_batch)

    def warm_up(self, batch: int | None = None) -> None:
        """Compile what batches of 1, 2, 4, ... up to ``batch`` need; by default up to ``max_batch``."""
        size, last = 1, batch or self.max_batch
        while True:
            side = self.preprocessing.size
            self.logits(np.zeros((min(size, last), side, side, 3), np.float32))
            if size >= last:
                return
            size *= 2

    def save_pretrained(self, folder: str | Path) -> None:
        """Write the model as the Hub has it; see `shiftaddvit_jax.checkpoints.save_pretrained`."""
        save_pretrained(self.source, folder)

    def push_to_hub(self, repo_id: str, **settings: Any) -> str:
        """Upload the model to the Hub; see `shiftaddvit_jax.checkpoints.push_to_hub`."""
        return push_to_hub(self.source, repo_id, **settings)

    @cached_property
    def _inference_variables(self) -> PyTree:
        if self.source.program is not None:
            return self.variables
        return inference_variables(self.model, self.variables, for_kernels=runs_on_kernels(self.model))

    @cached_property
    def _program(self) -> partial:
        """The jitted model, from inputs to logits, with small variables as its constants.

        A call takes microseconds for each argument, and models have hundreds of small variables. Of large
        constants each size of a batch would have a copy.
        """
        apply = self.source.program or self.model.apply
        leaves, tree = jax.tree.flatten(self._inference_variables)
        is_large = [leaf.nbytes >= LARGE for leaf in leaves]

        def run(large, inputs):
            given = iter(large)
            variables = [next(given) if taken else leaf for leaf, taken in zip(leaves, is_large, strict=True)]
            return apply(tree.unflatten(variables), inputs)

        return partial(jax.jit(run), list(compress(leaves, is_large)))


def from_pretrained(
    source: str | Path,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    layer_norm_eps: float | None = None,
    max_batch: int = MAX_BATCH,
) -> Classifier:
    """A `Classifier` of the model that ``source`` names.

    ``source`` is one of this project's checkpoints or bundles; or weights of transformers, timm or the
    authors: a folder, a file, or a name to download, ``hf:ORG/NAME`` or ``timm:NAME``. Variant, number of
    classes, image size, LayerNorm epsilon, class names and preprocessing come from what lies beside the
    weights, and from tables of published models where nothing does; `Classifier.source` has notes on that.

    Args:
      source: see above.
      model: the variant, where nothing beside the weights tells it.
      num_classes: by default, the weights' own; for another number the head is drawn anew.
      image_size: side in pixels; by default, the weights' own.
      layer_norm_eps: by default, the weights' own.
      max_batch: images that are computed at once, at most.

    Raises:
      ValueError: as `shiftaddvit_jax.checkpoints.open_source`.
    """
    opened = open_source(
        source, model=model, num_classes=num_classes, image_size=image_size, layer_norm_eps=layer_norm_eps
    )
    return Classifier(opened, max_batch)


def image_files(folder: Path) -> list[Path]:
    """The image files in ``folder`` and the folders in it, by their suffixes, in the order of their names."""
    held = walk(Listing(folder), folder)
    return sorted(folder / f"{path}{name}" for path, inside in held for name in inside.images)


def softmax(logits: Float[np.ndarray, "batch classes"]) -> Float[np.ndarray, "batch classes"]:
    """Probabilities."""
    shifted = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return shifted / shifted.sum(axis=-1, keepdims=True)
