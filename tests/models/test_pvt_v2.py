import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import shiftaddvit_jax as sav
from shiftaddvit_jax.models import model_arguments
from shiftaddvit_jax.nn import ATTENTION_KINDS

KEY = jax.random.key(0)


def shapes(model):
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    return jax.eval_shape(lambda: model.init(KEY, images))


# Table 1 of arXiv 2106.13797, in millions.
@pytest.mark.parametrize(
    ("name", "millions"),
    [("b0", 3.67), ("b1", 14.0), ("b2", 25.4), ("b3", 45.2), ("b4", 62.6), ("b5", 82.0)],
)
def test_parameter_count_is_the_published_one(name, millions):
    count = sum(leaf.size for leaf in jax.tree.leaves(shapes(sav.create_model(f"pvt_v2_{name}"))))
    assert count / 1e6 == pytest.approx(millions, abs=0.06)


@pytest.fixture(scope="module")
def images():
    return jax.random.normal(jax.random.key(1), (8, 32, 32, 3))


@pytest.mark.parametrize("attention", ATTENTION_KINDS)
def test_a_batch_gives_the_logits_of_its_images_one_by_one(attention, images):
    model = sav.create_model("pvt_v2_nano", num_classes=10, attention=attention, mlp="moe", projections="moe")
    variables = sav.init_variables(model, KEY)
    apply = jax.jit(model.apply)
    single = jnp.concatenate([apply(variables, image[None]) for image in images])
    np.testing.assert_allclose(apply(variables, images), single, atol=1e-5)


def test_the_tensor_threshold_lets_the_images_of_a_batch_influence_each_other(images):
    model = sav.create_model("pvt_v2_nano", num_classes=10, attention="hamming_linear", threshold="tensor")
    variables = sav.init_variables(model, KEY)
    apply = jax.jit(model.apply)
    difference = apply(variables, images)[0] - apply(variables, images[:1])[0]
    assert np.abs(difference).max() > 1e-5


def test_the_last_stage_keeps_softmax_attention_unless_asked():
    assert sav.create_model("pvt_v2_nano", attention="hamming_linear").attention == (
        "hamming_linear",
        "hamming_linear",
        "hamming_linear",
        "msa",
    )
    kinds = ("msa", "sra", "linear", "hamming_quadratic")
    assert sav.create_model("pvt_v2_nano", attention=kinds).attention == kinds


@pytest.mark.parametrize("size", [(33, 47), (64, 32)])
def test_other_image_sizes_work(size):
    model = sav.create_model("pvt_v2_nano", num_classes=3, attention="hamming_linear")
    logits = jax.jit(model.apply)(sav.init_variables(model, KEY), jnp.ones((1, *size, 3)))
    assert np.isfinite(logits).all()


@pytest.mark.parametrize("mlp", ["dense", "shift", ("moe", "dense", "dense", "dense")])
def test_bfloat16_follows_float32(mlp, images):
    settings = {"num_classes": 10, "attention": "linear", "mlp": mlp}
    model = sav.create_model("pvt_v2_nano", **settings)
    variables = sav.init_variables(model, KEY)
    full = jax.jit(model.apply)(variables, images[:2])
    half = jax.jit(sav.create_model("pvt_v2_nano", dtype=jnp.bfloat16, **settings).apply)(
        variables, images[:2]
    )
    assert half.dtype == jnp.float32
    assert np.abs(half - full).max() < 0.05 * np.abs(full).max() + 0.02


def test_training_mode_draws_noise_and_inference_needs_none(images):
    model = sav.create_model("pvt_v2_nano", num_classes=10, mlp="moe", drop_path=0.5)
    variables = sav.init_variables(model, KEY)
    train = jax.jit(
        lambda key: model.apply(variables, images, train=True, rngs={"dropout": key, "router": key})
    )
    assert np.abs(train(jax.random.key(1)) - train(jax.random.key(2))).max() > 0
    assert jnp.array_equal(train(jax.random.key(1)), train(jax.random.key(1)))


