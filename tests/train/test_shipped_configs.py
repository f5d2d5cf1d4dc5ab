"""The configs that come with the project, and what the command line makes of them."""

import pytest

from shiftaddvit_jax import main as training
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.main import find_config, load_config
from shiftaddvit_jax.models import list_models
from shiftaddvit_jax.train import default_config
from shiftaddvit_jax.train.config import check_config, with_steps
from shiftaddvit_jax.train.plan import print_plan
from shiftaddvit_jax.train.recipes import STAGES
from shiftaddvit_jax.train.start import begin, with_files_read
from shiftaddvit_jax.train.step import learning_rate, make_optimizer, make_recipe

IMAGENET = ("pvt_tiny", "pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2", "deit_tiny", "deit_small")
SHIPPED = (
    "digits.py",
    "fashion_mnist.py",
    "finetune_folder.py",
    "novel_views.py",
    "finetune_folder.py:hf:OpenGVLab/pvt_v2_b2",
    *(f"{name}_imagenet.py:{stage}" for name in IMAGENET for stage in STAGES),
)


@pytest.mark.parametrize("file", SHIPPED)
def test_a_shipped_config_can_work(file):
    config = load_config(file, [])
    check_config(config)
    make_recipe(config)
    make_optimizer(config)


def test_every_config_is_among_these():
    folder = find_config("configs/digits.py").parent
    assert {path.name for path in folder.glob("*.py")} == {name.partition(":")[0] for name in SHIPPED}


def test_the_papers_stages_have_its_lengths_and_rates():
    config = with_steps(load_config("pvt_v2_b0_imagenet.py:moe", []), 1_281_167)
    assert config.train.steps == 500_456
    assert config.train.warmup_steps == 25_023
    rate = learning_rate(config)
    assert float(rate(0)) == pytest.approx(5e-8)
    assert float(rate(25_023)) == pytest.approx(5e-6)  # 1e-5 for 512 images, here 256
    assert float(rate(500_455)) == pytest.approx(5e-7, rel=1e-3)
    assert config.init_from == "runs/pvt_v2_b0/add_attention/model"
    assert config.model.name in list_models()


def test_an_unknown_stage_is_refused_with_the_configs_line():
    with pytest.raises(
        ValueError, match=r"pvt_tiny_imagenet\.py, line \d+: ValueError: unknown stage 'moee'"
    ):
        load_config("pvt_tiny_imagenet.py:moee", [])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.train.steps=1e3", r"config\.train\.steps must be a whole number, such as 1000, got '1e3'"),
        ("--config.train.learning_rate=fast", r"learning_rate must be a number, such as 1e-3, got 'fast'"),
        ("--config.train.stepz=3", "unknown config key 'train.stepz'; did you mean 'train.steps'"),
    ],
)
def test_an_override_says_what_its_key_wants(override, message):
    with pytest.raises(ValueError, match=message):
        load_config("digits.py", [override])


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("writers", ("csv",), "unknown config.train.writers 'csv'"),
        ("rates", ("stage1/*",), r"must hold pairs of a name and a value, such as \(\"stage1/\*\", 0\.1\)"),
        ("rates", (("stage1/*", -1.0),), "must hold pairs"),
        ("optimizer_options", ("b2",), "must hold pairs"),
        ("frozen", (3,), "must hold names' patterns, got 3"),
        ("clip_value", 1.0, "clip_norm and clip_value are both set"),
        ("optimizer", "adan", "did you mean 'adamw'"),
        ("ema_warmup", "yes", "must be true or false, got 'yes'"),
    ],
)
def test_what_cannot_work_is_refused_by_its_key(name, value, message):
    config = default_config().to_dict()
    config["train"][name] = value
    with pytest.raises(ValueError, match=message):
        check_config(type(default_config())(config))


def test_epochs_that_a_warmup_fills_are_refused():
    config = default_config()
    config.train.update({"epochs": 2.0, "warmup_epochs": 2.0})
    with pytest.raises(ValueError, match="a warm-up of 38 steps and a cool-down of 0 leave nothing of 38"):
        with_steps(config, 1203)


def test_a_file_of_latencies_becomes_its_numbers(tmp_path):
    config = default_config()
    assert with_files_read(config) is config
    config.train.latencies = (str(tmp_path / "none.json"),)
    with pytest.raises(ValueError, match="no latencies in"):
        with_files_read(config)


@pytest.mark.slow
def test_a_plan_says_what_the_run_would_be(capsys, monkeypatch):
    plans = []
    monkeypatch.setattr(
        "shiftaddvit_jax.train.plan.print_plan", lambda plan: plans.append(plan) or print_plan(plan)
    )
    overrides = ("data.batch_size=8", "train.epochs=2.0", "train.ema_decay=0.9")
    command = ["train", "--config", "configs/digits.py", "--plan"]
    assert main([*command, *(f"--config.{override}" for override in overrides)]) == 0
    (plan,) = plans
    assert plan["steps"] == round(2 * 1198 / 8)
    assert plan["images"] == (1198, 599)
    assert plan["parameters"] == 316_042
    assert plan["bytes"]["parameters"] == plan["bytes"]["average"] == 4 * 316_042
    assert plan["bytes"]["step"] > plan["bytes"]["parameters"]
    assert plan["learning_rates"][1] == (100, pytest.approx(2e-3))
    assert plan["step_seconds"] > 0
    assert plan["seconds"] >= plan["steps"] * plan["step_seconds"]
    shown = capsys.readouterr().out
    assert "316,042 parameters, 10 classes" in shown
    assert max(map(len, shown.splitlines())) <= 100


def test_a_run_needs_a_workdir_and_a_plan_does_not(capsys):
    assert training.main(["--config", "digits.py"]) == 2
    assert "--workdir is missing; give the run a folder" in capsys.readouterr().err


def test_layers_are_read_from_a_file_of_search(tmp_path):
    file = tmp_path / "1.json"
    file.write_text('{"layers": {"stage1/block1/mlp/fc1": "shift"}}')
    config = with_files_read(load_config("configs/digits.py", [f"--config.model.layers={file}"]))
    assert config.model.layers == (("stage1/block1/mlp/fc1", "shift"),)
    model = begin(config, ("a", "b")).model
    assert dict(model.primitives.layers) == {"stage1/block1/mlp/fc1": "shift"}


def test_other_layers_are_refused():
    config = default_config()
    config.model.layers = (("stage1/block1/mlp/fc1", "shfit"),)
    with pytest.raises(ValueError, match=r"config\.model\.layers must be a file's name, or hold pairs"):
        check_config(config)
