"""Weights and images that stand in for trained ones and photographs have the statistics that they claim."""

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import shiftaddvit_jax as sav
from shiftaddvit_jax.bench.synthetic import natural_images, trained_like_variables
from shiftaddvit_jax.models.inspect import capture
from shiftaddvit_jax.models.variables import variable_shapes
from shiftaddvit_jax.nn import Block

MODELS = {"deit_tiny": 64, "pvt_v2_b0": 64}


@pytest.fixture(scope="module", params=MODELS)
def made(request):
    name, attention = request.param, "msa" if request.param == "deit_tiny" else "sra"
    model = sav.create_model(name, image_size=MODELS[name], attention=attention, mlp="dense")
    return model, trained_like_variables(model, 0)


def flat(variables):
    return {
        name: np.asarray(leaf, np.float64)
        for name, leaf in flatten_dict(variables["params"], sep="/").items()
    }


def kurtosis(x):
    return np.mean((x - x.mean()) ** 4) / x.var() ** 2 - 3


def test_a_seed_gives_the_same_weights_and_another_others(made):
    model, variables = made
    again, other = flat(trained_like_variables(model, 0)), flat(trained_like_variables(model, 1))
    for name, leaf in flat(variables).items():
        np.testing.assert_array_equal(leaf, again[name])
        assert not np.array_equal(leaf, other[name]), name


def test_variables_are_the_model_s(made):
    model, variables = made
    shapes, found = (
        jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), tree)
        for tree in (variable_shapes(model), variables)
    )
    assert found == shapes


def test_kernels_have_heavy_tails_and_the_variance_of_their_inputs(made):
    model, variables = made
    blocks = 12 if model.variant == "deit_tiny" else 8
    kernels = {name: leaf for name, leaf in flat(variables).items() if name.endswith("mlp/fc2/kernel")}
    assert len(kernels) == blocks
    units = np.concatenate([(leaf * np.sqrt(len(leaf) * 2 * blocks)).ravel() for leaf in kernels.values()])
    assert units.var() == pytest.approx(1, rel=0.02)
    assert 3 < kurtosis(units) < 12  # 6 with endless samples; 0 of a normal distribution


def test_few_channels_are_outliers_and_the_same_in_all_blocks_of_a_width(made):
    scales = {name: leaf for name, leaf in flat(made[1]).items() if "/norm2/scale" in name}
    channels = {}
    for scale in scales.values():
        (large,) = np.nonzero(scale > 5)
        assert len(large) == max(1, round(0.005 * len(scale)))
        assert scale[large].max() < 60
        assert channels.setdefault(len(scale), large.tolist()) == large.tolist()


def test_most_outputs_have_small_weights_where_a_channel_is_an_outlier(made):
    params = flat(made[1])
    name = next(name for name in params if name.endswith("norm2/scale"))
    kernel = params[name.replace("norm2/scale", "mlp/fc1/kernel")]
    outlier = params[name].argmax()
    others = np.delete(kernel, outlier, axis=0)
    assert np.median(np.abs(kernel[outlier])) < np.median(np.abs(others)) / 5
    assert 0.02 < np.mean(np.abs(kernel[outlier]) > np.median(np.abs(others))) < 0.2


@pytest.fixture(scope="module")
def seen(made):
    def look(module, method, arguments, result):
        is_it = isinstance(module, Block) or module.path[-1:] in (("norm2",), ("head",))
        return result if is_it and method == "__call__" else None

    model, variables = made
    return capture(model, variables, natural_images(8, model.image_size, 0), look)


def test_logits_differ_between_images(seen):
    logits = np.asarray(seen["head"][-1])
    assert 1 < logits.std() < 5
    assert np.mean(logits.var(axis=0)) > 0.1 * np.mean(np.square(logits))


def test_activations_stay_bounded_and_have_outliers_where_they_are_read(seen):
    for name, (*_, tokens) in seen.items():
        if name == "head":
            continue
        tokens = np.asarray(tokens).reshape(-1, tokens.shape[-1])
        if name.endswith("norm2"):
            largest = np.abs(tokens).max(axis=0)
            assert largest.max() > 5 * np.median(largest), name
        else:
            assert 0.5 < tokens.std() < 3, name
            assert np.abs(tokens).max() < 30, name


def test_position_embeddings_are_smooth():
    model = sav.create_model("deit_tiny", attention="msa", mlp="dense")
    grid = flat(trained_like_variables(model, 0))["pos_embed"][1:].reshape(14, 14, -1)
    assert grid.std() == pytest.approx(0.1, rel=0.1)
    noise = np.random.default_rng(0).permutation(grid.reshape(196, -1)).reshape(grid.shape)
    step, random_step = (np.square(np.diff(each, axis=0)).mean() for each in (grid, noise))
    assert step < random_step / 5


def test_images_have_the_spectrum_of_photographs():
    images = natural_images(64, 64, 0)
    assert (images.shape, images.dtype) == ((64, 64, 64, 3), np.float32)
    assert np.abs(images.mean()) < 0.2
    assert images.std() == pytest.approx(1, abs=0.15)
    power = np.square(np.abs(np.fft.fft2(images, axes=(1, 2)))).mean(axis=(0, 3))
    frequencies = np.arange(2, 17)
    slope, _ = np.polyfit(np.log(frequencies), np.log(power[0, 2:17]), 1)
    assert slope == pytest.approx(-2, abs=0.3)
    red, green = images[..., 0].ravel(), images[..., 1].ravel()
    assert np.corrcoef(red, green)[0, 1] == pytest.approx(0.9, abs=0.05)


def test_images_are_those_of_their_seed():
    first, second = natural_images(3, 32, 5), natural_images(2, 32, 5)
    np.testing.assert_array_equal(first[:2], second)
    assert not np.array_equal(second, natural_images(2, 32, 6))