def test_a_mixture_is_exported_for_any_batch_and_has_both_modes():
    mlp = ("moe", "shift", "dense", "dense")
    model = sav.create_model("pvt_v2_nano", num_classes=10, attention="hamming_linear", mlp=mlp)
    variables = shapes(model)
    (batch,) = export.symbolic_shape("batch")
    images = jax.ShapeDtypeStruct((batch, 32, 32, 3), jnp.float32)
    (logits,) = export.export(jax.jit(model.apply))(variables, images).out_avals
    assert logits.shape == (batch, 10)

    def differentiate(variables, images):
        forward = jax.jvp(model.apply, (variables, images), (variables, images))
        return forward, jax.grad(lambda images: model.apply(variables, images).sum())(images)

    (_, tangent), gradient = jax.eval_shape(differentiate, variables, jnp.zeros((2, 32, 32, 3)))
    assert (tangent.shape, gradient.shape) == ((2, 10), (2, 32, 32, 3))


def test_inference_has_a_gradient_through_dispatch(images):
    model = sav.create_model("pvt_v2_nano", num_classes=10, attention="linear", mlp="moe")
    variables = sav.init_variables(model, KEY)
    gradient = jax.jit(jax.grad(lambda x: model.apply(variables, x)[0, 3]))(images[:1])
    assert np.isfinite(gradient).all()
    assert np.abs(gradient).max() > 0


@pytest.mark.parametrize(
    ("images_shape", "message"),
    [
        ((32, 32, 3), r"images must be \[batch, height, width, 3\]"),
        ((1, 32, 32, 1), r"images must be \[batch, height, width, 3\]"),
        ((1, 16, 64, 3), "at least 29 x 29 pixels"),
    ],
)
def test_wrong_images_are_refused(images_shape, message):
    model = sav.create_model("pvt_v2_nano", num_classes=10)
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(lambda: model.init(KEY, jnp.zeros(images_shape)))


@pytest.mark.parametrize("dtype", ["uint8", "int32", "bool", "complex64"])
def test_images_that_are_no_floating_point_numbers_are_refused(dtype):
    model = sav.create_model("pvt_v2_nano", num_classes=10)
    with pytest.raises(ValueError, match=rf"floating-point numbers, got {dtype}; .*data.preprocess"):
        jax.eval_shape(lambda: model.init(KEY, jnp.zeros((1, 32, 32, 3), dtype)))


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_images_of_any_floating_point_format_are_taken(dtype):
    model = sav.create_model("pvt_v2_nano", num_classes=10)
    pixels = np.zeros((1, 32, 32, 3), jnp.dtype(dtype))
    assert jax.eval_shape(lambda: model.init_with_output(KEY, pixels))[0].dtype == jnp.float32


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("pvt_v2_b7", {}, "unknown model 'pvt_v2_b7'; did you mean 'pvt_v2_b"),
        ("pvt_v2_b0", {"attention": "hamming"}, "unknown kind of attention 'hamming'"),
        ("pvt_v2_b0", {"mlp": "shft"}, "did you mean 'shift'"),
        ("pvt_v2_b0", {"attention": ("msa", "msa")}, "4, one a stage; got 2"),
        ("pvt_v2_b0", {"num_classes": -1}, "num_classes must be at least 0"),
        ("pvt_v2_b0", {"implementation": "tvn"}, "did you mean 'tvm'"),
        ("pvt_v2_b0", {"precision": "bfloat"}, "did you mean 'bfloat16'"),
    ],
)
def test_wrong_arguments_are_refused(name, arguments, message):
    with pytest.raises(ValueError, match=message):
        sav.create_model(name, **arguments)


def test_model_arguments_make_the_same_model():
    model = sav.create_model(
        "pvt_v2_b1",
        num_classes=7,
        attention="linear",
        mlp="moe",
        drop_path=0.1,
        dtype="bfloat16",
        image_size=64,
    )
    assert sav.create_model(**model_arguments(model)) == model
