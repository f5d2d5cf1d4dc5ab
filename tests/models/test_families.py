"""What holds for every family: PVT, PVTv2, ViT and DeiT."""

import json

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict

import shiftaddvit_jax as sav
from shiftaddvit_jax.models import count_parameters, model_arguments, model_row
from shiftaddvit_jax.models.variables import variable_shapes
from shiftaddvit_jax.nn import ATTENTION_KINDS
from shiftaddvit_jax.nn.attention import PerformerAttention, SoftmaxAttention
from shiftaddvit_jax.nn.linear import precision_of
from shiftaddvit_jax.nn.position import resize_position_embeddings
from shiftaddvit_jax.ops import power_of_two

PYRAMID = {"embed_dims": (8, 16, 16, 16), "depths": (1, 1, 1, 1), "num_heads": (1, 2, 2, 2)} | {
    "mlp_ratios": (2, 2, 2, 2)
}
SMALL = {
    "pvt_tiny": PYRAMID,
    "pvt_v2_b0": PYRAMID,
    "pvt_v2_b2_li": PYRAMID,
    "deit_tiny": {"embed_dim": 16, "depth": 1, "num_heads": 2},
    "deit_tiny_distilled": {"embed_dim": 16, "depth": 1, "num_heads": 2},
}


def small(name, **arguments):
    return sav.create_model(name, num_classes=3, image_size=32, **arguments).clone(**SMALL[name])


# Millions, as the papers and the authors' repositories give them.
PUBLISHED = {
    "pvt_tiny": 13.2,
    "pvt_small": 24.5,
    "pvt_medium": 44.2,
    "pvt_large": 61.4,
    "pvt_v2_b0": 3.67,
    "pvt_v2_b1": 14.0,
    "pvt_v2_b2": 25.4,
    "pvt_v2_b2_li": 22.6,
    "pvt_v2_b3": 45.2,
    "pvt_v2_b4": 62.6,
    "pvt_v2_b5": 82.0,
    "vit_tiny": 5.7,
    "vit_small": 22,
    "vit_base": 86.6,
    "deit_tiny": 5.7,
    "deit_small": 22,
    "deit_base": 86.6,
    "deit_tiny_distilled": 5.9,
    "deit_small_distilled": 22.4,
    "deit_base_distilled": 87.3,
}


@pytest.mark.slow
def test_numbers_of_parameters_are_the_published_ones():
    table = {name: model_row(name) for name in sav.list_models()}
    assert table.keys() - PUBLISHED.keys() == {"pvt_v2_nano", "deit_nano"}
    for name, millions in PUBLISHED.items():
        digits = len(str(millions).partition(".")[2])
        assert round(table[name]["parameters"] / 1e6, digits) == millions, name
        assert table[name]["image_size"] == 224
    assert table["pvt_tiny"]["attention"] == ATTENTION_KINDS
    assert table["deit_tiny"]["attention"] == (
        "msa",
        "linear",
        "hamming_linear",
        "hamming_quadratic",
        "binary_softmax",
    )


# Every kind of attention of every family, and with them every kind of linear layer.
PYRAMID_KINDS = (
    ("msa", "sra", "linear_sra", "linear_sra"),
    ("linear", "performer", "ecoformer", "msa"),
    ("hamming_linear", "hamming_ksh", "hamming_quadratic", "sra"),
    ("sra", "sra", "binary_softmax", "binary_softmax"),
)
LINEAR = ("dense", "shift", "moe", "dense")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "attention", "mlp"),
    [(name, kinds, LINEAR) for name in ("pvt_tiny", "pvt_v2_b2_li") for kinds in PYRAMID_KINDS]
    + [
        ("deit_tiny", "msa", "shift"),
        ("deit_tiny", "linear", "dense"),
        ("deit_tiny_distilled", "hamming_linear", "moe"),
        ("deit_tiny_distilled", "hamming_quadratic", "shift"),
        ("deit_tiny_distilled", "binary_softmax", "moe"),
    ],
    ids=str,
)
def test_every_kind_of_every_family(name, attention, mlp):
    model = small(name, attention=attention, mlp=mlp, projections=mlp)
    half = small(name, attention=attention, mlp=mlp, projections=mlp, dtype=jnp.bfloat16)
    variables = sav.init_variables(model, jax.random.key(0))
    images = jax.random.normal(jax.random.key(1), (3, 32, 32, 3))

    @jax.jit
    def infer(variables, images):
        return model.apply(variables, images), half.apply(variables, images[:1])

    @jax.jit
    def gradient(params):
        def loss(params):
            rngs = {"router": jax.random.key(2)}
            return jnp.sum(model.apply({**variables, "params": params}, images, train=True, rngs=rngs) ** 2)

        return jax.grad(loss)(params)

    three, one = infer(variables, images)
    assert three.shape == (3, 3)
    assert three.dtype == one.dtype == jnp.float32
    assert float(jnp.std(three)) > 0
    np.testing.assert_allclose(one, three[:1], atol=0.05)
    for path, leaf in flatten_dict(gradient(variables["params"]), sep="/").items():
        assert bool(jnp.isfinite(leaf).all()), path


