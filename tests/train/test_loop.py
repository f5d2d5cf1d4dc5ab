import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax.data import load_dataset
from shiftaddvit_jax.models.kinds import parse_kinds
from shiftaddvit_jax.train import default_config, evaluate, train_and_evaluate
from shiftaddvit_jax.train.loop import learning_rate, make_optimizer


def tiny_config(**train):
    config = default_config()
    config.data.batch_size = 8
    config.train.update({"steps": 4, "log_every": 2, "evaluate_every": 4, "checkpoint_every": 2, **train})
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    config = tiny_config()
    return config, workdir, train_and_evaluate(config, workdir)


def test_a_run_leaves_a_model_that_scores_what_it_reported(run):
    _, workdir, metrics = run
    model, variables, description = sav.load_model(workdir / "model")
    found = evaluate(model, variables, load_dataset("digits").test, batch_size=8)
    assert found["top1"] == metrics["top1"] == description["top1"]
    assert description["class_names"] == list("0123456789")
    assert metrics["parameters"] == sum(leaf.size for leaf in jax.tree.leaves(variables))


def test_a_run_logs_means_over_the_steps_between(run):
    _, workdir, metrics = run
    assert [entry["step"] for entry in metrics["history"]] == [2, 4]
    assert metrics["history"] == json.loads((workdir / "history.json").read_text())
    assert all(np.isfinite(list(entry.values())).all() for entry in metrics["history"])
    assert list(workdir.glob("events.out.tfevents.*"))


def test_running_a_finished_run_again_changes_nothing(run):
    config, workdir, metrics = run
    again = train_and_evaluate(config, workdir)
    assert again["top1"] == metrics["top1"]
    assert again["history"] == metrics["history"]


def test_a_workdir_of_another_config_is_refused_by_key(run):
    _, workdir, _ = run
    with pytest.raises(ValueError, match=r"holds a run with another train\.learning_rate; choose another"):
        train_and_evaluate(tiny_config(learning_rate=0.5), workdir)


def test_a_checkpoint_is_reparameterized_where_the_config_says_so(run, tmp_path):
    _, workdir, _ = run
    config = tiny_config(steps=2)
    config.init_from = str(workdir / "model")
    config.model.update({"attention": "ecoformer,msa,msa,msa", "mlp": "moe,dense,dense,dense"})
    file = tmp_path / "latencies.json"
    latencies = {"stage1/block1/mlp/fc1": (3.0, 1.0), "stage1/block1/mlp/fc2": (1.0, 2.0)}
    file.write_text(
        json.dumps({"layers": [{"name": name, "latencies": pair} for name, pair in latencies.items()]})
    )
    config.train.latencies = (str(file),)
    metrics = train_and_evaluate(config, tmp_path / "student")
    written = json.loads((tmp_path / "student" / "config.json").read_text())["train"]["latencies"]
    assert {name: tuple(pair) for name, pair in written} == latencies
    model, variables, _ = sav.load_model(tmp_path / "student" / "model")
    assert model.attention == ("ecoformer", "msa", "msa", "msa")
    layers = {f"stage1/block1/mlp/fc{number}" for number in (1, 2)}
    assert metrics["shift_share"].keys() == layers
    assert all(0 <= share <= 1 for share in metrics["shift_share"].values())
    assert metrics["history"][-1]["balance_loss"] > 0
    assert {f"shift_share/{name}" for name in layers} < metrics["history"][-1].keys()
    # The hash was learned from tokens: a random one has negative means of a kernel that is never negative.
    assert (
        min(
            leaf.min()
            for leaf in jax.tree.leaves(variables["hash"]["stage1"]["block1"]["attn"]["kernel_mean"])
        )
        > 0
    )


def test_a_checkpoint_of_another_size_is_refused(run, tmp_path):
    _, workdir, _ = run
    config = tiny_config()
    config.init_from = str(workdir / "model")
    config.model.name = "pvt_v2_b0"
    with pytest.raises(ValueError, match="has variant pvt_v2_nano, but the config asks for pvt_v2_b0"):
        train_and_evaluate(config, tmp_path / "student")


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path):
    config = tiny_config(learning_rate=1e30, warmup_steps=0)
    with pytest.raises(FloatingPointError, match=r"the loss is (nan|inf) at step 2; lower config"):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run" / "model").exists()
    assert not any((tmp_path / "run" / "checkpoints").glob("[0-9]*"))


def test_a_config_that_cannot_work_leaves_no_workdir(tmp_path):
    config = tiny_config()
    config.model.attention = "msaa"
    with pytest.raises(ValueError, match="did you mean 'msa'"):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [({"steps": 0}, r"train\.steps must be at least 1"), ({"learning_rate": -1.0}, "must be positive")],
)
def test_numbers_out_of_range_are_refused(tmp_path, change, message):
    with pytest.raises(ValueError, match=message):
        train_and_evaluate(tiny_config(**change), tmp_path / "run")


def test_a_negative_seed_is_refused_before_anything_is_written(tmp_path):
    config = tiny_config()
    config.seed = -1
    with pytest.raises(ValueError, match="seed must be at least 0, got -1"):
        train_and_evaluate(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_workdir_that_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot be used: Not a directory; choose another"):
        train_and_evaluate(tiny_config(), tmp_path / "file" / "run")


def test_an_unknown_key_is_an_error():
    with pytest.raises(AttributeError, match="learning_rat"):
        default_config().train.learning_rat = 1.0


def test_the_learning_rate_warms_up_and_follows_a_cosine_to_zero():
    config = tiny_config(steps=100, warmup_steps=10, learning_rate=0.5)
    schedule = learning_rate(config)
    steps = np.array([0, 5, 10, 55, 100])
    cosine = 0.5 * (1 + np.cos(np.pi * (steps[2:] - 10) / 90)) / 2
    np.testing.assert_allclose([schedule(step) for step in steps], [0, 0.25, *cosine], atol=1e-6)


def test_weight_decay_spares_norms_biases_and_embeddings():
    config = tiny_config(steps=10, warmup_steps=0, learning_rate=0.1, weight_decay=0.5)
    optimizer = make_optimizer(config)
    params = {"kernel": jnp.ones((2, 2)), "scale": jnp.ones(2), "bias": jnp.ones(2)}
    params |= {"pos_embed": jnp.ones((3, 2)), "cls_token": jnp.ones(2)}
    updates, _ = optimizer.update(jax.tree.map(jnp.zeros_like, params), optimizer.init(params), params)
    new = optax.apply_updates(params, updates)
    np.testing.assert_allclose(new["kernel"], 1 - 0.1 * 0.5, rtol=1e-6)
    for name in ("scale", "bias", "pos_embed", "cls_token"):
        np.testing.assert_array_equal(new[name], 1)


def test_kinds_by_stage_are_separated_by_commas():
    assert parse_kinds("msa") == "msa"
    assert parse_kinds("msa, sra,linear,msa") == ("msa", "sra", "linear", "msa")


def test_evaluation_counts_every_image_once(run):
    _, workdir, _ = run
    model, variables, _ = sav.load_model(workdir / "model")
    test = load_dataset("digits").test
    found = evaluate(model, variables, test, batch_size=8)
    counts = np.bincount(np.asarray(test.labels), minlength=10)
    np.testing.assert_array_equal(found["confusion"].sum(axis=1), counts)
