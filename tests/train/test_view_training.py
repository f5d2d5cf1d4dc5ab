"""Training on a scene: by the loop that classifiers have, to the same result however often it stops."""

import json

import jax
import numpy as np
import pytest

from shiftaddvit_jax.checkpoints import load_model
from shiftaddvit_jax.data.scenes import load_scene
from shiftaddvit_jax.novel_views import render_view
from shiftaddvit_jax.train import default_config, train_and_evaluate
from shiftaddvit_jax.train.views import ViewsRun

SIDE, STEPS = 32, 6


def _config(**changes):
    config = default_config()
    config.model.name = "gnt_nano"
    config.data.source, config.data.path = "scene", "analytic"
    config.data.image_size, config.data.batch_size = SIDE, 32
    config.train.weight_decay = 0.0
    config.train.learning_rate, config.train.warmup_steps = 5e-3, 2
    config.train.steps, config.train.checkpoint_every, config.train.evaluate_every = STEPS, 3, STEPS
    config.train.log_every, config.train.writers = 1, ("jsonl",)
    config.train.ema_decay = 0.5
    config.update_from_flattened_dict(changes)
    return config


class Killed(BaseException):
    """What stops a run between two steps."""


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run in one go, and the same run that was killed after step 4, of which step 3 was saved."""
    folder = tmp_path_factory.mktemp("views")
    whole = train_and_evaluate(_config(), folder / "whole")

    def take_step(run, state, batch, key, step):
        if step == 4:
            raise Killed
        return take(run, state, batch, key, step)

    with pytest.MonkeyPatch.context() as patch:
        take = ViewsRun.take_step
        patch.setattr(ViewsRun, "take_step", take_step)
        with pytest.raises(Killed):
            train_and_evaluate(_config(), folder / "parts")
    return folder, whole, train_and_evaluate(_config(), folder / "parts")


def _leaves(folder, name):
    return jax.tree.leaves(load_model(folder / name / "model")[1])


@pytest.mark.slow
def test_the_loss_falls(runs):
    history = runs[1]["history"]
    assert history[-1]["loss"] < 0.5 * history[0]["loss"]


@pytest.mark.slow
def test_what_is_logged_is_the_loss_and_its_psnr(runs):
    entry = runs[1]["history"][2]
    assert entry["psnr"] == pytest.approx(-10 * np.log10(entry["task_loss"]), rel=1e-4)
    assert entry["rays_per_second"] > 0


@pytest.mark.slow
def test_the_score_is_that_of_the_rendered_views(runs):
    folder, whole, _ = runs
    model, variables, about = load_model(folder / "whole" / "model")
    scene = load_scene("analytic", longest_side=SIDE)
    errors = []
    for index in scene.held_out:
        view = render_view(
            model, variables, scene, scene.poses[index], intrinsics=scene.intrinsics[index], chunk=300
        )
        errors.append(np.mean((view.colours - scene.images[index] / 255) ** 2))
    assert whole["psnr"] == pytest.approx(np.mean(-10 * np.log10(errors)), abs=1e-3)
    assert about["psnr"] == whole["psnr"]


@pytest.mark.slow
def test_an_average_is_scored_beside(runs):
    assert runs[1]["average"]["psnr"] != runs[1]["psnr"]


@pytest.mark.slow
def test_the_summary_counts_rays(runs):
    summary = json.loads((runs[0] / "whole" / "summary.json").read_text())
    assert summary["rays"] == STEPS * 32
    assert summary["final"]["psnr"] == runs[1]["psnr"]


@pytest.mark.slow
def test_another_model_is_not_resumed(runs):
    with pytest.raises(ValueError, match=r"another model\.mlp"):
        train_and_evaluate(_config(**{"model.mlp": "shift"}), runs[0] / "whole")


@pytest.mark.slow
def test_another_scene_is_not_resumed(runs):
    with pytest.raises(ValueError, match=r"another data\.path"):
        train_and_evaluate(_config(**{"data.path": "analytic:0.5"}), runs[0] / "whole")


@pytest.mark.slow
def test_a_mixture_starts_from_a_trained_model(runs, tmp_path):
    folder = runs[0]
    changes = {
        "init_from": str(folder / "whole"),
        "model.name": "",
        "model.layers": (("embed/fc1", "moe"), ("block2/ray/mlp/fc1", "moe")),
        "model.attention": "hamming_linear",
        "train.steps": 1,
    }
    found = train_and_evaluate(_config(**changes), tmp_path / "moe")
    assert found["history"][0]["balance_loss"] > 0
    assert found["shift_share"].keys() == {"embed/fc1", "block2/ray/mlp/fc1"}
    assert all(0 <= share <= 1 for share in found["shift_share"].values())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"mixing.mixup_alpha": 0.2}, r"config\.mixing\.mixup_alpha is for classifiers"),
        ({"train.label_smoothing": 0.0}, r"config\.train\.label_smoothing is for classifiers"),
        ({"train.remat": True}, r"config\.train\.remat is for classifiers"),
        ({"data.path": ""}, r"config\.data\.path is empty"),
        ({"data.path": "nowhere"}, "no folder nowhere"),
        ({"data.near": 2.0, "data.far": 1.0}, "0 < near < far"),
        ({"data.source": "digits", "data.near": 2.0}, "are depths of a scene"),
        ({"model.name": "pvt_v2_nano"}, "does not render views"),
        ({"init_from": "nowhere", "model.name": ""}, "is no checkpoint of this project"),
    ],
)
def test_what_a_scene_cannot_have_is_told(changes, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        train_and_evaluate(_config(**changes), tmp_path / "run")


@pytest.mark.slow
def test_a_stopped_run_ends_bit_for_bit_as_one_that_was_not(runs):
    folder, whole, again = runs
    for ours, theirs in zip(_leaves(folder, "whole"), _leaves(folder, "parts"), strict=True):
        np.testing.assert_array_equal(ours, theirs)
    assert whole["psnr"] == again["psnr"]
