import json
import logging
import os
import shutil
import signal

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax.command import Stopped, run_command
from shiftaddvit_jax.data import load_dataset, preprocess
from shiftaddvit_jax.data.sources import Examples
from shiftaddvit_jax.models import Preprocessing
from shiftaddvit_jax.models.kinds import parse_kinds
from shiftaddvit_jax.train import classification, default_config, evaluate, train_and_evaluate
from shiftaddvit_jax.train.config import RANGES, check_config
from shiftaddvit_jax.train.start import begin, open_teacher
from shiftaddvit_jax.train.step import learning_rate, make_optimizer
from shiftaddvit_jax.train.summary import read_summary


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
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert metrics["history"] == [json.loads(line) for line in lines]
    assert all(np.isfinite(list(entry.values())).all() for entry in metrics["history"])
    assert list(workdir.glob("events.out.tfevents.*"))


def test_running_a_finished_run_again_changes_nothing(run):
    config, workdir, metrics = run
    again = train_and_evaluate(config, workdir)
    assert again["top1"] == metrics["top1"]
    assert again["history"] == metrics["history"]


def assert_same_model(run, expected):
    """The trained models of two workdirs, bit for bit."""
    models = (sav.load_model(workdir / "model")[1] for workdir in (run, expected))
    jax.tree.map(np.testing.assert_array_equal, *models)


def files_of(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_finished_model_is_never_written_again(run, tmp_path, caplog):
    config, workdir, metrics = run
    copy = shutil.copytree(workdir, tmp_path / "run")
    before = files_of(copy)
    shutil.rmtree(copy / "checkpoints")
    with caplog.at_level(logging.INFO):
        assert train_and_evaluate(config, copy)["top1"] == metrics["top1"]
    assert files_of(copy) == {name: data for name, data in before.items() if name.parts[0] != "checkpoints"}
    assert "finished: " in caplog.text
    assert "10 classes, 1198 training and 599 test images: 0 " in caplog.text


def test_a_trained_model_that_is_damaged_is_made_again_from_the_last_step(run, tmp_path, caplog):
    config, workdir, metrics = run
    copy = shutil.copytree(workdir, tmp_path / "run")
    arrays = max((copy / "model").rglob("*"), key=lambda path: path.stat().st_size)
    arrays.write_bytes(arrays.read_bytes()[::-1])
    assert train_and_evaluate(config, copy)["top1"] == metrics["top1"]
    assert "the trained model is not whole and will be made again" in caplog.text
    assert_same_model(copy, workdir)


def test_a_run_goes_on_from_the_step_before_a_damaged_one_bit_for_bit(run, tmp_path, caplog):
    config, workdir, metrics = run
    copy = shutil.copytree(workdir, tmp_path / "run")
    shutil.rmtree(copy / "model")
    shutil.rmtree(copy / "checkpoints" / "4" / "default")
    lines = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(lines[:-5])
    assert train_and_evaluate(config, copy)["top1"] == metrics["top1"]
    assert "the checkpoint of step 4 is not whole" in caplog.text
    assert_same_model(copy, workdir)


def test_a_longer_run_goes_on_and_a_shorter_one_says_how(run, tmp_path, caplog):
    _, workdir, _ = run
    copy = shutil.copytree(workdir, tmp_path / "run")
    with pytest.raises(ValueError, match=r"has done 4 steps, .* set it to 4 or more"):
        train_and_evaluate(tiny_config(steps=3), copy)
    with caplog.at_level(logging.INFO):
        metrics = train_and_evaluate(tiny_config(steps=6), copy)
    assert "resuming at step 4 of 6" in caplog.text
    assert [entry["step"] for entry in metrics["history"]] == [2, 4, 6]
    assert json.loads((copy / "config.json").read_text())["train"]["steps"] == 6
    seconds = sum(2 * 8 / entry["images_per_second"] for entry in metrics["history"])  # of both calls
    assert read_summary(copy)["seconds"] == pytest.approx(seconds)


def test_sigterm_saves_the_step_and_the_same_call_goes_on(run, tmp_path, monkeypatch, capsys):
    config, workdir, metrics = run
    step, calls = classification.train_step, []

    def terminated(*arguments):
        calls.append(1)
        if len(calls) == 3:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(*arguments)

    monkeypatch.setattr(classification, "train_step", terminated)
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="stopped by SIGTERM at step 3 of 4, which is saved; the same command"):
        train_and_evaluate(config, tmp_path / "run")
    assert signal.getsignal(signal.SIGTERM) is before
    assert (tmp_path / "run" / "checkpoints" / "3" / "digests.json").is_file()
    assert train_and_evaluate(config, tmp_path / "run")["top1"] == metrics["top1"]
    assert_same_model(tmp_path / "run", workdir)

    def stop():
        raise Stopped("stopped by SIGTERM", signal.SIGTERM)

    assert run_command("train", stop) == 143
    assert capsys.readouterr().err == "train: stopped by SIGTERM\n"


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


