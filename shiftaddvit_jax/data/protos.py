"""Records of ``tf.train.Example``, read without TensorFlow.

Of the message (tensorflow/core/example/example.proto): a map from names to lists of bytes, floats, integers.
Floats are left out. The encoding: https://protobuf.dev/programming-guides/encoding
"""

from collections.abc import Iterator

VARINT, EIGHT_BYTES, LENGTH, FOUR_BYTES = 0, 1, 2, 5  # wire types
BYTES_LIST, INT64_LIST = 1, 3  # fields of a Feature


def read_example(record: bytes) -> dict[str, list]:
    """The features of an Example that are bytes or integers, by name.

    Raises:
      ValueError: a record that is none.
    """
    found: dict[str, list] = {}
    try:
        for features in _fields(memoryview(record), 1):
            for entry in _fields(features, 1):
                name, value = (next(_fields(entry, number), memoryview(b"")) for number in (1, 2))
                found[bytes(name).decode()] = [
                    *(bytes(each) for values in _fields(value, BYTES_LIST) for each in _fields(values, 1)),
                    *(each for values in _fields(value, INT64_LIST) for each in _integers(values)),
                ]
    except (IndexError, TypeError, UnicodeDecodeError):
        raise ValueError("the record is no tf.train.Example") from None
    return found


def _fields(message, number) -> Iterator:
    """The values of a message's field: numbers, or views of what has a length."""
    if not isinstance(message, memoryview):
        raise TypeError
    place = 0
    while place < len(message):
        tag, place = _varint(message, place)
        kind = tag & 7
        if kind == VARINT:
            value, place = _varint(message, place)
        elif kind == LENGTH:
            length, place = _varint(message, place)
            value, place = message[place : place + length], place + length
        elif kind in (EIGHT_BYTES, FOUR_BYTES):
            value, place = None, place + (8 if kind == EIGHT_BYTES else 4)
        else:
            raise TypeError
        if place > len(message):
            raise IndexError
        if tag >> 3 == number:
            yield value


def _integers(values) -> Iterator[int]:
    """An Int64List's numbers, packed or one by one."""
    for value in _fields(values, 1):
        if isinstance(value, int):
            yield _signed(value)
            continue
        place = 0
        while place < len(value):
            number, place = _varint(value, place)
            yield _signed(number)


def _varint(message, place):
    value = shift = 0
    while True:
        byte = message[place]
        value |= (byte & 127) << shift
        place, shift = place + 1, shift + 7
        if byte < 128:
            return value, place


def _signed(value):
    return value - (1 << 64) if value >> 63 else value
