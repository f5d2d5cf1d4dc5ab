import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax.models.variables import init_function, variable_shapes
from shiftaddvit_jax.nn import MoEDense
from shiftaddvit_jax.train import evaluate

NO_IMAGES = np.zeros((0, 32, 32, 3), np.float32)
MODELS = pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [
        (
            "pvt_v2_nano",
            ("hamming_linear", "hamming_ksh", "performer", "sra"),
            ("moe", "shift", "moe", "dense"),
        ),
        ("pvt_tiny", ("sra", "linear", "ecoformer", "hamming_quadratic"), "dense"),
        ("deit_tiny_distilled", "hamming_linear", "shift"),
    ],
)


def model_of(name, attention, mlp, **arguments):
    return sav.create_model(name, num_classes=7, image_size=32, attention=attention, mlp=mlp, **arguments)


@MODELS
def test_with_x64_all_is_float32(name, attention, mlp):
    model = model_of(name, attention, mlp)

    def run(key):
        variables, images = init_function(model)(key), jnp.zeros((2, 32, 32, 3))
        rngs = {"router": key, "dropout": key, "hash": key}
        logits, state = model.apply(variables, images, mutable=["routing", "hash"], rngs=rngs)
        trained = model.apply(variables, images, train=True, rngs=rngs)
        return variables, logits, state, trained

    with jax.enable_x64(True):
        dtypes = {leaf.dtype for leaf in jax.tree.leaves(jax.eval_shape(run, jax.random.key(0)))}
    assert dtypes == {jnp.dtype("float32")}


def test_with_x64_a_mixture_has_the_same_parameters_and_outputs():
    x = np.random.default_rng(0).normal(size=(23, 8)).astype(np.float32)

    def run():
        layer = MoEDense(6)
        variables = layer.init(jax.random.key(0), x)
        return variables, layer.apply(variables, x)

    with jax.enable_x64(True):
        wide = run()
    for actual, expected in zip(jax.tree.leaves(wide), jax.tree.leaves(run()), strict=True):
        assert actual.dtype == expected.dtype == np.float32
        np.testing.assert_allclose(actual, expected, rtol=1e-6, atol=1e-6)


@MODELS
def test_no_images_have_no_logits(name, attention, mlp):
    model = model_of(name, attention, mlp)
    assert jax.eval_shape(model.apply, variable_shapes(model), NO_IMAGES).shape == (0, 7)


@functools.cache
def variables_of_a_small_model():
    model = model_of(*SMALL)
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), variable_shapes(model)
    )


SMALL = "pvt_v2_nano", ("hamming_linear", "msa", "msa", "msa"), ("moe", "shift", "dense", "dense")


@pytest.mark.parametrize(("packed", "implementation"), [(False, "xla"), (True, None), (True, "tvm")])
def test_no_images_run_packed_or_not(packed, implementation):
    model, variables = model_of(*SMALL, implementation=implementation), variables_of_a_small_model()
    if packed:
        variables = sav.pack(model, variables)
    logits, state = jax.jit(functools.partial(model.apply, mutable=["routing"]))(variables, NO_IMAGES)
    assert logits.shape == (0, 7)
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(state))


def test_there_is_nothing_to_evaluate_without_images():
    with pytest.raises(ValueError, match="expected at least one image, got none"):
        evaluate(model_of(*SMALL), {}, [])