def test_a_checkpoint_of_other_classes_is_refused_with_the_difference(run, tmp_path):
    _, workdir, _ = run
    copy = shutil.copytree(workdir / "model", tmp_path / "model")
    description = json.loads((copy / "model.json").read_text())
    description["class_names"][0] = "zero"
    (copy / "model.json").write_text(json.dumps(description))
    config = tiny_config()
    config.init_from = str(copy)
    with pytest.raises(ValueError, match=r"trained on other classes .*: class 'zero' gone and class '0' new"):
        train_and_evaluate(config, tmp_path / "student")
    assert not (tmp_path / "student").exists()


def test_a_checkpoints_kinds_are_kept_unless_the_config_names_others(run, tmp_path, caplog):
    _, workdir, _ = run
    model, variables, about = sav.load_model(workdir / "model")
    kinds = {"mlp": ("shift", "dense", "dense", "dense")}
    student, variables = sav.reparameterize(model, variables, **kinds)
    sav.save_model(tmp_path / "teacher", student, variables, {"class_names": about["class_names"]})
    config = tiny_config(steps=1)
    config.init_from = str(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="nowhere"):
        train_and_evaluate(config, tmp_path / "run")
    config.init_from = str(tmp_path / "teacher")  # the typo has claimed nothing
    train_and_evaluate(config, tmp_path / "run")
    assert sav.load_model(tmp_path / "run" / "model")[0].mlp == kinds["mlp"]
    written = json.loads((tmp_path / "run" / "config.json").read_text())
    assert written["model"]["mlp"] == "shift,dense,dense,dense"
    assert "back" not in caplog.text

    shutil.rmtree(tmp_path / "run" / "model")
    config.init_from = str(tmp_path / "teacher")
    shutil.move(tmp_path / "teacher", tmp_path / "moved")
    train_and_evaluate(config, tmp_path / "run")  # from its own checkpoint
    assert sav.load_model(tmp_path / "run" / "model")[0].mlp == kinds["mlp"]

    config.init_from = str(tmp_path / "moved")
    config.model.mlp = "dense"
    train_and_evaluate(config, tmp_path / "back")
    assert "config.model.mlp changes the checkpoint's model back: shift to dense" in caplog.text


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


@pytest.mark.parametrize("name", RANGES)
@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), True])
def test_every_number_has_a_range(name, value):
    with pytest.raises(ValueError, match=rf"config\.{name} must be .*, got {value}"):
        check_config(changed(name, value))


def changed(name, value):
    """A config with a value of any type."""
    config = default_config().to_dict()
    group, _, key = name.rpartition(".")
    (config[group] if group else config)[key] = value
    return ml_collections.ConfigDict(config)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("train.steps", 0, "must be at least 1 and whole, got 0"),
        ("train.steps", 10.0, "must be at least 1 and whole, got 10.0"),
        ("train.learning_rate", 0.0, "must be positive and finite, got 0.0"),
        ("train.label_smoothing", 2.0, "must be at least 0 and below 1 and finite, got 2.0"),
        ("model.dropout", 1.0, "must be at least 0 and below 1 and finite"),
        ("model.weight_bits", 9, "must be at least 2 and at most 8 and whole"),
        ("model.threshold", "zer", "unknown config.model.threshold 'zer'; did you mean 'zero'"),
        ("data.augmentation", "flip", "unknown config.data.augmentation 'flip'"),
        ("data.path", 3, "config.data.path must be text, got 3"),
        ("train.latencies", (1.0,), "latencies must be two positive, finite numbers"),
        ("train.latencies", (1.0, -1.0), "latencies must be two positive, finite numbers"),
        ("train.latencies", (1.0, float("nan")), "latencies must be two positive, finite numbers"),
        ("train.stepz", 3, "unknown config key 'train.stepz'; did you mean 'train.steps'"),
    ],
)
def test_values_out_of_range_are_refused_before_anything_is_written(name, value, message, tmp_path):
    with pytest.raises(ValueError, match=message) as caught:
        train_and_evaluate(changed(name, value), tmp_path / "run")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("latencies", [(6.0, 4.0), (1, 2), [["stage1/block1/mlp/fc1", [3.0, 1.0]]], ("a",)])
def test_what_is_in_range_is_taken(latencies):
    check_config(changed("train.latencies", latencies))


def test_a_config_that_lacks_keys_is_refused(tmp_path):
    config = ml_collections.ConfigDict({"train": {"steps": 3}})
    with pytest.raises(ValueError, match=r"the config lacks augment\.color_jitter, .*; begin with"):
        train_and_evaluate(config, tmp_path / "run")


