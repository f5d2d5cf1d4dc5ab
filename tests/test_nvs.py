"""Novel views from the command line and by functions: scores, videos, paths, floors, a page."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from PIL import Image
from safetensors.numpy import load_file, save_file

import shiftaddvit_jax as sav
from shiftaddvit_jax.checkpoints import load_model, save_model
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.data.scenes import load_scene
from shiftaddvit_jax.models import init_variables
from shiftaddvit_jax.models.inspect import outputs_of
from shiftaddvit_jax.models.variables import linear_layers
from shiftaddvit_jax.novel_views import (
    Rendered,
    circle_path,
    fit_plane,
    load_lpips,
    mean_of_views,
    read_path,
    render_view,
    sample_rays,
    score_view,
    spiral_path,
    warp_by_depth,
    warp_by_plane,
)
from shiftaddvit_jax.novel_views.baselines import _warp
from shiftaddvit_jax.novel_views.metrics import peak_signal_to_noise
from shiftaddvit_jax.novel_views.video import write_frames
from shiftaddvit_jax.pictures.views import write_views_page
from shiftaddvit_jax.train import views as view_training

SIDE = 32
SCENE = ("--scene", "analytic", "--longest-side", str(SIDE))


@pytest.fixture(scope="module")
def scene():
    return load_scene("analytic", longest_side=SIDE)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    """What `nvs train` makes in one step, which renders as fast as what was trained for long."""
    folder = tmp_path_factory.mktemp("runs") / "dense"
    assert main(["nvs", "train", *SCENE, "--workdir", str(folder), "--steps", "1", "--rays", "8"]) == 0
    return folder / "model"


@pytest.fixture(scope="module")
def opened(checkpoint):
    return load_model(checkpoint)[:2]


def test_a_view_does_not_depend_on_the_chunk(opened, scene):
    whole, parts = (render_view(*opened, scene, scene.poses[3], chunk=chunk) for chunk in (1024, 1000))
    np.testing.assert_allclose(parts.colours, whole.colours, atol=1e-6)
    np.testing.assert_allclose(parts.depth, whole.depth, rtol=1e-5)


def test_shares_of_rays_are_those_of_layers(opened, scene):
    """The mean over rays and MoE layers, either way."""
    model, variables = sav.reparameterize(*opened, layers={"embed/fc1": "moe", "block1/mix/fc2": "moe"})
    view = render_view(model, variables, scene, scene.poses[3], count_tokens=True)
    shares = [tokens[1] / tokens.sum() for tokens in view.tokens.values()]
    assert len(shares) == 2
    assert view.shift_share.mean() == pytest.approx(np.mean(shares), abs=1e-6)


def test_without_mixtures_there_are_no_shares(opened, scene):
    assert render_view(*opened, scene, scene.poses[3], count_tokens=True).shift_share is None


@pytest.fixture(scope="module")
def converted(checkpoint, tmp_path_factory):
    """What `nvs convert` makes of the checkpoint."""
    folder = tmp_path_factory.mktemp("converted") / "model"
    kinds = ("--mlp", "shift", "--projections", "shift", "--rays", "64")
    main(["nvs", "convert", str(checkpoint), *SCENE, *kinds, "--output", str(folder)])
    return load_model(folder)[:2]


def test_converted_models_have_shifts_alone(converted):
    model, variables = converted
    assert set(model.mlp + model.projections) == {"shift"}
    leaves = flatten_dict(variables["params"], sep="/")
    kernels = [np.abs(leaves[f"{path}/kernel"]) for path in linear_layers(model)]
    assert all((np.frexp(kernel)[0] == 0.5).all() for kernel in kernels)


def test_a_conversion_comes_nearer_than_rounding(opened, converted, scene):
    """On other rays than those it was fitted to."""
    samples = sample_rays(*opened, scene, 64, seed=1)
    rounded = sav.reparameterize(*opened, mlp="shift", projections="shift")
    dense, by_fit, by_rounding = (outputs_of(*each, samples, 64) for each in (opened, converted, rounded))
    assert np.mean(np.square(by_fit - dense)) < 0.3 * np.mean(np.square(by_rounding - dense))


def test_samples_depend_on_their_seed(opened, scene):
    samples, again, other = (sample_rays(*opened, scene, 20, seed=seed).tokens for seed in (0, 0, 1))
    assert samples.shape == (20, 24, 4, 3 + 8)
    np.testing.assert_array_equal(samples, again)
    assert (samples != other).any()


def test_rendering_samples_is_rendering_rays(opened, scene):
    """The model of its own call, of which `look_up` and `render` are halves."""
    model, variables = opened
    rays, views, features = jax.tree.map(
        lambda shape: np.random.default_rng(0).uniform(0.5, 2, shape.shape).astype(np.float32),
        model.example_inputs(3),
    )
    samples = model.apply(variables, rays, views, features, method="look_up")
    halves = model.apply(variables, samples, method="render")
    np.testing.assert_allclose(halves, model.apply(variables, rays, views, features), rtol=1e-6)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"budget": 1.0}, "take 'error'"),
        ({"smoothing": 0.5}, "leave it at 0"),
        ({"images": 0}, "_rays"),
    ],
)
def test_a_conversion_of_other_things_is_refused(opened, scene, settings, says):
    images = np.zeros((2, 32, 32, 3)) if "images" in settings else sample_rays(*opened, scene, 2)
    settings = {name: value for name, value in settings.items() if name != "images"}
    with pytest.raises(ValueError, match=says):
        sav.calibrate(*opened, images, mlp="shift", **settings)


@pytest.fixture(scope="module")
def lpips_file(tmp_path_factory):
    """Random weights by the names of the authors' module."""
    draw = np.random.default_rng(0)
    shapes = {
        "net.slice1.0": (64, 3, 11, 11),
        "net.slice2.3": (192, 64, 5, 5),
        "net.slice3.6": (384, 192, 3, 3),
        "net.slice4.8": (256, 384, 3, 3),
        "net.slice5.10": (256, 256, 3, 3),
    }
    tensors = {}
    for index, (name, shape) in enumerate(shapes.items()):
        fan_in = np.prod(shape[1:])
        tensors[f"{name}.weight"] = draw.normal(0, fan_in**-0.5, shape).astype(np.float32)
        tensors[f"{name}.bias"] = draw.normal(0, 0.1, shape[0]).astype(np.float32)
        tensors[f"lin{index}.model.1.weight"] = draw.uniform(0, 1, (1, shape[0], 1, 1)).astype(np.float32)
    file = tmp_path_factory.mktemp("lpips") / "alex.safetensors"
    save_file(tensors, file)
    return file


