import math

import numpy as np
import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax.analysis import attention_maps, routed_tokens, shift_weights
from shiftaddvit_jax.analysis.bench import random_variables
from shiftaddvit_jax.analysis.capture import capture, square_grid
from shiftaddvit_jax.nn.attention import Attention
from shiftaddvit_jax.train.evaluate import evaluation_step

ATTENTION = "stage1/block1/attn"


def make(**kinds):
    model = sav.create_model("pvt_v2_nano", num_classes=10, **kinds)
    return model, random_variables(model)


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(1).standard_normal((2, 32, 32, 3), np.float32)


def queries_and_keys(model, variables, images):
    """Of the first attention, as NumPy has them: [batch, heads, tokens, head_dim]."""

    def look(module, method, arguments, result):
        return arguments[0] if isinstance(module, Attention) and method == "__call__" else None

    (x,) = capture(model, variables, images, look)[ATTENTION]
    params = variables["params"]["stage1"]["block1"]["attn"]["qkv"]
    q, k, _ = np.split(np.asarray(x) @ params["kernel"] + params["bias"], 3, axis=-1)
    return q[:, None], k[:, None]  # the first stage has one head


def test_maps_of_softmax_attention_are_its_weights(images):
    model, variables = make(attention="msa")
    q, k = queries_and_keys(model, variables, images)
    scores = np.exp(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]))
    expected = scores / scores.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(attention_maps(model, variables, images)[ATTENTION], expected, rtol=1e-3)


def test_maps_in_hamming_space_count_the_bits_that_queries_and_keys_share(images):
    model, variables = make(attention="hamming_linear")
    q, k = queries_and_keys(model, variables, images)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    q, k = (x > x.mean(axis=(-1, -2), keepdims=True) for x in (q, k))
    weights = np.eye(64) / 2 + (q[..., :, None, :] & k[..., None, :, :]).sum(axis=-1) / math.pi
    expected = weights / weights.sum(axis=-1, keepdims=True)
    found = attention_maps(model, variables, images)[ATTENTION]
    # A value next to the threshold may be on either side of it.
    assert np.mean(~np.isclose(found, expected, rtol=1e-3)) < 0.02


@pytest.mark.parametrize("kind", ["sra", "hamming_quadratic", "hamming_ksh", "ecoformer", "linear"])
def test_rows_of_maps_sum_to_one(kind, images):
    maps = attention_maps(*make(attention=kind), images)
    if kind == "linear":
        assert ATTENTION not in maps  # its weights may be negative
        return
    assert maps[ATTENTION].shape == (2, 1, 64, 1 if kind == "sra" else 64)
    np.testing.assert_allclose(maps[ATTENTION].sum(axis=-1), 1, rtol=1e-5)
    assert maps[ATTENTION].min() >= 0


@pytest.mark.parametrize("packed", [False, True])
def test_routed_tokens_are_those_that_the_model_dispatches(packed, images):
    model, variables = make(attention="msa", mlp=("moe", "dense", "dense", "moe"))
    labels = np.zeros(2, np.int32)
    _, _, tokens = evaluation_step(model, variables, images, labels)
    routed = routed_tokens(model, sav.pack(model, variables) if packed else variables, images)
    assert routed.keys() == tokens.keys()
    for name, shifted in routed.items():
        np.testing.assert_array_equal([np.sum(~shifted), np.sum(shifted)], tokens[name])
    assert routed["stage1/block1/mlp/fc1"].shape == (2, 64)


def test_shift_weights_are_powers_of_two_beside_what_they_were():
    model, variables = make(attention="msa", mlp=("shift", "dense", "dense", "dense"))
    weights = shift_weights(model, variables)
    assert list(weights) == ["stage1/block1/mlp/fc1", "stage1/block1/mlp/fc2"]
    before, after = weights["stage1/block1/mlp/fc1"]
    np.testing.assert_array_equal(before, variables["params"]["stage1"]["block1"]["mlp"]["fc1"]["kernel"])
    np.testing.assert_array_equal(np.log2(np.abs(after)) % 1, 0)
    ratio = (after / before)[np.abs(before) > 2**-14]  # what is smaller becomes the smallest power
    assert 0.707 < ratio.min() < ratio.max() < 1.4143
    nothing, packed = shift_weights(model, sav.pack(model, variables))["stage1/block1/mlp/fc1"]
    assert nothing is None
    np.testing.assert_array_equal(packed, after)


@pytest.mark.parametrize(("tokens", "grid"), [(49, (0, 7)), (50, (1, 7)), (198, (2, 14)), (1, (0, 1))])
def test_the_grid_follows_class_and_distillation_tokens(tokens, grid):
    assert square_grid(tokens) == grid