def test_without_clipping_the_gradient_stays_as_it_is():
    params, gradient = {"scale": jnp.ones(2)}, {"scale": jnp.float32([30.0, -40.0])}
    for clip_norm, expected in ((0.0, [30.0, -40.0]), (5.0, [3.0, -4.0])):
        clip = make_optimizer(tiny_config(clip_norm=clip_norm))
        _, state = clip.update(gradient, clip.init(params), params)
        first = optax.tree.get(state, "mu")["scale"] / 0.1  # Adam's first moment
        np.testing.assert_allclose(first, expected, rtol=1e-6)


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


def test_routing_shares_do_not_depend_on_the_batch_size():
    model = sav.create_model("pvt_v2_nano", num_classes=10, mlp=("moe", "dense", "dense", "dense"))
    variables = sav.init_variables(model, jax.random.key(0))
    test = load_dataset("digits").test
    few = Examples(test.images[:10], test.labels[:10], test.read)
    whole, padded = (evaluate(model, variables, few, batch_size=size) for size in (10, 4))
    for name, share in whole["shift_share"].items():
        assert padded["shift_share"][name] == pytest.approx(share, abs=2e-3), name
    assert padded["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    np.testing.assert_array_equal(padded["confusion"], whole["confusion"])


def test_scores_are_those_of_the_models_logits(run):
    _, workdir, _ = run
    model, variables, about = sav.load_model(workdir / "model")
    preprocessing = Preprocessing.from_dict(about["preprocessing"])
    few = load_dataset("digits").test.part(range(21))
    images = np.stack([preprocess(few[index]["image"], preprocessing) for index in range(21)])
    logits = np.asarray(jax.jit(model.apply)(variables, images))
    labels = np.array([few.labels[index] for index in range(21)])
    found = evaluate(model, variables, few, batch_size=8)
    above = (logits > logits[np.arange(21), labels][:, None]).sum(1)  # classes before the true one
    assert found["top1"] == np.mean(above == 0)
    assert found["top5"] == np.mean(above < 5)
    assert found["images"] == 21
    chances = logits - np.log(np.exp(logits).sum(1, keepdims=True))
    np.testing.assert_allclose(found["loss"], -chances[np.arange(21), labels].mean(), rtol=1e-5)


def test_a_finished_run_says_what_it_came_to(run):
    _, workdir, metrics = run
    summary = read_summary(workdir)
    assert summary["config"]["train.steps"] == summary["steps"] == 4
    assert summary["final"] == {name: metrics[name] for name in ("top1", "top5", "loss")}
    assert summary["best"] == {"step": 4, "top1": metrics["top1"], "path": "best/4"}
    assert summary["images"] == 4 * 8
    assert 0 <= summary["input_wait"] < 1
    best = sav.load_model(workdir / "best" / "4")[1]
    jax.tree.map(np.testing.assert_array_equal, best, sav.load_model(workdir / "model")[1])


def test_new_classes_need_a_new_head(run):
    _, workdir, _ = run
    config = tiny_config()
    config.init_from = str(workdir / "model")
    with pytest.raises(
        ValueError, match=r"other classes .*; rename .* new head by config\.model\.new_head=True"
    ):
        begin(config, ("ant", "bee"))
    config.model.new_head = True
    start = begin(config, ("ant", "bee"))
    teacher = sav.load_model(workdir / "model")[1]["params"]
    assert start.model.num_classes == 2
    assert start.variables["params"]["head"]["kernel"].shape[1] == 2
    jax.tree.map(np.testing.assert_array_equal, start.variables["params"]["stage1"], teacher["stage1"])


def test_a_teacher_of_other_classes_is_refused(run):
    _, workdir, _ = run
    config = tiny_config()
    config.distillation.teacher = str(workdir / "model")
    start = begin(config, tuple("0123456789"))
    assert open_teacher(config, start, tuple("0123456789")).model.num_classes == 10
    with pytest.raises(ValueError, match="knows other classes than the data's: class 'a' new"):
        open_teacher(config, start, (*"0123456789", "a"))


def test_what_is_drawn_at_random_follows_the_config(run, tmp_path):
    _, workdir, _ = run
    model, variables, about = sav.load_model(workdir / "model")
    hamming = sav.reparameterize(model, variables, attention="hamming_linear")
    sav.save_model(tmp_path / "teacher", *hamming, {"class_names": about["class_names"]})
    config = tiny_config()
    config.init_from = str(tmp_path / "teacher")
    assert "rotation" not in begin(config, tuple("0123456789")).variables
    config.model.rotation = "hadamard_2x"
    start = begin(config, tuple("0123456789"))
    assert start.model.primitives.rotation == "hadamard_2x"
    assert set(start.variables["rotation"]) == {"stage1", "stage2", "stage3"}
    assert start.config.model.performer_features == "gaussian"
