import math

import jax
import numpy as np
import pytest
from tiny import CHANNELS, HEADS, make_images, make_tiny

import shiftaddvit_jax as sav
from shiftaddvit_jax.models.inspect import capture, square_grid
from shiftaddvit_jax.nn import Primitives
from shiftaddvit_jax.nn.attention import Attention
from shiftaddvit_jax.ops import rotate
from shiftaddvit_jax.pictures import attention_maps, routed_tokens, shift_weights

ATTENTION, LAYERS = "block1/attn", ["block1/mlp/fc1", "block1/mlp/fc2"]


def queries_and_keys(model, variables, images):
    """As NumPy has them, [batch, heads, tokens, head_dim]."""

    def look(module, method, arguments, result):
        return arguments[0] if isinstance(module, Attention) and method == "__call__" else None

    (x,) = capture(model, variables, images, look)[ATTENTION]
    params = variables["params"]["block1"]["attn"]["qkv"]
    qkv = np.asarray(x) @ params["kernel"] + params["bias"]
    q, k, _ = qkv.reshape(*x.shape[:2], 3, HEADS, CHANNELS // HEADS).transpose(2, 0, 3, 1, 4)
    return q, k


def test_maps_of_softmax_attention_are_its_weights():
    model, variables = make_tiny(attention="msa")
    q, k = queries_and_keys(model, variables, make_images())
    scores = np.exp(q @ k.swapaxes(-1, -2) / math.sqrt(q.shape[-1]))
    expected = scores / scores.sum(axis=-1, keepdims=True)
    np.testing.assert_allclose(
        attention_maps(model, variables, make_images())[ATTENTION], expected, rtol=1e-4
    )


def test_maps_in_hamming_space_count_the_bits_that_queries_and_keys_share():
    model, variables = make_tiny(attention="hamming_linear")
    q, k = queries_and_keys(model, variables, make_images())
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in (q, k))
    q, k = (x > x.mean(axis=(-1, -2), keepdims=True) for x in (q, k))
    weights = np.eye(64) / 2 + (q[..., :, None, :] & k[..., None, :, :]).sum(axis=-1) / math.pi
    expected = weights / weights.sum(axis=-1, keepdims=True)
    found = attention_maps(model, variables, make_images())[ATTENTION]
    # A number next to the threshold may be on either side of it.
    assert np.mean(~np.isclose(found, expected, rtol=1e-3)) < 0.02


@pytest.mark.parametrize(
    "kind", ["sra", "linear_sra", "hamming_quadratic", "binary_softmax", "hamming_ksh", "ecoformer"]
)
def test_rows_of_maps_sum_to_one(kind):
    (found,) = attention_maps(*make_tiny(attention=kind), make_images()).values()
    # "sra" reduces 8 x 8 tokens to 4 x 4, "linear_sra" to 7 x 7.
    assert found.shape == (2, HEADS, 64, {"sra": 16, "linear_sra": 49}.get(kind, 64))
    np.testing.assert_allclose(found.sum(axis=-1), 1, rtol=1e-5)
    assert found.min() >= 0


def test_maps_of_rotated_codes_are_of_what_is_binarized():
    model, variables = make_tiny(attention="hamming_quadratic", primitives=Primitives(rotation="hadamard_2x"))
    signs = variables["rotation"]["block1"]["attn"]["signs"]
    q, k = (np.asarray(rotate(x, signs)) for x in queries_and_keys(model, variables, make_images()))
    q, k = (np.where(x > x.mean(axis=(-1, -2), keepdims=True), 1, -1) for x in (q, k))
    scores = np.einsum("bhnd,bhmd->bhnm", q, k) / 2 / math.sqrt(CHANNELS // HEADS)
    weights = np.exp(scores)
    found = attention_maps(model, variables, make_images())[ATTENTION]
    assert np.mean(~np.isclose(found, weights / weights.sum(axis=-1, keepdims=True), rtol=1e-3)) < 0.02


@pytest.mark.parametrize("kind", ["linear", "performer"])
def test_attention_without_weights_of_its_own_has_no_map(kind):
    assert attention_maps(*make_tiny(attention=kind), make_images()) == {}


@pytest.mark.parametrize("packed", [False, True])
def test_routed_tokens_are_those_that_the_model_dispatches(packed):
    model, variables = make_tiny(mlp="moe")
    _, state = jax.jit(lambda x: model.apply(variables, x, mutable=["routing"]))(make_images())
    routed = routed_tokens(model, sav.pack(model, variables) if packed else variables, make_images())
    assert list(routed) == LAYERS
    for name, shifted in routed.items():
        assert shifted.shape == (2, 64)
        tokens = state["routing"]["block1"]["mlp"][name[-3:]]["tokens"]
        np.testing.assert_array_equal([np.sum(~shifted), np.sum(shifted)], tokens)


def test_shift_weights_are_powers_of_two_beside_what_they_were():
    model, variables = make_tiny(mlp="shift")
    weights = shift_weights(model, variables)
    assert list(weights) == LAYERS
    before, after = weights[LAYERS[0]]
    np.testing.assert_array_equal(before, variables["params"]["block1"]["mlp"]["fc1"]["kernel"])
    np.testing.assert_array_equal(np.log2(np.abs(after)) % 1, 0)
    ratio = (after / before)[np.abs(before) > 2**-14]  # what is smaller becomes the smallest power
    assert 0.707 < ratio.min() < ratio.max() < 1.4143
    nothing, packed = shift_weights(model, sav.pack(model, variables))[LAYERS[0]]
    assert nothing is None
    np.testing.assert_array_equal(packed, after)


@pytest.mark.parametrize(("tokens", "grid"), [(49, (0, 7)), (50, (1, 7)), (198, (2, 14)), (1, (0, 1))])
def test_the_grid_follows_class_and_distillation_tokens(tokens, grid):
    assert square_grid(tokens) == grid