def test_lpips_is_that_of_torch(lpips_file):
    """The authors' steps, in torch: scaled colours, AlexNet's five activations, weighed unit vectors."""
    tensors = {name: torch.from_numpy(value) for name, value in load_file(lpips_file).items()}
    views = np.random.default_rng(1).uniform(0, 1, (2, 33, 47, 3)).astype(np.float32)
    x = torch.from_numpy(views).permute(0, 3, 1, 2) * 2 - 1
    shift, scale = torch.tensor([-0.030, -0.088, -0.188]), torch.tensor([0.458, 0.448, 0.450])
    x = (x - shift[:, None, None]) / scale[:, None, None]
    total = 0.0
    places = ("slice1.0", "slice2.3", "slice3.6", "slice4.8", "slice5.10")
    for index, (place, padding) in enumerate(zip(places, (2, 2, 1, 1, 1), strict=True)):
        if index in (1, 2):
            x = torch.nn.functional.max_pool2d(x, 3, 2)
        weight, bias = tensors[f"net.{place}.weight"], tensors[f"net.{place}.bias"]
        x = torch.relu(torch.nn.functional.conv2d(x, weight, bias, 4 if index == 0 else 1, padding))
        unit = x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10)
        weighed = (unit[:1] - unit[1:]).square() * tensors[f"lin{index}.model.1.weight"]
        total += float(weighed.sum(1).mean())
    assert load_lpips(lpips_file)(*views) == pytest.approx(total, rel=1e-4)


def test_lpips_of_equal_views_is_0(lpips_file, scene):
    view = scene.images[3] / 255
    assert score_view(view, view, load_lpips(lpips_file))["lpips"] == 0


