"""Models without a head, and with another one."""

import functools

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import shiftaddvit_jax as sav
from shiftaddvit_jax.checkpoints.source import Source
from shiftaddvit_jax.compile import kernels_of
from shiftaddvit_jax.costs import cost_report
from shiftaddvit_jax.models import model_arguments, model_preprocessing
from shiftaddvit_jax.models.variables import variable_shapes
from shiftaddvit_jax.pack import packed_shapes
from shiftaddvit_jax.train import evaluate

PYRAMID = {"embed_dims": (16, 16, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)} | {
    "mlp_ratios": (2, 2, 2, 2)
}
VIT = {"embed_dim": 16, "depth": 1, "num_heads": 2}
SMALL = {"pvt_v2_b0": PYRAMID, "deit_tiny_distilled": VIT}
IMAGES = np.random.default_rng(1).normal(size=(2, 32, 32, 3)).astype(np.float32)


@functools.cache
def model_and_variables(name, attention=None):
    model = sav.create_model(name, num_classes=3, image_size=32, mlp="shift", attention=attention)
    model, rng = model.clone(**SMALL[name]), np.random.default_rng(0)
    shapes = variable_shapes(model)
    return model, jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)


def without_head(variables):
    flat = flatten_dict(variables, sep="/")
    return {name: leaf for name, leaf in flat.items() if not name.startswith("params/head")}


@pytest.mark.parametrize(
    ("name", "attention", "packed"),
    [
        ("pvt_v2_b0", "ecoformer", False),
        ("pvt_v2_b0", None, True),
        ("deit_tiny_distilled", None, False),
        ("deit_tiny_distilled", None, True),
    ],
)
def test_a_new_head_is_drawn_and_all_else_stays(name, attention, packed):
    model, variables = model_and_variables(name, attention)
    given = sav.pack(model, variables) if packed else variables
    replaced, found = sav.replace_head(model, given, 50, jax.random.key(7))
    assert replaced == model.clone(num_classes=50)
    assert found.keys() == variables.keys()
    kept, before = without_head(found), without_head(given)
    assert kept.keys() == before.keys()
    assert all(leaf is before[path] for path, leaf in kept.items())
    assert shapes(found) == shapes(packed_shapes(replaced) if packed else variable_shapes(replaced))
    for head in {"head", "head_dist"} & given["params"].keys():
        (weight,) = (leaf for leaf_name, leaf in found["params"][head].items() if leaf_name != "bias")
        # As every dense layer is drawn: 16 x 50 numbers around 0, and no bias.
        assert 0.015 < np.std(np.asarray(weight)[np.asarray(weight) != 0]) < 0.025
        np.testing.assert_array_equal(found["params"][head]["bias"], np.zeros(50))
    assert jax.eval_shape(replaced.apply, found, IMAGES).shape == (2, 50)
    headless, bare = sav.replace_head(replaced, found, 0)
    assert flatten_dict(bare, sep="/").keys() == kept.keys()
    assert jax.eval_shape(headless.apply, bare, IMAGES).shape == (2, 16)


def shapes(variables):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables)


def test_the_head_is_drawn_from_the_key():
    model, variables = model_and_variables("deit_tiny_distilled")
    heads = [
        sav.replace_head(model, variables, 3, key)[1]["params"]["head"]["kernel"]
        for key in (None, jax.random.key(0), jax.random.key(1))
    ]
    np.testing.assert_array_equal(heads[0], heads[1])
    assert not np.array_equal(heads[0], heads[2])
    assert not np.array_equal(heads[0], variables["params"]["head"]["kernel"])


def test_variables_of_another_model_get_no_head():
    model, variables = model_and_variables("deit_tiny_distilled")
    with pytest.raises(ValueError, match="num_classes must be at least 0, got -1"):
        sav.replace_head(model, variables, -1)
    params = variables["params"]
    damaged = {"params": {**params, "head": {**params["head"], "bias": np.zeros(4)}}}
    with pytest.raises(ValueError, match=r"1 parameters differ .* params/head/bias has shape \(4,\)"):
        sav.replace_head(model, damaged, 5)
    packed = sav.pack(model, variables)
    with pytest.raises(ValueError, match=r"6 parameters differ .* params/block1/mlp/fc1/blocks is missing"):
        sav.replace_head(model.clone(mlp=("dense",)), packed, 5)


def test_a_model_without_a_head_is_made_again_counted_packed_and_written(tmp_path):
    onnxruntime = pytest.importorskip("onnxruntime")
    model = sav.create_model("deit_tiny_distilled", num_classes=0, image_size=32)
    assert sav.create_model(**model_arguments(model)) == model
    small = model.clone(**VIT)
    variables = jax.tree.map(
        lambda leaf: np.cos(np.arange(leaf.size)).reshape(leaf.shape), variable_shapes(small)
    )
    variables = jax.tree.map(np.float32, variables)
    expected = jax.jit(small.apply)(variables, IMAGES)
    assert expected.shape == (2, 16)
    assert cost_report(small.clone(num_classes=10))["macs"] - cost_report(small)["macs"] == 2 * 16 * 10

    packed = sav.pack(small, variables)
    assert shapes(packed) == shapes(packed_shapes(small))
    sav.save_onnx(small, variables, tmp_path / "model.onnx", batch=2)
    session = onnxruntime.InferenceSession(str(tmp_path / "model.onnx"))
    (found,) = session.run(None, {"images": IMAGES.transpose(0, 3, 1, 2)})
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_model_without_a_head_needs_no_kernel_of_a_head():
    model = sav.create_model("pvt_v2_nano", num_classes=0, implementation="tvm")
    assert {kernel.name for kernel in kernels_of(model)} == {"patch_embed", "mlp"}


def test_what_needs_classes_refuses_a_model_without_a_head():
    model = sav.create_model("pvt_v2_nano", num_classes=0)
    source = Source("nano", model, {}, model_preprocessing(model), ())
    message = "this pvt_v2_nano has no head, and so no classes; give num_classes, or a head by .*replace_head"
    with pytest.raises(ValueError, match=message):
        sav.Classifier(source)
    with pytest.raises(ValueError, match=message):
        evaluate(model, {}, [{"image": IMAGES[0], "label": 0}])
