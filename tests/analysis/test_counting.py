import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax.analysis import count_operations, weight_bytes


def shapes(model):
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    return jax.eval_shape(lambda: model.init(jax.random.key(0), images))


# Published by the paper's Table 1 and timm, in billions, with the original attention at 224 x 224.
@pytest.mark.parametrize(
    ("name", "billions"),
    [("pvt_v2_b0", 0.57), ("pvt_v2_b1", 2.12), ("pvt_v2_b2", 4.05), ("pvt_tiny", 1.93), ("deit_tiny", 1.26)],
)
def test_macs_are_the_published_ones(name, billions):
    model = sav.create_model(name)
    assert count_operations(model, shapes(model)).macs / 1e9 == pytest.approx(billions, rel=0.03)


class OneLayer(nn.Module):
    """A user's own model: one linear layer of the kind asked for, over all pixels."""

    kind: str
    image_size: int = 4
    primitives: sav.nn.Primitives = sav.nn.Primitives()

    @nn.compact
    def __call__(self, images, train=False):
        return sav.nn.make_linear(self.kind, 5, self.primitives, name="layer", train=train)(images)


@pytest.mark.parametrize(
    ("kind", "share", "macs", "shifts"),
    [
        ("dense", {}, 16 * 3 * 5, 0),
        ("shift", {}, 0, 16 * 3 * 5),
        # A quarter of the tokens on the shift expert; the router multiplies for all of them.
        ("moe", {"layer": 0.25}, 0.75 * 16 * 3 * 5 + 16 * 3 * 2, 0.25 * 16 * 3 * 5),
    ],
)
def test_counts_equal_hand_counts(kind, share, macs, shifts):
    model = OneLayer(kind)
    counts = count_operations(model, shapes(model), share)
    assert (counts.macs, counts.shifts, counts.adds) == (macs, shifts, 0)


def test_hamming_attention_adds_what_linear_attention_multiplies():
    counts = {}
    for attention in ("linear", "hamming_linear"):
        model = sav.create_model("pvt_v2_nano", num_classes=10, attention=attention)
        counts[attention] = count_operations(model, shapes(model))
    # k^T v and q (k^T v), at 64, 16 and 4 tokens with 1, 2 and 4 heads.
    products = 2 * (64 * 1 * 32**2 + 16 * 2 * 24**2 + 4 * 4 * 16**2)
    value_convolutions = 9 * (64 * 32 + 16 * 48 + 4 * 64)
    assert counts["hamming_linear"].adds == products
    difference = counts["linear"].macs - counts["hamming_linear"].macs
    assert difference == products - value_convolutions


def test_a_mixture_without_a_measured_share_is_refused():
    model = OneLayer("moe")
    with pytest.raises(ValueError, match="shift_share lacks the MoE layer layer"):
        count_operations(model, shapes(model))


@pytest.mark.parametrize(
    ("kind", "sizes"),
    [
        ("dense", {"layer": 4 * (15 + 5)}),
        ("shift", {"layer": 15 * 5 / 8 + 4 * 5}),
        (
            "moe",
            {
                "layer/dense": 4 * (15 + 5),
                "layer/shift": 15 * 5 / 8 + 4 * 5,
                "layer/router": 4 * (6 + 2),
            },
        ),
    ],
)
def test_packed_bytes_equal_hand_counts(kind, sizes):
    model = OneLayer(kind)
    assert weight_bytes(model, shapes(model)) == sizes