@pytest.mark.parametrize(
    ("name", "attention"),
    [("pvt_tiny", "hamming_ksh"), ("pvt_v2_b0", "hamming_linear"), ("deit_tiny_distilled", "hamming_linear")],
)
def test_both_stages_keep_every_inherited_tensor(name, attention):
    model = small(name)
    variables = sav.init_variables(model, jax.random.key(0))
    first, first_variables = sav.reparameterize(model, variables, attention=attention)
    stages = len(model.attention)
    assert first.attention == ((attention,) * (stages - 1) + ("msa",) if stages > 1 else (attention,))
    old, new = (flatten_dict(tree["params"], sep="/") for tree in (variables, first_variables))
    for path in old:
        part = path.rpartition("/")[0].rpartition("/")[2]
        if path in new:
            np.testing.assert_array_equal(new[path], old[path])
        elif part in ("q", "kv") and attention != "hamming_ksh":
            fused = path.replace(f"/{part}/", "/qkv/")
            size = new[fused].shape[-1] // 3
            kept = new[fused][..., :size] if part == "q" else new[fused][..., size:]
            np.testing.assert_array_equal(kept, old[path])
    second, second_variables = sav.reparameterize(first, first_variables, mlp="moe", projections="shift")
    assert second.mlp == ("moe",) * stages
    assert second.attention == first.attention
    last = flatten_dict(second_variables["params"], sep="/")
    for path, value in new.items():
        module, _, leaf = path.rpartition("/")
        layer = module.rpartition("/")[2]
        if layer in ("fc1", "fc2"):
            np.testing.assert_array_equal(last[f"{module}/dense/{leaf}"], value)
            shifted = power_of_two(value) if leaf == "kernel" else value
            np.testing.assert_array_equal(last[f"{module}/shift/{leaf}"], shifted)
        elif layer in ("qkv", "qk", "v", "q", "kv") or path.endswith("attn/proj/kernel"):
            np.testing.assert_array_equal(last[path], power_of_two(value) if leaf == "kernel" else value)
        else:
            np.testing.assert_array_equal(last[path], value)


@pytest.mark.parametrize("name", ["pvt_tiny", "pvt_v2_b2_li", "deit_tiny_distilled"])
def test_arguments_make_the_model_again(name):
    model = sav.create_model(name, num_classes=5, image_size=64, layer_norm_eps=1e-12, mlp="moe")
    assert sav.create_model(**model_arguments(model)) == model


def test_a_kind_that_a_family_lacks_is_told_with_those_it_has():
    with pytest.raises(
        ValueError, match=r"deit_tiny has no attention 'sra'; choose among msa, linear, hamming"
    ):
        sav.create_model("deit_tiny", attention="sra")
    with pytest.raises(ValueError, match="one kind or 1, one a stage"):
        sav.create_model("deit_tiny", attention=("msa", "linear"))
    with pytest.raises(ValueError, match="did you mean 'hamming_linear'"):
        sav.create_model("pvt_tiny", attention="haming_linear")


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("deit_tiny", 40, "sides must be multiples of 16, got 40"),
        ("pvt_tiny", 31, "at least 32 x 32 pixels, got 31 x 31"),
        ("pvt_v2_b0", 28, "at least 29 x 29 pixels, got 28 x 28"),
    ],
)
def test_a_size_that_cannot_work_is_told(name, size, message):
    model = small(name)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, 32, 32, 3)))
    with pytest.raises(ValueError, match=message):
        jax.eval_shape(model.apply, variables, jnp.zeros((1, size, size, 3)))
    with pytest.raises(ValueError, match=message):
        count_parameters(model.clone(image_size=size))


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("new_grid", [(3, 3), (7, 9), (5, 5), (14, 2), (1, 1)])
def test_position_embeddings_are_interpolated_as_torch_does(interpolation, new_grid):
    embeddings = np.random.default_rng(0).normal(size=(2 + 25, 6)).astype(np.float32)
    grid = torch.from_numpy(embeddings[2:].reshape(1, 5, 5, 6).transpose(0, 3, 1, 2))
    expected = torch.nn.functional.interpolate(grid, size=new_grid, mode=interpolation)
    found = np.asarray(resize_position_embeddings(embeddings, (5, 5), new_grid, interpolation))
    np.testing.assert_array_equal(found[:2], embeddings[:2])
    np.testing.assert_allclose(found[2:].T, expected.numpy().reshape(6, -1), atol=1e-5)