def test_lpips_of_a_file_of_something_else_is_told(tmp_path):
    save_file({"weight": np.zeros(3, np.float32)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match=r"has no net\.slice1\.0\.weight; expected the state_dict"):
        load_lpips(tmp_path / "other.safetensors")


def test_depths_lie_in_the_scene(opened, scene):
    depth = render_view(*opened, scene, scene.poses[3]).depth
    assert depth.shape == (SIDE, SIDE)
    assert depth.min() > scene.near
    assert depth.max() < scene.far


def test_a_view_is_not_rendered_from_itself(scene):
    one = dataclasses.replace(scene, images=scene.images[:1], held_out=())
    with pytest.raises(ValueError, match="no training view left"):
        mean_of_views(one, 0, 3)


def test_equal_views_score_best(scene):
    view = scene.images[3] / 255
    assert score_view(view, view) == {"psnr": np.inf, "ssim": pytest.approx(1), "flip": 0.0}


def test_psnr_has_a_closed_form():
    assert peak_signal_to_noise(np.full((2, 2, 3), 0.6), np.full((2, 2, 3), 0.5)) == pytest.approx(20)


def test_ssim_is_the_papers_on_one_window():
    """Of two constant views, SSIM is that of their means: (2 a b + c) / (a^2 + b^2 + c), c = 0.01^2."""
    a, b = 0.2, 0.5
    found = score_view(np.full((16, 16, 3), a), np.full((16, 16, 3), b))["ssim"]
    assert found == pytest.approx((2 * a * b + 1e-4) / (a * a + b * b + 1e-4), rel=1e-3)


def test_views_of_other_shapes_are_not_scored():
    with pytest.raises(ValueError, match="one shape"):
        score_view(np.zeros((16, 16, 3)), np.zeros((16, 17, 3)))


def test_true_depths_warp_best(scene):
    def score(view):
        return peak_signal_to_noise(view, scene.images[3] / 255)

    plane = warp_by_plane(scene, 3, fit_plane(scene))
    assert score(warp_by_depth(scene, 3, 4)) > max(score(plane), score(mean_of_views(scene, 3, 4))) + 3


def test_a_view_warped_by_its_depth_onto_itself_is_itself(scene):
    colours, _, _ = _warp(scene, 3, scene.depths[3].ravel(), 3)
    np.testing.assert_allclose(colours.reshape(scene.images[3].shape), scene.images[3] / 255, atol=1e-6)


@pytest.mark.parametrize("make", [spiral_path, circle_path])
def test_paths_are_of_cameras(scene, make):
    poses = make(scene, 7)
    assert poses.shape == (7, 4, 4)
    rotations = poses[:, :3, :3]
    np.testing.assert_allclose(rotations @ rotations.swapaxes(1, 2), np.eye(3)[None].repeat(7, 0), atol=1e-9)
    np.testing.assert_allclose(np.linalg.det(rotations), 1)


def test_a_circle_keeps_its_distance(scene):
    places = circle_path(scene, 8)[:, :3, 3]
    centre = (places[0] + places[4]) / 2
    np.testing.assert_allclose(
        np.linalg.norm(places - centre, axis=1), np.linalg.norm(places[0] - centre), rtol=1e-9
    )


@pytest.mark.parametrize(
    ("content", "says"), [("[]", "expected 1 to"), ("nonsense", "no list of poses"), ("[[1]]", "expected 1")]
)
def test_a_path_of_something_else_is_told(tmp_path, content, says):
    file = tmp_path / "path.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=says):
        read_path(file)


def test_frames_become_a_gif(tmp_path):
    frames = [np.full((8, 6, 3), shade) for shade in (0.0, 0.5, 1.0)]
    write_frames(frames, tmp_path / "a.gif")
    with Image.open(tmp_path / "a.gif") as image:
        assert (image.n_frames, image.size) == (3, (6, 8))


def test_frames_become_a_video_of_even_sides(tmp_path):
    import imageio_ffmpeg

    write_frames([np.full((33, 47, 3), shade) for shade in (0.0, 0.5, 1.0)], tmp_path / "a.mp4")
    reader = imageio_ffmpeg.read_frames(str(tmp_path / "a.mp4"))
    assert next(reader)["size"] == (46, 32)
    shades = [np.frombuffer(frame, np.uint8).mean() / 255 for frame in reader]
    np.testing.assert_allclose(shades, [0, 0.5, 1], atol=0.03)


def test_frames_become_a_folder(tmp_path):
    write_frames([np.zeros((4, 4, 3)), np.ones((4, 4, 3))], tmp_path / "frames")
    assert sorted(file.name for file in (tmp_path / "frames").iterdir()) == ["0000.png", "0001.png"]


@pytest.mark.parametrize(
    ("name", "says"), [("a.avi", "no name for frames"), ("gone/a.gif", "no such folder")]
)
def test_other_outputs_are_refused(tmp_path, name, says):
    with pytest.raises(ValueError, match=says):
        write_frames([np.zeros((4, 4, 3))], tmp_path / name)


def test_a_video_that_fails_leaves_nothing(tmp_path):
    def frames():
        yield np.zeros((32, 32, 3))
        raise RuntimeError("stopped")

    with pytest.raises(RuntimeError, match="stopped"):
        write_frames(frames(), tmp_path / "a.mp4")
    assert not list(tmp_path.iterdir())


def test_eval_scores_each_held_out_view(checkpoint, scene, capsys):
    assert main(["nvs", "eval", str(checkpoint), *SCENE, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert set(found["views"]) == {scene.names[index] for index in scene.held_out}
    assert found["psnr"] == pytest.approx(np.mean([view["psnr"] for view in found["views"].values()]))


@pytest.mark.parametrize("path", ["path.json", "spiral"])
def test_render_writes_frames_along_a_path(path, checkpoint, scene, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("path.json").write_text(json.dumps(scene.poses[:3].tolist()))
    frames = ("--path", path, "--frames", "3", "--output", "a.gif")
    assert main(["nvs", "render", str(checkpoint), *SCENE, *frames]) == 0
    with Image.open("a.gif") as image:
        assert image.n_frames == 3


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["eval", "nowhere", *SCENE], "nowhere is no checkpoint"),
        (["eval", "CHECKPOINT", "--scene", "nowhere"], "no folder nowhere"),
        (["eval", "CHECKPOINT", *SCENE, "--points", "0"], "points must be at least 1"),
        (["eval", "CHECKPOINT", "--scene", "analytic", "--longest-side", "16"], "at least 17 pixels"),
        (["render", "CHECKPOINT", *SCENE, "--output", "a.avi"], "no name for frames"),
        (["render", "CHECKPOINT", *SCENE, "--output", "a.gif", "--frames", "0"], "frames must be from 1"),
        (["train", "--scene", "nowhere", "--workdir", "w", "--rays", "0"], "batch_size must be at least 1"),
        (["train", "--scene", "analytic", "--workdir", "w", "--model", "pvt_tiny"], "does not render views"),
        (["train", "--scene", "analytic", "--workdir", "w", "--mlp", "shfit"], "shift"),
    ],
)
def test_a_wrong_argument_is_one_line(checkpoint, arguments, says, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    arguments = [str(checkpoint) if argument == "CHECKPOINT" else argument for argument in arguments]
    assert main(["nvs", *arguments]) == 2
    *_, error = capsys.readouterr().err.strip().splitlines()  # after what was read
    assert error.startswith(f"shiftaddvit nvs {arguments[0]}: error:")
    assert says in error


def test_a_classifier_does_not_render(tmp_path, capsys):
    model = sav.create_model("deit_nano", num_classes=3, image_size=32)
    save_model(tmp_path / "model", model, init_variables(model, jax.random.key(0)))
    assert main(["nvs", "eval", str(tmp_path / "model"), *SCENE]) == 2
    assert "does not render views" in capsys.readouterr().err


def test_predict_says_that_a_renderer_is_no_classifier(checkpoint, capsys):
    assert main(["info", str(checkpoint)]) == 2
    assert "nvs" in capsys.readouterr().err


def test_the_page_has_a_table_and_the_views(scene, tmp_path):
    view = scene.images[3] / 255
    dense = Rendered(view, scene.depths[3], {}, None)
    rendered = {"dense": dense, "moe": dense._replace(shift_share=np.full((SIDE, SIDE), 0.6))}
    shown = {
        "true": view,
        "rendered": rendered,
        "bounds": (scene.near, scene.far),
        "depth": scene.depths[3],
    }
    file = tmp_path / "views.html"
    write_views_page(file, "Views", "About.", ["view by", "PSNR"], [["dense", "20 dB"]], {"003": shown})
    page = file.read_text()
    assert "<td>20 dB</td>" in page
    assert page.count("data:image/svg+xml") == 1


def test_steps_look_at_training_views_alone(scene):
    config = view_training.default_config()
    config.data.source, config.data.path = "scene", "analytic"
    config.data.image_size = SIDE
    data = view_training.load(config)
    run = view_training.make_run(view_training.begin(config, data), data, None)
    batches = run.batches(0)
    for _ in range(50):
        batch = next(batches)
        assert int(batch["target"]) in scene.training
        assert int(batch["target"]) not in batch["sources"]
        assert set(batch["sources"].tolist()) <= set(scene.training)
