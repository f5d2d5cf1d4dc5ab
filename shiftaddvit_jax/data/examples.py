"""What a data set is: images with labels, in two disjoint parts."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from shiftaddvit_jax.data.images import Jpeg, Pixels, UnreadableImage, whole
from shiftaddvit_jax.data.listing import PackedNames


class Indexed(Protocol):
    """What has entries by their places, such as a list or an array."""

    def __len__(self) -> int:
        """Number of entries."""
        ...

    def __getitem__(self, index: int, /) -> Any:
        """One entry."""
        ...


@dataclass(frozen=True)
class Examples:
    """Images with labels, each read when it is asked for.

    Attributes:
      images: where the images are, one entry an image.
      labels: class of each image, from 0.
      read: from an entry of ``images`` to pixels, uint8 [height, width, 3], of any size, or to a `Jpeg` that
        has them; an `UnreadableImage` for one that can't be read.
      names: what each image is known by; None for its place.
    """

    images: Indexed
    labels: Sequence[int] | np.ndarray
    read: Callable[[Any], Pixels | Jpeg]
    names: Sequence[bytes] | PackedNames | None = None

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict:
        return {"image": whole(self.open(index)), "label": np.int32(self.labels[index])}

    def open(self, index: int) -> Pixels | Jpeg:
        """One image, a JPEG not decoded yet.

        Raises:
          UnreadableImage: it can't be read; of a JPEG, its header can't.
        """
        return self.read(self.images[index])

    def part(self, chosen: Sequence[int]) -> "Examples":
        """Some of them, by their places, known by the same names."""
        names = [str(index).encode() if self.names is None else self.names[index] for index in chosen]
        return Examples(chosen, [self.labels[index] for index in chosen], self.open, names)

    def evenly(self, count: int) -> "Examples":
        """``count`` of them, in even steps from the first to the last; all if there are no more."""
        if count >= len(self):
            return self
        return self.part(np.linspace(0, len(self) - 1, count).astype(int).tolist())

    def problem(self, index: int) -> str | None:
        """Why an image can't be read, in one line; None if it can."""
        try:
            whole(self.open(index))
        except UnreadableImage as error:
            return str(error)
        return None


@dataclass(frozen=True)
class Dataset:
    """Two fixed, disjoint sets of examples.

    Attributes:
      train: what models are trained on.
      test: what they are evaluated on, never trained on.
      class_names: name of each class.
    """

    train: Examples
    test: Examples
    class_names: tuple[str, ...]
