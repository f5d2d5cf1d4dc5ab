"""A classifier behind a queue: limits, threads, and what was counted."""

import asyncio
import io
import math
import os
import re
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from jaxtyping import Float, UInt8
from PIL import Image
from starlette.exceptions import HTTPException

from shiftaddvit_jax.classifier import Classifier
from shiftaddvit_jax.data.images import decode_file
from shiftaddvit_jax.data.preprocessing import crop
from shiftaddvit_jax.serve.batcher import Batcher, Compute
from shiftaddvit_jax.serve.bodies import File
from shiftaddvit_jax.serve.metrics import Metrics
from shiftaddvit_jax.serve.routing import Maps, RoutingMaps

SECONDS = (0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30)
Input = Float[np.ndarray, "size size 3"]


@dataclass(frozen=True)
class Settings:
    """How a server answers, and what it refuses, with which status.

    Attributes:
      name: the model's name in paths.
      max_batch: images that are computed at once, at most.
      max_wait_ms: how long an image waits for others, at most, while nothing is computed.
      queue: images that are read, decoded, waiting or computed, at most; 503.
      timeout: seconds from a whole request to its answer, at most; 503.
      body_timeout: seconds in which a request's body must come; 408.
      max_body: bytes of a body, at most; 413.
      max_pixels: pixels of an image, at most; 422.

    Raises:
      ValueError: a number out of range, or a name that fits no path.
    """

    name: str
    max_batch: int = 8
    max_wait_ms: float = 2
    queue: int = 64
    timeout: float = 30
    body_timeout: float = 10
    max_body: int = 32 * 2**20
    max_pixels: int = 20_000_000

    def __post_init__(self) -> None:
        """Check every field."""
        if not re.fullmatch(r"[\w.-]+", self.name, re.ASCII):
            raise ValueError(f"the name must be of letters, digits, '.', '_' and '-', got {self.name!r}")
        for name in ("max_batch", "queue", "max_body", "max_pixels"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("timeout", "body_timeout"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be above 0, got {getattr(self, name):g}")
        if not 0 <= self.max_wait_ms < math.inf:
            raise ValueError(f"max_wait_ms must be at least 0, got {self.max_wait_ms:g}")
        if self.queue < self.max_batch:
            raise ValueError(f"queue must be at least max_batch, {self.max_batch}, got {self.queue}")


class Service:
    """What the paths of a server have in common.

    Attributes:
      classifier: what answers.
      settings: how.
      metrics: what was counted.
    """

    def __init__(self, classifier: Classifier, settings: Settings) -> None:
        self.classifier, self.settings = classifier, settings
        sizes = [1 << power for power in range((settings.max_batch - 1).bit_length() + 1)]
        self.metrics = Metrics(
            {"requests_total": "Requests, by path and status.", "images_total": "Images computed."},
            {
                "request_seconds": ("Seconds from a request to the end of its answer, by path.", SECONDS),
                "batch_size": ("Images computed at once.", sizes),
            },
        )
        self._batcher = Batcher(settings.max_batch, settings.max_wait_ms / 1e3)
        self._routing = RoutingMaps(classifier.model, classifier.variables)
        self._pool = ThreadPoolExecutor(os.cpu_count(), thread_name_prefix="decode")
        self._held = 0

    def warm_up(self) -> None:
        """Compile what batches need, in the thread that computes them."""
        self._batcher.submit(self._warm_up, None).result()

    def close(self) -> None:
        """Compute what waits, and end the threads."""
        self._batcher.close(self.settings.timeout)
        self._pool.shutdown(wait=False, cancel_futures=True)

    @property
    def ready(self) -> bool:
        """Whether the thread that computes runs."""
        return self._batcher.alive

    def describe_metrics(self) -> str:
        """What was counted, in Prometheus's text format."""
        return self.metrics.render(
            {
                "queue_length": ("Images that wait to be computed.", self._batcher.waiting),
                "held_images": ("Images that are read, decoded, waiting or computed.", self._held),
            }
        )

    @contextmanager
    def hold(self, images: int) -> Generator[None]:
        """Places in the queue while the context lasts.

        Raises:
          HTTPException: 503, the queue is full.
        """
        if self._held + images > self.settings.queue:
            raise HTTPException(503, "the queue is full; try again", headers={"Retry-After": "1"})
        self._held += images
        try:
            yield
        finally:
            self._held -= images

    async def inputs(self, files: Sequence[File]) -> list[Input]:
        """Image files as the model takes them.

        Raises:
          HTTPException: 422, one of them can't be read.
        """
        return await asyncio.gather(*(self.beside(self._input, file) for file in files))

    async def logits(self, inputs: Sequence[Input]) -> Float[np.ndarray, "batch classes"]:
        """The logits of preprocessed images."""
        return np.stack(await self._computed(self._logits, inputs))

    async def routing(self, file: File) -> tuple[Maps, bytes]:
        """Where an image's tokens are sent, and a PNG of the square that the model sees.

        Raises:
          HTTPException: 422, the image can't be read.
        """
        inputs, square = await self.beside(self._input_and_square, file)
        await asyncio.to_thread(self._routing.prepare)  # elsewhere: it may take seconds, and others decode
        (maps,) = await self._computed(self._routing, [inputs])
        return maps, square

    async def beside(self, function: Callable[..., Any], *arguments: Any) -> Any:
        """What a function returns, called in a thread beside the one that computes."""
        return await asyncio.get_running_loop().run_in_executor(self._pool, partial(function, *arguments))

    async def _computed(self, function: Compute, rows):
        waiting = [asyncio.wrap_future(self._batcher.submit(function, row)) for row in rows]
        return await asyncio.gather(*waiting)

    def _warm_up(self, rows):
        self.classifier.warm_up(self.settings.max_batch)
        return rows

    def _logits(self, rows):
        self.metrics.observe("batch_size", len(rows))
        self.metrics.count("images_total", len(rows))
        return list(self.classifier.logits(np.stack(rows)))

    def _input(self, file: File) -> Input:
        return self.classifier.preprocess(self._decode(file))

    def _input_and_square(self, file):
        pixels, square = self._decode(file), io.BytesIO()
        Image.fromarray(crop(pixels, self.classifier.preprocessing)).save(square, "PNG")
        return self.classifier.preprocess(pixels), square.getvalue()

    def _decode(self, file: File) -> UInt8[np.ndarray, "height width 3"]:
        try:
            return decode_file(file.data, self.settings.max_pixels)
        except ValueError as error:
            raise HTTPException(422, f"{file.name}: {error}" if file.name else str(error)) from None
