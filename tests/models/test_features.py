"""Each stage's tokens, from which the logits come; `test_tvm.py` has those of kernels."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax.models.variables import variable_shapes

PYRAMID = {"embed_dims": (16, 16, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)} | {
    "mlp_ratios": (2, 2, 2, 2)
}
VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2}
SMALL = {"pvt_tiny": PYRAMID, "pvt_v2_b0": PYRAMID, "deit_tiny": VIT, "deit_tiny_distilled": VIT}


def small(name, num_classes=3, **arguments):
    return sav.create_model(name, num_classes=num_classes, image_size=32, **arguments).clone(**SMALL[name])


def random_variables(model, seed=0):
    """All random: no scale of a LayerNorm is 1 and no bias 0, as at the start."""
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda leaf: rng.normal(0.1, 0.2, leaf.shape).astype(np.float32), variable_shapes(model)
    )


def images(*sides, batch=2):
    return np.random.default_rng(1).normal(size=(batch, *sides, 3)).astype(np.float32)


@pytest.mark.parametrize("name", SMALL)
def test_logits_are_the_head_of_the_features(name):
    model = small(name, mlp="shift")
    variables = random_variables(model)
    x = images(32, 64)

    @jax.jit
    def run(variables, x):
        pooled = model.clone(num_classes=0).apply(headless(variables), x)
        return model.apply(variables, x), sav.features(model, variables, x), pooled

    logits, features, pooled = run(variables, x)
    params = variables["params"]
    if name == "pvt_v2_b0":
        np.testing.assert_allclose(pooled, np.mean(features[-1], axis=(1, 2)), atol=1e-5)
    heads = [params[head] for head in ("head", "head_dist") if head in params]
    if len(heads) == 1:
        expected = pooled @ heads[0]["kernel"] + heads[0]["bias"]
        np.testing.assert_allclose(logits, expected, rtol=1e-5, atol=1e-5)
    sides = [(2, 4)] if name.startswith("deit") else [(8, 16), (4, 8), (2, 4), (1, 2)]
    assert [tokens.shape for tokens in features] == [(2, *side, 16) for side in sides]


@pytest.mark.parametrize("name", SMALL)
def test_one_pass_gives_logits_heads_and_features(name):
    model = small(name)
    variables, x = random_variables(model), images(32, 32)

    @jax.jit
    def run(variables, x):
        found = model.apply(variables, x, method="outputs")
        return found, model.apply(variables, x), sav.features(model, variables, x)

    found, logits, features = run(variables, x)
    np.testing.assert_allclose(found.logits, logits, atol=1e-5)
    np.testing.assert_allclose(np.mean(found.heads, axis=0), logits, atol=1e-5)
    assert len(found.heads) == 1 + name.endswith("distilled")
    assert len(found.heads) == 1 or np.abs(found.heads[0] - found.heads[1]).max() > 0.01
    for mine, its in zip(found.features, features, strict=True):
        np.testing.assert_allclose(mine, its, atol=1e-5)


def headless(variables):
    params = {name: leaf for name, leaf in variables["params"].items() if not name.startswith("head")}
    return {**variables, "params": params}


@pytest.mark.parametrize("name", SMALL)
def test_features_of_no_images_and_in_bfloat16(name):
    model = small(name, dtype=jnp.bfloat16)
    variables = variable_shapes(model)
    found = jax.eval_shape(
        lambda variables: sav.features(model, variables, images(32, 32, batch=0)), variables
    )
    assert {(tokens.shape[0], tokens.dtype) for tokens in found} == {(0, jnp.dtype(jnp.bfloat16))}
