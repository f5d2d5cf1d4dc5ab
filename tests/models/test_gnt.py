"""GNT against numbers of its own code, and against what its paper's code computes a ray."""

import dataclasses
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import shiftaddvit_jax as sav
from shiftaddvit_jax.checkpoints.gnt import LAYOUT, load_gnt
from shiftaddvit_jax.checkpoints.layouts import export_parameter
from shiftaddvit_jax.costs import cost_report, count_operations
from shiftaddvit_jax.models import count_parameters, model_arguments
from shiftaddvit_jax.models.gnt import ATTENTION_KINDS
from shiftaddvit_jax.models.variables import init_variables, linear_layers, variable_shapes
from shiftaddvit_jax.novel_views.render import first_attention
from shiftaddvit_jax.ops import power_of_two
from shiftaddvit_jax.ops.cameras import Rays, Views, direction_differences, pixel_directions, ray_depths
from tests.data.make_gnt_layers import DEPTH, FAR, NEAR, PIXELS, POINTS, draw

GOLDEN = dict(np.load(Path(__file__).parent.parent / "data" / "gnt_layers.npz"))


def _random_rays(model, rays=6, seed=0):
    """Arguments of a call: points between the cameras' first coordinates, in small random photographs."""
    generator = np.random.default_rng(seed)
    intrinsics = np.array([[20, 0, 11.5], [0, 20, 11.5], [0, 0, 1]], np.float32)
    poses = np.repeat(np.eye(4, dtype=np.float32)[None], model.views, axis=0)
    poses[:, :2, 3] = generator.uniform(-0.3, 0.3, (model.views, 2))
    images = generator.uniform(size=(model.views, 24, 24, 3)).astype(np.float32)
    views = Views(images, np.repeat(intrinsics[None], model.views, axis=0), poses)
    pixels = generator.uniform(0, 23, (rays, 2)).astype(np.float32)
    directions = pixel_directions(jnp.asarray(pixels), jnp.asarray(intrinsics), jnp.eye(4))
    depths = ray_depths(1.0, 6.0, rays, model.points)
    return Rays(jnp.zeros((rays, 3)), directions, depths), jax.tree.map(jnp.asarray, views)


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """GNT's model of two blocks with the weights of a file as its code writes them."""
    model = sav.create_model("gnt_single").clone(depth=DEPTH)
    entries = {"net_coarse": {}, "feature_net": {}, "optimizer": {"step": torch.zeros(1)}}
    shapes = jax.tree_util.tree_flatten_with_path(variable_shapes(model)["params"])[0]
    for path, leaf in shapes:
        name = "/".join(key.key for key in path)
        for key, tensor in export_parameter(name, np.zeros(leaf.shape, np.float32), LAYOUT).items():
            entry, _, inner = key.partition(".")
            if not inner.endswith(("q_fc.bias", "k_fc.bias", "v_fc.bias")):
                entries[entry][inner] = torch.tensor(draw(inner, tensor.shape))
    file = tmp_path_factory.mktemp("gnt") / "model_250000.pth"
    torch.save(entries, file)
    return model, load_gnt(model, file), file


@pytest.fixture(scope="module")
def golden_call():
    views = Views(*(jnp.asarray(GOLDEN[name]) for name in ("images", "intrinsics", "poses")))
    directions = pixel_directions(jnp.asarray(PIXELS), views.intrinsics[0], jnp.asarray(GOLDEN["query"]))
    origins = jnp.broadcast_to(GOLDEN["query"][:3, 3], directions.shape)
    return Rays(origins, directions, ray_depths(NEAR, FAR, len(PIXELS), POINTS)), views


def test_rays_are_gnts(golden_call):
    rays, _ = golden_call
    np.testing.assert_allclose(rays.directions, GOLDEN["directions"], atol=1e-6)
    np.testing.assert_allclose(rays.depths, GOLDEN["depths"], rtol=1e-6)


