"""Compared with torch 2.13's AdamW and SGD, and with timm 1.0.31's Lamb, Lion, schedule, layers and EMA."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiftaddvit_jax.models import create_model
from shiftaddvit_jax.models.variables import variable_shapes
from shiftaddvit_jax.train.ema import ema_decay, update_ema
from shiftaddvit_jax.train.optimizers import (
    create_optimizer,
    decayed,
    layer_ids,
    learning_rate_factors,
)
from shiftaddvit_jax.train.schedules import cosine_schedule, scaled_learning_rate

# A layer of tanh and a linear one, ten batches, and what timm's create_optimizer_v2 (weight_decay=0.05),
# create_scheduler_v2 (8 updates, 3 of them warm-up, 2 of cool-down) and ModelEmaV3 (decay 0.75, with warm-up)
# made of them.
with np.load(Path(__file__).parents[1] / "data" / "timm_optimizers.npz") as arrays:
    TIMM = dict(arrays)


def tree(prefix):
    return {
        layer: {name: jnp.asarray(TIMM[f"{prefix}/{layer}/{name}"]) for name in ("kernel", "bias")}
        for layer in ("hidden", "head")
    }


def loss(params, inputs, targets):
    hidden = jnp.tanh(inputs @ params["hidden"]["kernel"] + params["hidden"]["bias"])
    return jnp.mean((hidden @ params["head"]["kernel"] + params["head"]["bias"] - targets) ** 2)


def first_update(optimizer, gradients, params):
    return jax.jit(lambda *given: optimizer.update(given[0], optimizer.init(given[1]), given[1])[0])(
        gradients, params
    )


def names_and_leaves(values):
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in jax.tree.leaves_with_path(values)
    }


@pytest.mark.parametrize(
    ("name", "peak", "clip"),
    [("adamw", 0.02, 0.5), ("lamb", 0.02, 1.0), ("lion", 0.005, 0.0), ("sgd", 0.1, 0.0)],
)
def test_ten_steps_are_timms(name, peak, clip):
    schedule = cosine_schedule(peak, steps=8, warmup_steps=3, start=1e-3, end=1e-3)
    np.testing.assert_allclose([schedule(step) for step in range(10)], TIMM[f"{name}/rates"], rtol=1e-5)
    optimizer = create_optimizer(name, schedule, weight_decay=0.05, clip=clip)

    @jax.jit
    def step(params, state, average, updates, inputs, targets):
        gradients = jax.grad(loss)(params, inputs, targets)
        changes, state = optimizer.update(gradients, state, params)
        params = optax.apply_updates(params, changes)
        average = update_ema(average, params, ema_decay(updates, 0.75, warmup=True))
        return params, state, average

    params = average = tree("start")
    state = optimizer.init(params)
    for number, (inputs, targets) in enumerate(zip(TIMM["inputs"], TIMM["targets"], strict=True), 1):
        params, state, average = step(params, state, average, number, inputs, targets)
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, atol=1e-5), params, tree(f"{name}/end"))
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, atol=1e-5), average, tree(f"{name}/average"))


def test_muon_orthogonalizes_inner_matrices_and_leaves_the_rest_to_adam():
    rng = np.random.default_rng(0)
    kernel = rng.standard_normal((6, 4)).astype(np.float32)
    params = {"block1": {"kernel": kernel, "bias": np.ones(4, np.float32)}, "pos_embed": kernel}
    params["head"] = {"kernel": kernel}
    optimizer = create_optimizer("muon", 0.1, weight_decay=0.5)
    found = first_update(optimizer, params, params)

    # On singular values, the quintic iteration of five steps acts one by one.
    left, values, right = np.linalg.svd(kernel.astype(np.float64), full_matrices=False)
    values /= np.linalg.norm(values)
    for _ in range(5):
        values = 3.4445 * values - 4.775 * values**3 + 2.0315 * values**5
    direction = 0.2 * np.sqrt(6) * (left * values) @ right
    np.testing.assert_allclose(found["block1"]["kernel"], -0.1 * (direction + 0.5 * kernel), atol=1e-4)
    # Adam's first step has the gradient's sign.
    np.testing.assert_allclose(found["head"]["kernel"], -0.1 * (np.sign(kernel) + 0.5 * kernel), atol=1e-5)
    np.testing.assert_allclose(found["pos_embed"], -0.1 * np.sign(kernel), atol=1e-5)
    np.testing.assert_allclose(found["block1"]["bias"], -0.1, atol=1e-5)


def test_lamb_without_decay_is_adam():
    params = tree("start")
    optimizers = [create_optimizer(name, 0.1, options={"eps": 1e-6}) for name in ("lamb", "adamw")]
    updates = [first_update(optimizer, params, params) for optimizer in optimizers]
    jax.tree.map(np.testing.assert_array_equal, *updates)


@pytest.mark.parametrize(
    ("variant", "expected"),
    [
        (
            "pvt_v2_b0",
            {
                "stage1/patch_embed/proj/kernel": 0,
                "stage1/patch_embed/norm/bias": 0,
                "stage1/block1/norm1/bias": 1,
                "stage1/norm/scale": 1,
                "stage2/patch_embed/proj/bias": 2,
                "stage3/block2/attn/kv/kernel": 3,
                "stage4/patch_embed/norm/bias": 4,
                "stage4/norm/bias": 4,
                "head/kernel": 5,
            },
        ),
        (
            "deit_tiny_distilled",
            {
                "cls_token": 0,
                "dist_token": 0,
                "pos_embed": 0,
                "patch_embed/kernel": 0,
                **{f"block{number}/mlp/fc1/kernel": number for number in range(1, 13)},
                "norm/scale": 12,
                "head/kernel": 13,
                "head_dist/bias": 13,
            },
        ),
        # timm has no PVT; the same by analogy.
        (
            "pvt_tiny",
            {
                "stage1/pos_embed": 0,
                "stage1/patch_embed/proj/kernel": 0,
                "stage2/pos_embed": 2,
                "stage4/cls_token": 4,
                "norm/bias": 4,
                "head/kernel": 5,
            },
        ),
    ],
)
def test_layers_are_counted_as_timm_does(variant, expected):
    # From group_parameters(model, model.group_matcher(), reverse=True) of timm 1.0.31.
    params = variable_shapes(create_model(variant))["params"]
    found = names_and_leaves(layer_ids(params))
    assert {name: found[name] for name in expected} == expected
    last = max(expected.values())
    assert set(found.values()) == set(range(last + 1))
    factors = names_and_leaves(learning_rate_factors(params, layer_decay=0.75, rates={"*/bias": 2.0}))
    for name, layer in expected.items():
        own = 2.0 if name.endswith("/bias") else 1.0
        assert factors[name] == pytest.approx(own * 0.75 ** (last - layer))


def test_norms_biases_embeddings_and_tokens_do_not_decay():
    params = variable_shapes(create_model("deit_tiny_distilled", attention="binary_softmax"))["params"]
    decays = names_and_leaves(decayed(params))
    for name, decay in decays.items():
        assert decay == name.endswith("kernel"), name


def test_frozen_parameters_stay_and_have_no_part_in_the_norm():
    params = {"block1": {"kernel": jnp.ones((2, 2))}, "head": {"kernel": jnp.ones((2, 2))}}
    gradients = {"block1": {"kernel": jnp.full((2, 2), 100.0)}, "head": {"kernel": jnp.full((2, 2), 2.0)}}
    optimizer = create_optimizer("sgd", 0.1, clip=1.0, frozen=["block*"], rates={"head/*": 10.0})
    state = optimizer.init(params)
    updates, _ = jax.jit(optimizer.update)(gradients, state, params)
    assert not updates["block1"]["kernel"].any()
    # A gradient of norm 4, clipped to 1; Nesterov's first step is 1.9 of it.
    np.testing.assert_allclose(updates["head"]["kernel"], -0.1 * 10 * 1.9 * 0.5, rtol=1e-5)
    assert sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim) == 4


def test_layers_decay_with_the_learning_rate():
    params = {f"block{number}": {"kernel": jnp.ones((2, 2))} for number in (1, 2)} | {
        "head": {"kernel": jnp.ones((2, 2))}
    }
    optimizer = create_optimizer("adamw", 0.1, weight_decay=0.5, layer_decay=0.5)
    zeros = jax.tree.map(jnp.zeros_like, params)
    updates = first_update(optimizer, zeros, params)
    for name, factor in (("block1", 0.25), ("block2", 0.5), ("head", 1.0)):
        np.testing.assert_allclose(updates[name]["kernel"], -0.1 * 0.5 * factor, rtol=1e-6)


def test_values_are_clipped_one_by_one():
    params = {"head": {"kernel": jnp.zeros((1, 2))}}
    gradients = {"head": {"kernel": jnp.array([[-3.0, 0.1]])}}
    optimizer = create_optimizer("sgd", 1.0, clip=0.5, clip_mode="value", options={"momentum": 0.0})
    updates = first_update(optimizer, gradients, params)
    np.testing.assert_allclose(updates["head"]["kernel"], [[0.5, -0.1]], rtol=1e-6)


def test_accumulated_gradients_are_one_step_of_their_mean():
    params = tree("start")
    gradient_of = jax.jit(jax.grad(loss))
    gradients = [gradient_of(params, TIMM["inputs"][i], TIMM["targets"][i]) for i in range(3)]
    schedule = cosine_schedule(0.1, steps=4, warmup_steps=2, start=0.01)
    settings = {"weight_decay": 0.05, "clip": 0.5}
    several = create_optimizer("adamw", schedule, **settings, accumulate=3)
    once = create_optimizer("adamw", schedule, **settings)
    mean = jax.tree.map(lambda *leaves: sum(leaves) / 3, *gradients)
    expected = first_update(once, mean, params)
    state, update = several.init(params), jax.jit(several.update)
    for number, gradient in enumerate(gradients):
        changes, state = update(gradient, state, params)
        if number < 2:
            assert not any(leaf.any() for leaf in jax.tree.leaves(changes))
    jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, atol=1e-6), changes, expected)


def test_equal_settings_are_one_compiled_step():
    def optimizer(peak=0.1):
        schedule = cosine_schedule(peak, steps=4, warmup_steps=2)
        patterns = {"rates": {"head/*": 2.0}, "frozen": ["hidden/*"]}
        return create_optimizer("adamw", schedule, clip=1.0, options={"b2": 0.95}, **patterns)

    params = tree("start")
    step = jax.jit(lambda optimizer, params: optimizer.init(params), static_argnums=0)
    for given in (optimizer(), optimizer(), optimizer(peak=0.2)):
        step(given, params)
    assert step._cache_size() == 2


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "adam"}, "did you mean 'adamw'"),
        ({"clip_mode": "norms"}, "did you mean 'norm'"),
        ({"clip": -1.0}, "clip must be at least 0"),
        ({"layer_decay": 0.0}, "layer_decay must be above 0"),
        ({"accumulate": 0}, "accumulate must be at least 1"),
        ({"options": {"beta": 0.9}}, "options of adamw: .*beta"),
    ],
)
def test_wrong_settings_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        create_optimizer(**{"name": "adamw", "learning_rate": 0.1, **change})


@pytest.mark.parametrize("change", [{"frozen": ["stage9/*"]}, {"rates": {"stage9/*": 2.0}}])
def test_a_pattern_that_names_nothing_is_refused(change):
    with pytest.raises(ValueError, match=r"no parameter's name matches 'stage9/\*'; names are like"):
        create_optimizer("adamw", 0.1, **change).init(tree("start"))


@pytest.mark.parametrize(
    ("first", "expected"),
    [  # create_scheduler_v2(num_epochs=5, warmup_epochs=2, warmup_lr=0.1, min_lr=0.05, cooldown_epochs=1)
        (False, [0.1, 0.3, 0.34452882373436317, 0.20547117626563688, 0.09297117626563686, 0.05]),
        (
            True,
            [
                *(0.1, 0.3, 0.5, 0.45702882373436315, 0.34452882373436317),
                *(0.20547117626563688, 0.09297117626563686, 0.05),
            ],
        ),
    ],
)
def test_the_rate_changes_by_epoch_as_timms(first, expected):
    schedule = cosine_schedule(
        0.5, steps=50, warmup_steps=20, start=0.1, end=0.05, warmup_first=first, steps_per_epoch=10
    )
    found = jax.vmap(schedule)(jnp.arange(10 * len(expected)))
    np.testing.assert_allclose(found, np.repeat(expected, 10), rtol=1e-5)


@pytest.mark.parametrize("change", [{"steps": 0}, {"steps_per_epoch": 0}, {"warmup_steps": 11}])
def test_a_schedule_that_cannot_be_is_refused(change):
    with pytest.raises(ValueError, match="must be"):
        cosine_schedule(0.1, **{"steps": 10, **change})


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [("adamw", 2e-3), ("lamb", 2e-3), ("sgd", 4e-3), ("lion", 4e-3), ("muon", 4e-3)],
)
def test_the_learning_rate_grows_with_the_batch(optimizer, expected):
    assert scaled_learning_rate(1e-3, 1024, optimizer) == pytest.approx(expected)


def test_the_averages_decay_is_timms():
    # ModelEmaV3(decay=0.9, use_warmup=True).get_decay
    found = [float(ema_decay(update, 0.9, warmup=True)) for update in (1, 2, 3, 10, 100)]
    expected = [0.0, 0.3700394750525634, 0.5192501432308638, 0.7845565309968117, 0.9]
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    assert [float(ema_decay(update, 0.5)) for update in (1, 2)] == [0.0, 0.5]
