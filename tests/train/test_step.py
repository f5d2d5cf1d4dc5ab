"""What one step does with a batch, on a model small enough to be followed by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from shiftaddvit_jax.models.outputs import Outputs
from shiftaddvit_jax.train import Mixing, default_config
from shiftaddvit_jax.train.devices import create_mesh
from shiftaddvit_jax.train.step import Recipe, initial_state, learning_rate, make_recipe, train_step

SGD = optax.sgd(0.5)
PLAIN = Mixing(mixup_alpha=0.0, cutmix_alpha=0.0, label_smoothing=0.0)


class Linear(nn.Module):
    """Logits from an image's mean colour."""

    num_classes: int = 4

    @nn.compact
    def __call__(self, images, train=False):
        return nn.Dense(self.num_classes, name="head")(images.mean((1, 2)))

    def outputs(self, images, train=False):
        logits = self(images, train)
        return Outputs(logits, (logits,), (images,))


MODEL = Linear()
BATCH = {
    "image": jax.random.normal(jax.random.key(0), (8, 6, 6, 3)),
    "label": jnp.arange(8, dtype=jnp.int32) % 4,
}


def variables(seed=1):
    return MODEL.init(jax.random.key(seed), BATCH["image"])


def take(recipe, steps=1, teacher=None, teacher_variables=None, mixed=True):
    """The state and the last metrics after some steps on the same batch."""
    state, key = initial_state(variables(), SGD, recipe), jax.random.key(7)
    for step in range(steps):
        fixed = (MODEL, SGD, recipe, create_mesh(), teacher, teacher_variables)
        state, metrics = train_step(*fixed, state, BATCH, key, np.int32(step), mixed)
    return state, metrics


def assert_close(found, expected, atol=1e-6):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=atol), found, expected)


def by_hand(params):
    """One step of plain gradient descent on the batch's cross-entropy, in NumPy."""
    colours = np.asarray(BATCH["image"]).mean((1, 2))
    logits = colours @ params["head"]["kernel"] + params["head"]["bias"]
    chances = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    difference = (chances - np.eye(4)[BATCH["label"]]) / len(colours)
    gradient = {"kernel": colours.T @ difference, "bias": difference.sum(0)}
    return {"head": {name: params["head"][name] - 0.5 * gradient[name] for name in gradient}}


def test_a_step_descends_the_gradient_of_the_cross_entropy():
    state, _ = take(Recipe(mixing=PLAIN))
    assert_close(state.params, by_hand(jax.tree.map(np.asarray, variables()["params"])))


@pytest.mark.parametrize("parts", [2, 8])
def test_parts_of_a_batch_one_after_another_make_the_same_step(parts):
    whole, whole_metrics = take(Recipe(mixing=PLAIN), steps=2)
    state, metrics = take(Recipe(mixing=PLAIN, accumulate=parts), steps=2)
    assert_close(state.params, whole.params)
    assert_close(metrics, whole_metrics)


def test_the_average_follows_the_parameters():
    recipe = Recipe(mixing=PLAIN, ema_decay=0.75)
    params, average = jax.tree.map(np.asarray, variables()["params"]), None
    for step in range(3):
        params = by_hand(params)
        kept = 0.75 if step else 0.0  # the first update copies
        average = jax.tree.map(
            lambda old, new, kept=kept: kept * old + (1 - kept) * new, average or params, params
        )
    state, _ = take(recipe, steps=3)
    assert_close(state.average, average)


def test_a_step_that_does_not_mix_is_one_without_mixing():
    mixing = Mixing(mixup_alpha=0.8, cutmix_alpha=1.0, label_smoothing=0.0)
    mixed, plain = (take(Recipe(mixing=mixing), mixed=mixed)[0].params for mixed in (True, False))
    assert_close(plain, take(Recipe(mixing=PLAIN))[0].params)
    assert np.abs(mixed["head"]["kernel"] - plain["head"]["kernel"]).max() > 1e-3


def test_a_teacher_has_its_weight_of_the_loss():
    teacher = {"teacher": MODEL, "teacher_variables": variables(9)}
    recipe = Recipe(mixing=PLAIN, distillation="soft", distillation_weight=0.25, temperature=2.0)
    _, metrics = take(recipe, **teacher)
    mine, its = (jax.jit(MODEL.apply)(v, BATCH["image"]) / 2.0 for v in (variables(), variables(9)))
    divergence = np.mean(
        np.sum(jax.nn.softmax(its) * (jax.nn.log_softmax(its) - jax.nn.log_softmax(mine)), 1)
    )
    np.testing.assert_allclose(metrics["distillation_loss"], 4 * divergence, rtol=1e-5)
    expected = 0.75 * metrics["task_loss"] + 0.25 * metrics["distillation_loss"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)


def test_a_config_becomes_a_recipe():
    config = default_config()
    config.train.update({"loss": "binary_cross_entropy", "loss_threshold": 0.2, "accumulate": 4})
    config.augment.update({"erase": 0.25, "erase_mode": "pixel"})
    config.mixing.update({"mixup_alpha": 0.8, "off_epoch": 3.0})
    config.distillation.update({"teacher": "runs/dense", "kind": "hard"})
    recipe = make_recipe(config)
    assert (recipe.loss, recipe.loss_threshold, recipe.accumulate) == ("binary_cross_entropy", 0.2, 4)
    assert (recipe.erasing.probability, recipe.erasing.mode) == (0.25, "pixel")
    assert (recipe.mixing.mixup_alpha, recipe.mixing.label_smoothing) == (0.8, 0.1)
    assert recipe.distillation == "hard"
    assert hash(recipe) == hash(make_recipe(config))
    assert make_recipe(default_config()).erasing is None


def test_rates_rise_fall_and_cool_down_in_proportion_to_the_batch():
    config = default_config()
    config.data.batch_size = 1024
    config.train.update(
        {
            "steps": 100,
            "learning_rate": 1e-3,
            "learning_rate_batch_size": 512,
            "learning_rate_scaling": "linear",
            "warmup_steps": 10,
            "warmup_learning_rate": 1e-4,
            "cooldown_steps": 20,
            "final_learning_rate": 1e-5,
        }
    )
    rate = learning_rate(config)
    expected = {0: 1e-4, 5: (1e-4 + 2e-3) / 2, 10: 2e-3, 45: (2e-3 + 1e-5) / 2, 80: 1e-5, 99: 1e-5}
    for step, value in expected.items():
        np.testing.assert_allclose(rate(jnp.int32(step)), value, rtol=1e-5)


def test_rates_change_by_the_epoch_where_the_config_says_so():
    config = default_config()
    config.train.update({"steps": 100, "warmup_steps": 0, "learning_rate_by": "epoch"})
    rate = learning_rate(config, steps_per_epoch=10)
    values = [float(rate(jnp.int32(step))) for step in range(20)]
    assert len(set(values[:10])) == 1
    assert values[10] < values[9]
