"""Parameters that CPU kernels take as one array."""

import math

import numpy as np
import pytest

from kernels_tvm.descriptions import (
    LANES,
    BinarySoftmaxDescription,
    HammingLinearDescription,
    HeadDescription,
    LinearDescription,
    MlpDescription,
    PatchEmbedDescription,
    joined,
)

MOE = LinearDescription("moe", 48, 80, 4, "int8")
DESCRIPTIONS = [
    MOE,
    HeadDescription(MOE, 35, 1e-6),
    MlpDescription(MOE, LinearDescription("moe", 80, 48, 4, "int8"), 1e-6, 35, (5, 7)),
    HammingLinearDescription(
        LinearDescription("dense", 48, 144), LinearDescription("shift", 48, 48), 3, 35, 1e-6, True
    ),
    BinarySoftmaxDescription(
        LinearDescription("dense", 48, 144), LinearDescription("shift", 48, 48), 3, 36, 1e-6, False, (5, 7)
    ),
    PatchEmbedDescription(LinearDescription("dense", 27, 48, precision="int8"), 9, 11, 3, 3, 2, 1e-5),
    LinearDescription("moe", 48, 80, 8, "int8", precision="int8"),
]


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=lambda description: type(description).__name__)
def test_what_is_joined_lies_side_by_side_in_whole_vectors(description):
    starts, size = joined(description)
    shapes = {name: shape for name, shape, _ in description.arguments()}
    places = np.zeros(size, int)
    for name, start in starts.items():
        assert start % LANES == 0
        places[start : start + math.prod(shapes[name])] += 1
    assert places.max() == 1
    assert size - places.sum() < LANES * len(starts)


@pytest.mark.parametrize("description", DESCRIPTIONS, ids=lambda description: type(description).__name__)
def test_weights_of_linear_layers_are_left_alone(description):
    separate = {name for name, _, _ in description.arguments()} - set(joined(description)[0])
    assert {name.split("_")[-1] for name in separate} <= {"blocks", "codes"}
    tiles = {name for name, shape, _ in description.arguments() if len(shape) == 3}
    assert separate >= tiles


@pytest.mark.parametrize("shape", [(7,), (3, 5), (2, 3, 4)])
def test_a_view_reads_its_part_of_the_whole(shape):
    pytest.importorskip("tvm")
    from kernels_tvm.emit import View

    whole = np.arange(100)
    expected = whole[13 : 13 + math.prod(shape)].reshape(shape)
    view = View(whole, 13, shape)
    assert all(view[index] == number for index, number in np.ndenumerate(expected))
    assert np.array_equal(view[(*[0] * (len(shape) - 1), np.arange(3))], expected.ravel()[:3])
