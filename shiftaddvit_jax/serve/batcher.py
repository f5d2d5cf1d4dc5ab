"""One thread that computes, and the queue before it: rows that wait together are computed together."""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from functools import partial
from itertools import islice, takewhile
from typing import Any, NamedTuple

Compute = Callable[[Sequence[Any]], Sequence[Any]]


class _Waiting(NamedTuple):
    compute: Compute
    row: Any
    since: float
    future: Future


class Batcher:
    """A thread that computes rows in batches, in the order in which they came.

    A batch is taken once ``max_batch`` rows wait, or once the first of them has waited for ``max_wait``. All
    its rows are for the same function.
    """

    def __init__(self, max_batch: int, max_wait: float) -> None:
        """Start the thread.

        Args:
          max_batch: rows that are computed at once, at most.
          max_wait: seconds that a row waits for others, at most, while nothing is computed.
        """
        self._max_batch, self._max_wait = max_batch, max_wait
        self._queue: deque[_Waiting] = deque()
        self._changed = threading.Condition()
        self._closed = False
        # A daemon, so that a computation that never ends can't keep the process.
        self._thread = threading.Thread(target=self._run, name="compute", daemon=True)
        self._thread.start()

    @property
    def waiting(self) -> int:
        """Rows that wait for their batch."""
        return len(self._queue)

    @property
    def alive(self) -> bool:
        """Whether the thread runs."""
        return self._thread.is_alive()

    def submit(self, compute: Compute, row: Any) -> Future:
        """The future result for ``row``; ``compute`` takes the rows of a batch and returns a result for each.

        A future that is cancelled before its batch is taken is not computed.

        Raises:
          RuntimeError: the batcher was closed.
        """
        future: Future = Future()
        with self._changed:
            if self._closed:
                raise RuntimeError("the batcher is closed")
            self._queue.append(_Waiting(compute, row, time.monotonic(), future))
            self._changed.notify()
        return future

    def close(self, seconds: float) -> None:
        """Compute what waits, for so many seconds at most, and end the thread."""
        with self._changed:
            self._closed = True
            self._changed.notify()
        self._thread.join(seconds)

    def _run(self):
        while batch := self._take():
            wanted = [each for each in batch if each.future.set_running_or_notify_cancel()]
            if wanted:
                self._compute(wanted)

    def _take(self):
        """The next batch; empty at the end."""
        with self._changed:
            while not (self._queue or self._closed):
                self._changed.wait()
            while self._queue:
                first = self._queue[0]
                alike = takewhile(partial(_same, first), islice(self._queue, self._max_batch))
                rows = sum(1 for _ in alike)
                patience = first.since + self._max_wait - time.monotonic()
                if self._closed or rows == self._max_batch or patience <= 0:
                    return [self._queue.popleft() for _ in range(batch_rows(rows, self._max_batch))]
                self._changed.wait(patience)
            return []

    def _compute(self, batch):
        try:
            results = batch[0].compute([each.row for each in batch])
            for each, result in zip(batch, results, strict=True):
                each.future.set_result(result)
        except Exception as error:  # theirs to report who wait for the rows
            for each in batch:
                if not each.future.done():
                    each.future.set_exception(error)


def _same(first, other):
    return first.compute == other.compute


def batch_rows(waiting: int, max_batch: int) -> int:
    """How many of the waiting rows to take: ``max_batch``, or as many as need no padding, a power of two.

    Five rows take less time as four and one than as eight of which three are padding.
    """
    return max_batch if waiting >= max_batch else 1 << (waiting.bit_length() - 1)
