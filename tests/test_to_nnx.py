"""A model as a module of Flax NNX computes what the model does."""

import doctest

import jax
import numpy as np
import pytest
from flax import nnx
from flax.traverse_util import flatten_dict
from tiny import make_images, make_tiny

import shiftaddvit_jax as sav
from shiftaddvit_jax.to_nnx import to_nnx

IMAGES = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)


def loss(logits):
    return (logits**2).sum()


@pytest.mark.parametrize(
    "kinds", [{"attention": "ecoformer", "mlp": "moe"}, {"attention": "performer"}], ids=str
)
def test_logits_gradients_and_variables_are_those_of_the_model(kinds):
    model, variables = make_tiny(**kinds)
    assert len(variables) == 2  # the parameters, and hashes or random features
    images = make_images()
    module = sav.to_nnx(model, variables)

    @jax.jit
    def expected(params):
        def apply(params):
            return model.apply({**variables, "params": params}, images)

        return apply(params), jax.grad(lambda params: loss(apply(params)))(params)

    @nnx.jit
    def run(module):
        return module(images), nnx.grad(lambda module: loss(module(images)))(module)

    (logits, gradient), (found, state) = expected(variables["params"]), run(module)
    np.testing.assert_allclose(found, logits, rtol=1e-6, atol=1e-6)
    state, wanted = (flatten_dict(tree, sep="/") for tree in (nnx.to_pure_dict(state), gradient))
    assert state.keys() == wanted.keys()
    for path, leaf in wanted.items():
        bound = 1e-6 * np.abs(leaf).max()
        np.testing.assert_allclose(state[path], leaf, rtol=1e-5, atol=bound, err_msg=path)

    held = flatten_dict(nnx.to_pure_dict(nnx.state(module)), sep="/")
    parts = [flatten_dict(tree, sep="/") for tree in variables.values()]
    assert held.keys() == parts[0].keys() | parts[1].keys()
    for path, leaf in (parts[0] | parts[1]).items():
        np.testing.assert_array_equal(held[path], leaf)


def test_features_are_the_models_and_training_draws_from_the_streams():
    model = sav.create_model("deit_tiny", num_classes=3, image_size=32, dropout=0.5)
    model = model.clone(embed_dim=16, depth=1, num_heads=2)
    variables = sav.init_variables(model, jax.random.key(0))
    module = sav.to_nnx(model, variables, nnx.Rngs(dropout=0))
    run = nnx.jit(lambda module: (module(IMAGES, train=True), module.features(IMAGES)[0]))
    (first, tokens), (second, _) = run(module), run(module)
    assert np.abs(first - second).max() > 0
    (expected,) = sav.features(model, variables, IMAGES)
    np.testing.assert_allclose(tokens, expected, rtol=1e-5, atol=1e-5)


def test_the_example_is_true():
    (example,) = doctest.DocTestFinder().find(to_nnx, "to_nnx", globs={})
    assert len(example.examples) > 5
    assert doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE).run(example).failed == 0
