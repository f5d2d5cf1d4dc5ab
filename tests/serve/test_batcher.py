"""Batches: which rows are computed together, in which order, and what becomes of errors."""

import threading
import time

import pytest

from shiftaddvit_jax.serve.batcher import Batcher, batch_rows


class Doubled:
    """Twice the rows; keeps the batches, and waits for a gate before the first."""

    def __init__(self):
        self.batches, self.gate = [], threading.Event()

    def __call__(self, rows):
        self.batches.append(list(rows))
        assert self.gate.wait(10)
        return [2 * row for row in rows]


@pytest.fixture
def doubled():
    return Doubled()


@pytest.fixture
def batcher(doubled):
    batcher = Batcher(max_batch=4, max_wait=0.01)
    yield batcher
    doubled.gate.set()
    batcher.close(10)
    assert not batcher.alive


def begin(batcher, doubled):
    """Occupy the thread, so that what follows waits."""
    first = batcher.submit(doubled, 0)
    while not doubled.batches:
        time.sleep(0.001)
    return first


def test_rows_that_wait_together_are_computed_together(batcher, doubled):
    futures = [begin(batcher, doubled), *(batcher.submit(doubled, row) for row in range(1, 9))]
    assert batcher.waiting == 8
    doubled.gate.set()
    assert [future.result(10) for future in futures] == [2 * row for row in range(9)]
    assert doubled.batches == [[0], [1, 2, 3, 4], [5, 6, 7, 8]]


def test_a_batch_needs_no_padding(batcher, doubled):
    futures = [begin(batcher, doubled), *(batcher.submit(doubled, row) for row in (1, 2, 3))]
    doubled.gate.set()
    assert [future.result(10) for future in futures] == [0, 2, 4, 6]
    assert doubled.batches == [[0], [1, 2], [3]]


@pytest.mark.parametrize(
    ("waiting", "max_batch", "rows"),
    [(1, 8, 1), (3, 8, 2), (7, 8, 4), (8, 8, 8), (5, 6, 4), (9, 6, 6), (3, 1, 1)],
)
def test_the_rows_of_a_batch(waiting, max_batch, rows):
    assert batch_rows(waiting, max_batch) == rows


def test_a_row_alone_waits_no_longer_than_it_must(doubled):
    doubled.gate.set()
    batcher = Batcher(max_batch=4, max_wait=0.2)
    begun = time.monotonic()
    assert batcher.submit(doubled, 1).result(10) == 2
    assert time.monotonic() - begun >= 0.2
    batcher.close(10)


def test_a_full_batch_does_not_wait(doubled):
    doubled.gate.set()
    batcher = Batcher(max_batch=2, max_wait=60)
    assert [future.result(10) for future in [batcher.submit(doubled, row) for row in (1, 2)]] == [2, 4]
    batcher.close(10)


def test_rows_of_other_functions_are_in_other_batches(batcher, doubled):
    def negated(rows):
        return [-row for row in rows]

    begin(batcher, doubled)
    futures = [batcher.submit(function, row) for row, function in enumerate([doubled, negated, negated], 1)]
    doubled.gate.set()
    assert [future.result(10) for future in futures] == [2, -2, -3]


def test_an_error_reaches_those_of_its_batch_alone(batcher, doubled):
    def fail(rows):
        raise ArithmeticError(f"not {rows}")

    begin(batcher, doubled)
    failing, good = batcher.submit(fail, 1), batcher.submit(doubled, 2)
    doubled.gate.set()
    with pytest.raises(ArithmeticError, match=r"not \[1\]"):
        failing.result(10)
    assert good.result(10) == 4


def test_what_is_cancelled_is_not_computed(batcher, doubled):
    begin(batcher, doubled)
    given_up, other = batcher.submit(doubled, 1), batcher.submit(doubled, 2)
    assert given_up.cancel()
    doubled.gate.set()
    assert other.result(10) == 4
    assert doubled.batches == [[0], [2]]


def test_what_waits_at_the_end_is_computed(doubled):
    batcher = Batcher(max_batch=4, max_wait=60)
    futures = [batcher.submit(doubled, row) for row in (1, 2, 3)]
    doubled.gate.set()
    batcher.close(10)
    assert [future.result(0) for future in futures] == [2, 4, 6]
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(doubled, 4)
