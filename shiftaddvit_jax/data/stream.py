"""Many images as inputs of a model, decoded in threads ahead of their use."""

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

from shiftaddvit_jax.data.preprocessing import preprocess
from shiftaddvit_jax.models.preprocessing import Preprocessing


class Prepared(NamedTuple):
    """An image as a model's input, or why there is none.

    Attributes:
      source: what was given.
      pixels: the input; None if the image can't be read.
      error: why, in one line; None if it can.
    """

    source: Any
    pixels: Float[np.ndarray, "size size 3"] | None
    error: str | None


def prepare(source: Any, preprocessing: Preprocessing) -> Prepared:
    """``source``, anything that `preprocess` takes, as a model's input."""
    try:
        return Prepared(source, preprocess(source, preprocessing), None)
    except ValueError as error:
        return Prepared(source, None, str(error))


def prepare_all(sources: Iterable[Any], preprocessing: Preprocessing, ahead: int) -> Iterator[Prepared]:
    """Each of ``sources`` in its order, prepared in threads, ``ahead`` images at most before it is needed."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: deque = deque()
        for source in sources:
            waiting.append(pool.submit(prepare, source, preprocessing))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
