import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.ndimage import correlate
from scipy.special import erf

from shiftaddvit_jax.nn import LINEAR_KINDS, Block, DropPath, Mlp, Primitives, make_attention

GRID, CHANNELS, HIDDEN = (3, 5), 6, 10
RATIO = HIDDEN / CHANNELS
TOKENS = 15


def images(batch=2):
    return np.random.default_rng(1).normal(size=(batch, TOKENS, CHANNELS)).astype(np.float32)


def random_variables(layer):
    """The layer's parameters, all random: none is 0 or 1 as at the start."""
    shapes = jax.eval_shape(lambda key: layer.init(key, images(), GRID), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


def powers(kernel):
    return np.sign(kernel) * 2.0 ** np.clip(np.round(np.log2(np.abs(kernel.astype(np.float64)))), -14, 0)


def linear(x, params, kind):
    kernel = powers(params["kernel"]) if kind == "shift" else params["kernel"].astype(np.float64)
    return x @ kernel + params["bias"]


def mlp_reference(params, x, kind, depthwise):
    x = linear(x, params["fc1"], kind)
    if depthwise:
        image = x.reshape(-1, *GRID, HIDDEN)
        kernel = params["dwconv"]["kernel"].astype(np.float64)
        y = [
            [correlate(image[b, ..., c], kernel[..., c], mode="constant") for c in range(HIDDEN)]
            for b in range(len(x))
        ]
        x = np.moveaxis(y, 1, -1).reshape(x.shape) + params["dwconv"]["bias"]
    return linear(x * (1 + erf(x / np.sqrt(2))) / 2, params["fc2"], kind)


@pytest.mark.parametrize("kind", ["dense", "shift"])
@pytest.mark.parametrize("depthwise", [False, True])
def test_mlp_is_its_formula_in_float64(implementation, kind, depthwise):
    layer = Mlp(RATIO, kind, depthwise, primitives=Primitives(implementation=implementation))
    variables, x = random_variables(layer), images()
    y = jax.jit(lambda variables, x: layer.apply(variables, x, GRID))(variables, x)
    expected = mlp_reference(variables["params"], x, kind, depthwise)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_mlp_of_mixtures_reports_the_routing_of_both_layers():
    layer = Mlp(RATIO, "moe")
    variables = random_variables(layer)
    apply = jax.jit(lambda variables, x: layer.apply(variables, x, GRID, mutable=["routing"]))
    y, state = apply(variables, images())
    assert y.shape == (2, TOKENS, CHANNELS)
    assert {name: float(stats["tokens"].sum()) for name, stats in state["routing"].items()} == {
        "fc1": 2 * TOKENS,
        "fc2": 2 * TOKENS,
    }


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_mlp_gradients_are_finite_and_reach_every_parameter(kind):
    layer = Mlp(RATIO, kind, depthwise=True)
    variables = random_variables(layer)
    loss = lambda variables: jnp.sum(layer.apply(variables, images(), GRID) ** 2)  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(variables)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.all(np.isfinite(leaf)), path
        assert np.any(leaf != 0), path


def test_mlp_drops_out_in_training_alone():
    layer = Mlp(RATIO, dropout=0.5)
    variables = random_variables(layer)
    y = layer.apply(variables, images(), GRID, train=True, rngs={"dropout": jax.random.key(0)})
    assert 0.3 < np.mean(np.asarray(y) == 0) < 0.7
    still = layer.apply(variables, images(), GRID)
    expected = mlp_reference(variables["params"], images(), "dense", False)
    np.testing.assert_allclose(still, expected, rtol=1e-5, atol=1e-5)


def test_an_unknown_kind_of_mlp_names_the_nearest():
    with pytest.raises(ValueError, match="unknown kind of linear layer 'mae'; did you mean 'moe'"):
        Mlp(RATIO, "mae").init(jax.random.key(0), images(), GRID)


RATE, MANY = 0.25, 4000


def dropped(seed=0):
    x = np.random.default_rng(0).uniform(1, 2, (MANY, 2, 3)).astype(np.float32)
    return x, np.asarray(DropPath(RATE).apply({}, x, train=True, rngs={"dropout": jax.random.key(seed)}))


def test_drop_path_drops_or_scales_whole_images():
    x, y = dropped()
    kept = y[:, 0, 0] != 0
    np.testing.assert_array_equal(y[~kept], 0)
    np.testing.assert_allclose(y[kept], x[kept] / (1 - RATE), rtol=1e-6)


def test_drop_path_drops_at_its_rate_and_so_keeps_the_expectation():
    x, y = dropped()
    standard_error = np.sqrt(RATE * (1 - RATE) / MANY)
    assert abs(np.mean(y[:, 0, 0] == 0) - RATE) < 4 * standard_error
    np.testing.assert_allclose(y.mean(), x.mean(), rtol=5 * standard_error)


def test_drop_path_draws_anew_for_another_key():
    assert np.any((dropped(0)[1] == 0) != (dropped(1)[1] == 0))


@pytest.mark.parametrize(("rate", "train"), [(RATE, False), (0.0, True)], ids=["inference", "rate 0"])
def test_drop_path_is_the_identity_in_inference_and_at_rate_zero(rate, train):
    np.testing.assert_array_equal(DropPath(rate).apply({}, images(), train), images())


def layer_norm(x, params, eps):
    centred = x - x.mean(axis=-1, keepdims=True)
    scale = np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps)
    return centred / scale * params["scale"] + params["bias"]


@pytest.mark.parametrize("eps", [1e-6, 0.1])
def test_block_adds_attention_and_mlp_of_normalised_tokens_to_its_input(eps):
    block = Block(2, mlp_ratio=RATIO, depthwise=True, layer_norm_eps=eps)
    variables, x = random_variables(block), images()
    params = variables["params"]
    attended = layer_norm(x.astype(np.float64), params["norm1"], eps).astype(np.float32)
    hidden = x + make_attention("msa", num_heads=2).apply({"params": params["attn"]}, attended, GRID)
    normalised = layer_norm(np.asarray(hidden, np.float64), params["norm2"], eps)
    expected = hidden + mlp_reference(params["mlp"], normalised, "dense", True)
    np.testing.assert_allclose(block.apply(variables, x, GRID), expected, rtol=1e-5, atol=2e-5)


def test_block_in_training_keeps_whole_images_of_each_branch_or_drops_them():
    block = Block(2, drop_path=0.5)
    variables, x = random_variables(block), images(32)
    y = np.asarray(block.apply(variables, x, GRID, train=True, rngs={"dropout": jax.random.key(0)}))
    untouched = np.all(y == x, axis=(1, 2))
    assert 0 < untouched.sum() < 32
    assert not np.any((y == x).all(axis=-1)[~untouched])
