import numpy as np

from shiftaddvit_jax.data import Examples

LABELS = np.arange(10) % 3


def test_a_part_in_even_steps_reaches_from_the_first_to_the_last():
    some = Examples(range(10), LABELS, lambda entry: np.full((1, 1, 3), entry, np.uint8)).evenly(4)
    assert [int(some[index]["image"][0, 0, 0]) for index in range(4)] == [0, 3, 6, 9]
    assert list(some.labels) == [0, 0, 0, 0]
    assert some.evenly(4) is some


def test_a_part_is_known_by_the_names_of_the_whole():
    names = [f"{index}.png".encode() for index in range(10)]
    assert Examples(range(10), LABELS, np.asarray, names).part([2, 7]).names == [b"2.png", b"7.png"]
    assert Examples(range(10), LABELS, np.asarray).part([2, 7]).part([1]).names == [b"7"]