def test_performer_estimates_softmax_attention():
    x = 0.5 * jax.random.normal(jax.random.key(0), (2, 40, 64))
    module = PerformerAttention(num_heads=2)
    variables = module.init(jax.random.key(1), x, (5, 8))
    params = jax.tree.map(lambda leaf: 4 * leaf, variables["params"])

    @jax.jit
    def estimate(key):
        redrawn = sav.redraw_features(module, {**variables, "params": params}, key)
        return module.apply(redrawn, x, (5, 8))

    draws = jnp.stack([estimate(key) for key in jax.random.split(jax.random.key(2), 64)])
    wanted = SoftmaxAttention(num_heads=2).apply({"params": params}, x, (5, 8))
    one, mean = (
        float(jnp.linalg.norm(it - wanted) / jnp.linalg.norm(wanted)) for it in (draws[0], draws.mean(0))
    )
    assert 0 < one < 0.5
    assert mean < one / 3


def test_hadamard_features_are_orthogonal_and_of_one_length():
    model = small("pvt_v2_b0", attention="performer", performer_features="hadamard")
    shapes = variable_shapes(model)["features"]
    zeros = {"features": jax.tree.map(lambda leaf: jnp.zeros(leaf.shape), shapes)}
    drawn = sav.redraw_features(model, zeros, jax.random.key(1))["features"]
    features = np.asarray(drawn["stage1"]["block1"]["attn"]["projection"], np.float64)
    head_dim = features.shape[1]
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), head_dim**0.5, rtol=1e-5)
    for start in range(0, len(features), head_dim):
        block = features[start : start + head_dim]
        np.testing.assert_allclose(block @ block.T, head_dim * np.eye(len(block)), atol=1e-4)


def test_redrawing_features_changes_them_alone():
    model = small("pvt_v2_b0", attention="performer")
    variables = sav.init_variables(model, jax.random.key(0))
    redrawn = sav.redraw_features(model, variables, jax.random.key(1))
    jax.tree.map(np.testing.assert_array_equal, redrawn["params"], variables["params"])
    before, after = (flatten_dict(tree["features"], sep="/") for tree in (variables, redrawn))
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before)
    # [features, head_dim]: directions are orthogonal within each block of head_dim.
    features = np.asarray(after["stage1/block1/attn/projection"])
    products = features[:8] @ features[:8].T
    np.testing.assert_allclose(products - np.diag(np.diag(products)), 0, atol=1e-4)
    model = small("deit_tiny")
    dense = sav.init_variables(model, jax.random.key(0))
    assert sav.redraw_features(model, dense, jax.random.key(1)) is dense


@pytest.mark.parametrize(
    ("name", "layers"),
    [
        ("pvt_v2_nano", {"stage1/block1/mlp/fc1": "shift", "stage4/block1/attn/kv": "dense_int8"}),
        ("pvt_tiny", {"stage2/block2/attn/q": "shift_two_terms", "stage1/block1/mlp/fc2": "moe"}),
        ("deit_tiny", {"block7/attn/qkv": "shift", "block12/mlp/fc2": "dense_int8"}),
    ],
)
def test_single_layers_are_what_they_are_chosen_to_be(name, layers):
    model = sav.create_model(name, num_classes=5, image_size=32, layers=layers)
    kinds = {}

    def note(call, arguments, keywords, context):
        module = context.module
        if isinstance(module, (sav.nn.ShiftDense, sav.nn.MoEDense, nn.Dense)):
            kinds["/".join(module.path)] = (
                type(module).__name__,
                getattr(module, "weight_terms", None),
                precision_of(module),
            )
        return call(*arguments, **keywords)

    with nn.intercept_methods(note):
        variable_shapes(model)
    expected = {
        "shift": ("ShiftDense", 1, None),
        "shift_two_terms": ("ShiftDense", 2, None),
        "moe": ("MoEDense", 1, None),
        "dense_int8": ("Dense", None, "int8"),
    }
    assert {path: kinds[path] for path in layers} == {
        path: expected[choice] for path, choice in layers.items()
    }
    others = {path: kind for path, kind in kinds.items() if not path.startswith(tuple(layers))}
    assert set(others.values()) == {("Dense", None, "float32")}


def test_the_choices_of_layers_are_among_the_arguments_that_make_a_model_again():
    model = sav.create_model("deit_tiny", layers={"block1/mlp/fc1": "shift"}, weight_terms=2)
    arguments = json.loads(json.dumps(model_arguments(model)))
    assert sav.create_model(**arguments) == model


@pytest.mark.parametrize(
    ("layers", "message"),
    [
        ({"block1/mlp/fc3": "shift"}, "unknown linear layer 'block1/mlp/fc3'; did you mean 'block1/mlp/fc"),
        ({"block1/mlp/fc1": "shifty"}, "unknown choice for block1/mlp/fc1 'shifty'; did you mean 'shift'"),
    ],
)
def test_unknown_layers_and_choices_are_refused(layers, message):
    with pytest.raises(ValueError, match=message):
        sav.create_model("deit_tiny", layers=layers)