def test_differences_of_directions_are_gnts(golden_call):
    rays, views = golden_call
    ours = direction_differences(rays.points, rays.origins, views.poses[:, :3, 3])
    np.testing.assert_allclose(ours, GOLDEN["differences"], atol=1e-5)


def test_image_features_are_gnts(published, golden_call):
    model, variables, _ = published
    ours = jax.jit(lambda images: model.apply(variables, images, method="encode"))(golden_call[1].images)
    scale = np.abs(GOLDEN["features"]).max()
    np.testing.assert_allclose(ours / scale, GOLDEN["features"] / scale, atol=2e-5)


def test_tokens_and_what_is_seen_are_gnts(published, golden_call):
    model, variables, _ = published
    features = jnp.asarray(GOLDEN["features"])
    look_up = jax.jit(partial(model.apply, method="_look_up"))
    tokens, _, visible = look_up(variables, *golden_call, features)
    np.testing.assert_allclose(tokens, GOLDEN["tokens"], atol=1e-5)
    np.testing.assert_array_equal(visible, GOLDEN["visible"])


@pytest.fixture(scope="module")
def colours_and_projections(published, golden_call):
    model, variables, _ = published

    @jax.jit
    def render(features):
        return model.apply(variables, *golden_call, features, capture_intermediates=True)

    colours, state = render(jnp.asarray(GOLDEN["features"]))
    inner = state["intermediates"][f"block{DEPTH}"]["ray"]["attn"]["qkv"]["__call__"][0]
    return colours, inner


def test_colours_are_gnts(colours_and_projections):
    np.testing.assert_allclose(colours_and_projections[0], GOLDEN["colours"], atol=2e-5)


def test_weights_of_depths_are_gnts(colours_and_projections):
    weights = first_attention(colours_and_projections[1], 4, 64)
    np.testing.assert_allclose(weights, GOLDEN["weights"], atol=1e-5)


def test_a_missing_tensor_is_named(published, tmp_path):
    model, _, file = published
    entries = torch.load(file, weights_only=True)
    del entries["net_coarse"]["rgb_fc.bias"]
    torch.save(entries, tmp_path / "model.pth")
    with pytest.raises(ValueError, match=r"net_coarse\.rgb_fc\.bias is missing"):
        load_gnt(model, tmp_path / "model.pth")


def test_weights_are_not_loaded_into_shifts(published):
    model = sav.create_model("gnt_single", mlp="shift")
    with pytest.raises(ValueError, match="reparameterize"):
        load_gnt(model, published[2])


# 8.88 M in the features, 0.44 and 0.88 M in the transformers; 56 and 109 M multiply-accumulates a ray.
@pytest.mark.parametrize(
    ("name", "transformers", "macs"), [("gnt_single", 0.446e6, 56.3e6), ("gnt", 0.886e6, 108.5e6)]
)
def test_sizes_and_operations_are_gnts(name, transformers, macs):
    model = sav.create_model(name)
    shapes = variable_shapes(model)["params"]
    features = sum(leaf.size for leaf in jax.tree.leaves(shapes["image_features"]))
    assert features == pytest.approx(8.88e6, rel=1e-3)
    assert count_parameters(model) - features == pytest.approx(transformers, rel=2e-3)
    assert count_operations(model, variable_shapes(model)).macs == pytest.approx(macs, rel=1e-3)


