"""Many images as inputs of a model, decoded in threads ahead of their use."""

import os
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, NamedTuple, TypeVar

import numpy as np
from jaxtyping import Float

from shiftaddvit_jax.data.preprocessing import preprocess
from shiftaddvit_jax.models.preprocessing import Preprocessing

Item = TypeVar("Item")
Result = TypeVar("Result")


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
    return map_ahead(partial(prepare, preprocessing=preprocessing), sources, ahead)


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], ahead: int) -> Generator[Result]:
    """``function`` of each of ``items`` in order, in threads, ``ahead`` items at most before it is needed."""
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        waiting: deque = deque()
        for item in items:
            waiting.append(pool.submit(function, item))
            if len(waiting) > ahead:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