def test_operations_of_a_ray_have_a_closed_form():
    model = sav.create_model("gnt_nano")
    c, points, views, features = model.channels, model.points, model.views, model.features
    tokens = points * views
    embed = tokens * ((3 + features) * c + c * c)
    view = tokens * (2 * c * c + (4 * c // 8 + c // 8 * c) + 2 * c * c // 8) + points * (
        2 * c * c + 8 * c * c
    )
    mix = points * ((c + 126) * c + c * c)
    ray = points * (4 * c * c + 8 * c * c) + 2 * points * points * c
    # Projections of points into photographs: two products of 3 x 3.
    project = 2 * 9 * tokens
    expected = embed + model.depth * (view + ray) + mix + c * 3 + project
    assert count_operations(model, variable_shapes(model)).macs == pytest.approx(expected, rel=0.01)


def test_most_multiplications_are_in_linear_layers():
    model = sav.create_model("gnt_single")
    shift = cost_report(model.clone(mlp=("shift",), projections=("shift",)))
    dense = cost_report(model)
    assert 0.85 < 1 - shift["macs"] / dense["macs"] < 0.97


@pytest.fixture(scope="module")
def nano():
    model = sav.create_model("gnt_nano").clone(depth=1)
    return model, init_variables(model, jax.random.key(0))


@pytest.mark.parametrize("attention", ATTENTION_KINDS)
def test_each_attention_takes_the_others_weights(nano, attention):
    student, variables = sav.reparameterize(*nano, attention=attention, key=jax.random.key(1))
    colours = jax.jit(student.apply)(variables, *_random_rays(student))
    assert colours.shape == (6, 3)
    assert np.isfinite(colours).all()


def test_shift_layers_are_the_dense_ones_rounded(nano):
    model, variables = nano
    student, shifted = sav.reparameterize(model, variables, mlp="shift", projections="shift")
    for path in linear_layers(model):
        old, new = variables["params"], shifted["params"]
        for part in path.split("/"):
            old, new = old[part], new[part]
        np.testing.assert_array_equal(new["kernel"], power_of_two(old["kernel"]))
    assert set(student.mlp + student.projections) == {"shift"}


def test_one_layer_alone_can_be_a_mixture(nano):
    _, variables = sav.reparameterize(*nano, layers={"block1/view/attn/score/fc1": "moe"})
    score = variables["params"]["block1"]["view"]["attn"]["score"]
    assert "router" in score["fc1"]
    assert "router" not in score["fc2"]


@pytest.mark.slow
@pytest.mark.parametrize("mlp", ["shift", "moe"])
def test_packed_on_kernels_equals_xla(nano, mlp):
    student, variables = sav.reparameterize(*nano, mlp=mlp, projections=mlp, attention="hamming_linear")
    call = _random_rays(student)
    expected = jax.jit(student.apply)(variables, *call)
    packed = sav.pack(student, variables)
    primitives = dataclasses.replace(student.primitives, implementation="tvm")
    on_kernels = student.clone(primitives=primitives)
    np.testing.assert_allclose(jax.jit(on_kernels.apply)(packed, *call), expected, atol=2e-5)


def test_features_given_are_features_made(nano):
    model, variables = nano
    rays, views = _random_rays(model)
    features = jax.jit(partial(model.apply, method="encode"))(variables, views.images)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(
        apply(variables, rays, views, features), apply(variables, rays, views), atol=1e-5
    )


def test_a_ray_does_not_depend_on_the_others(nano):
    model, variables = nano
    rays, views = _random_rays(model)
    alone = jax.tree.map(lambda array: array[2:3], rays)
    apply = jax.jit(model.apply)
    np.testing.assert_allclose(apply(variables, alone, views), apply(variables, rays, views)[2:3], atol=1e-5)


def test_its_arguments_make_it_again():
    model = sav.create_model("gnt_nano", mlp="moe", attention="hamming_linear")
    assert sav.create_model(**model_arguments(model)) == model


@pytest.mark.parametrize("given", [{"num_classes": 10}, {"image_size": 64}, {"drop_path": 0.1}])
def test_what_classifiers_have_is_refused(given):
    with pytest.raises(ValueError, match=f"gnt has no|has no {next(iter(given))}"):
        sav.create_model("gnt", **given)


def test_attention_with_a_class_token_or_a_grid_is_refused():
    with pytest.raises(ValueError, match="gnt_nano has no attention 'sra'"):
        sav.create_model("gnt_nano", attention="sra")


def test_lists_keep_tasks_apart():
    assert sav.list_models("novel_views") == ["gnt", "gnt_single", "gnt_nano"]
    assert not set(sav.list_models()) & set(sav.list_models("novel_views"))
