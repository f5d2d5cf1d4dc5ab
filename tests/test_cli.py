import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import shiftaddvit_jax as sav
from shiftaddvit_jax import command
from shiftaddvit_jax import main as training
from shiftaddvit_jax.cli import analysis, main, models
from shiftaddvit_jax.cli.bench import _print_bench
from shiftaddvit_jax.data import load_dataset, load_image


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    model = sav.create_model("pvt_v2_nano", num_classes=10, attention="msa")
    names = {"class_names": list("0123456789")}
    sav.save_model(path, model, sav.init_variables(model, jax.random.key(0)), names)
    return path


@pytest.fixture
def digit(tmp_path):
    path = tmp_path / "digit.png"
    Image.fromarray(load_dataset("digits").test[0]["image"]).save(path)
    return path


def fails(capsys, *arguments):
    """The one line on standard error of a command that must fail."""
    try:
        code = main([str(argument) for argument in arguments])
    except SystemExit as stop:
        code = stop.code
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "error: " in error
    return error


def test_the_command_alone_says_what_to_do_first(capsys):
    assert main([]) == 2
    said = capsys.readouterr().err
    for step in ("shiftaddvit demo\n", "shiftaddvit predict ", "sav.from_pretrained(", "shiftaddvit --help"):
        assert step in said
    assert max(map(len, said.splitlines())) <= 80


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["models", "pvt_v2_nano"], "multiply_adds"),
        (["info", "CHECKPOINT"], "class_names"),
        (["report", "pvt_v2_nano", "--image-size", "32"], "energy_mj"),
        (
            ["reparameterize", "--checkpoint", "CHECKPOINT", "--attention", "linear", "--output", "NEW"],
            "made",
        ),
        (["pack", "--checkpoint", "CHECKPOINT", "--output", "NEW"], "bytes_before"),
        (["export", "CHECKPOINT", "--output", "NEW"], "files"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else value,
)
def test_json_alone_is_all_that_is_printed(arguments, expected, checkpoint, tmp_path, capsys):
    places = {"CHECKPOINT": str(checkpoint), "NEW": str(tmp_path / "new")}
    assert main([*(places.get(word, word) for word in arguments), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert expected in (found[0] if isinstance(found, list) else found)


def test_json_with_a_file_goes_there_beside_what_is_shown(tmp_path, capsys):
    assert main(["models", "pvt_v2_nano", "--json", str(tmp_path / "models.json")]) == 0
    assert "pvt_v2_nano" in capsys.readouterr().out
    (row,) = json.loads((tmp_path / "models.json").read_text())
    assert row["name"] == "pvt_v2_nano"


def test_predict_prints_the_five_most_probable_classes(checkpoint, digit, capsys):
    assert main(["predict", "--checkpoint", str(checkpoint), str(digit), "--json"]) == 0
    (top,) = json.loads(capsys.readouterr().out).values()
    model, variables, _ = sav.load_model(checkpoint)
    probabilities = jax.nn.softmax(jax.jit(model.apply)(variables, load_image(digit, 32)[None]))[0]
    expected = np.argsort(-probabilities)[:5]
    assert [int(entry["class"]) for entry in top] == expected.tolist()
    np.testing.assert_allclose([entry["probability"] for entry in top], probabilities[expected], rtol=1e-4)


def test_predict_shows_a_table_for_each_image(checkpoint, digit, capsys):
    assert main(["predict", "--checkpoint", str(checkpoint), str(digit), str(digit)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert sum("%" in line for line in lines) == 5


def test_eval_prints_accuracy(checkpoint, capsys):
    assert main(["eval", "--checkpoint", str(checkpoint), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["images"] == 599
    assert found["top1"] == pytest.approx(np.trace(found["confusion"]) / 599)


def test_reparameterize_writes_a_checkpoint_and_says_what_it_made(checkpoint, tmp_path, capsys):
    output = tmp_path / "student"
    command = ["reparameterize", "--checkpoint", str(checkpoint), "--output", str(output)]
    assert main([*command, "--attention", "hamming_linear", "--mlp", "shift"]) == 0
    assert "makes params/stage1/block1/attn/dconv" in capsys.readouterr().out
    model, _, description = sav.load_model(output)
    assert model.attention[0] == "hamming_linear"
    assert model.mlp == ("shift",) * 4
    assert description["class_names"] == list("0123456789")


def test_reparameterize_takes_a_rotation(checkpoint, tmp_path):
    command = ["reparameterize", "--checkpoint", str(checkpoint), "--output", str(tmp_path / "codes")]
    assert main([*command, "--attention", "hamming_quadratic", "--rotation", "hadamard_4x"]) == 0
    model, variables, _ = sav.load_model(tmp_path / "codes")
    assert model.primitives.rotation == "hadamard_4x"
    assert variables["rotation"]["stage1"]["block1"]["attn"]["signs"].shape[0] == 4


def test_train_takes_overrides_from_the_command_line(tmp_path, capsys):
    overrides = ["--config.train.steps=2", "--config.data.batch_size=4", "--config.model.attention=linear"]
    command = ["train", "--config", "configs/digits.py", "--workdir", str(tmp_path / "run")]
    assert main([*command, *overrides]) == 0
    assert "top-1" in capsys.readouterr().out
    assert sav.load_model(tmp_path / "run" / "model")[0].attention[0] == "linear"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("--config.train.stepz=10", "unknown config key 'train.stepz'; did you mean 'train.steps'"),
        ("--config.model.attn=linear", "'model.attn'; did you mean 'model.attention'"),
        ("--config.x=1", "unknown config key 'x'; known: "),
        ("--config.train.steps=many", "config.train.steps must be a whole number"),
        ("--config.seed", "config.seed must be a whole number"),
        ("--steps=10", "unknown"),
        ("steps", "unexpected argument 'steps'"),
    ],
)
def test_a_wrong_override_is_refused(override, message, tmp_path, capsys):
    command = ["train", "--config", "configs/digits.py", "--workdir", tmp_path / "run", override]
    assert message.lower() in fails(capsys, *command).lower()
    assert not (tmp_path / "run").exists()


def test_data_is_checked_ahead_of_training(tmp_path, capsys):
    source = ["--config.data.source=folder", f"--config.data.path={tmp_path}"]
    run = ["--config", "configs/digits.py", "--workdir", tmp_path / "run"]
    command = ["train", *run, "--check-data", *source]
    for name in ("a/0.png", "a/1.png", "b/0.png", "b/1.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (4, 4)).save(tmp_path / name)
    assert main(list(map(str, command))) == 0
    assert capsys.readouterr().out == "all 4 images can be read\n"
    (tmp_path / "b/1.png").write_bytes(b"x")
    assert "1 of 4 images can't be read; mend or remove them" in fails(capsys, *command)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def get_config(:\n", ", line 1: SyntaxError: "),
        ("x = 1\nimport nosuch\n", ", line 2: ModuleNotFoundError: No module named 'nosuch'"),
        ("x = 1\n", " has no function get_config"),
        ("get_config = 3\n", " has no function get_config"),
        ("def get_config(): return {'a': 1}\n", " returns dict, expected a ConfigDict"),
        ("def get_config():\n\n    return 1 / 0\n", ", line 3: ZeroDivisionError"),
        ("def get_config():\n    raise ValueError('a\\nb')\n", ", line 2: ValueError: a b"),
        ("raise SystemExit(3)\n", ", line 1: SystemExit: 3"),
        ("x = '\0'\n", ": SyntaxError: "),
        (
            "from shiftaddvit_jax.train import default_config\ndef get_config():\n"
            "    config = default_config()\n    config.train.stepz = 3\n",
            ", line 4: AttributeError: ",
        ),
    ],
)
def test_a_config_file_that_is_none_is_refused_by_file_and_line(text, message, tmp_path, capsys):
    (tmp_path / "mine.py").write_text(text)
    error = fails(capsys, "train", "--config", tmp_path / "mine.py", "--workdir", tmp_path / "run")
    assert "mine.py" in error
    assert message in error
    assert not (tmp_path / "run").exists()


def test_the_module_refuses_a_missing_config_too(tmp_path, capsys):
    assert training.main([f"--config={tmp_path}/nothing.py", f"--workdir={tmp_path}/run"]) == 2
    assert "no config file at" in capsys.readouterr().err


def test_a_config_that_is_not_there_is_the_one_that_comes_with_the_project(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for file in ("configs/digits.py", "digits.py"):
        assert training.load_config(file, ["--config.seed=3"]).seed == 3
    with pytest.raises(ValueError, match=r"no config file at configs/digit\.py; .*configs/digits\.py, "):
        training.find_config("configs/digit.py")
    (tmp_path / "digits.py").touch()
    assert training.find_config("digits.py") == Path("digits.py")


def test_a_wheel_has_the_configs_in_the_package(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "shiftaddvit_jax"
    (package / "configs").mkdir(parents=True)
    (package / "configs" / "digits.py").touch()
    monkeypatch.setattr(training, "__file__", str(package / "main.py"))
    assert training.find_config("configs/digits.py") == package / "configs" / "digits.py"


def test_the_package_is_the_command(tmp_path):
    run = subprocess.run(
        [sys.executable, "-m", "shiftaddvit_jax", "--version"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(Path(sav.__file__).parents[1])},
        capture_output=True,
        text=True,
    )
    assert (run.returncode, run.stdout.strip()) == (0, sav.__version__)


def test_the_program_is_named_as_it_can_be_typed_here(tmp_path, monkeypatch):
    script = tmp_path / "bin" / "shiftaddvit"
    script.parent.mkdir()
    script.touch(mode=0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / ".venv" / "bin" / "python"))
    monkeypatch.setenv("PATH", str(script.parent))
    assert command.program() == "shiftaddvit"
    monkeypatch.setenv("PATH", "")
    monkeypatch.chdir(tmp_path)
    assert command.program() == ".venv/bin/python -m shiftaddvit_jax"
    monkeypatch.chdir(script.parent)
    assert command.program() == f"{tmp_path}/.venv/bin/python -m shiftaddvit_jax"


@pytest.mark.parametrize(
    ("module", "arguments"),
    [(models, ["models", "pvt_v2_nano"]), (analysis, ["report", "pvt_v2_nano", "--image-size", "32"])],
    ids=["models", "report"],
)
def test_no_number_is_cut_where_a_terminal_is_narrow(module, arguments, capsys, monkeypatch):
    tables = []
    monkeypatch.setattr(module, "print_table", tables.append)
    assert main(arguments) == 0
    (table,) = tables
    numbers = {cell for column in table.columns if column.justify == "right" for cell in column.cells}
    for columns in (100, 80, 40):
        monkeypatch.setattr(command, "table_console", lambda columns=columns: Console(width=columns))
        capsys.readouterr()
        command.print_table(table)
        lines = capsys.readouterr().out.splitlines()
        assert numbers - {""} <= {cell.strip() for line in lines for cell in line.split("│")}


@pytest.mark.parametrize("columns", [40, 80])
def test_no_time_is_cut_where_a_terminal_is_narrow(columns, capsys, monkeypatch):
    times = {"median_ms": 1234.56, "p10_ms": 1111.11, "p90_ms": 11111.11}
    rows = [{"name": f"{name} of a long name", **times, "ratio": 1.5, "precision": "int8"} for name in "ab"]
    report = {
        "model": {"name": "pvt_v2_b0", "image_size": 224},
        "batch": 1,
        "rows": rows,
        "shift_share": None,
    }
    report |= {"machine": {"gpu": "none", "compute_capability": "8.6"}, "versions": {}}
    monkeypatch.setattr(command, "table_console", lambda: Console(width=columns))
    _print_bench(report)
    output = capsys.readouterr().out
    for text in ("1,234.56", "1,111.11 to 11,111.11", "1.50", "int8"):
        assert output.count(text) == len(rows)


def test_a_checkpoint_that_is_not_there_is_refused(tmp_path, digit, capsys):
    error = fails(capsys, "predict", "--checkpoint", tmp_path / "none", digit)
    assert error.startswith("shiftaddvit predict: error: no file or folder")


def test_an_image_that_is_none_is_refused_by_name(checkpoint, tmp_path, capsys):
    file = tmp_path / "letter.png"
    file.write_text("Dear reader")
    assert "letter.png cannot be read" in fails(capsys, "predict", "--checkpoint", checkpoint, file)


def test_data_of_other_classes_is_refused(checkpoint, tmp_path, capsys):
    for folder in ("train/cat", "train/dog", "test/cat", "test/dog"):
        (tmp_path / folder).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / folder / "a.png")
    command = ["eval", "--checkpoint", checkpoint, "--data", "folder", "--path", tmp_path]
    assert "are not the data's (cat, dog)" in fails(capsys, *command)


def test_reparameterizing_to_an_unknown_kind_is_refused(checkpoint, tmp_path, capsys):
    command = ["reparameterize", "--checkpoint", checkpoint, "--output", tmp_path / "student", "--mlp", "mo"]
    assert "did you mean 'moe'" in fails(capsys, *command)
    assert not (tmp_path / "student").exists()


def test_reparameterizing_to_nothing_is_refused(checkpoint, tmp_path, capsys):
    command = ["reparameterize", "--checkpoint", checkpoint, "--output", tmp_path / "student"]
    says = "give --attention, --mlp, --projections, --weight-terms, --layers or --rotation"
    assert says in fails(capsys, *command)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["predct"], "unknown command 'predct'; did you mean 'predict'"),
        (["nvs"], "the following arguments are required: COMMAND (see `shiftaddvit nvs --help`)"),
        (["demo", "--sed", "1"], "unknown option '--sed'; did you mean '--seed'"),
        (["demo", "runs"], "unexpected arguments: runs (see `shiftaddvit demo --help`)"),
        (["demo", "--seed", "one"], "argument --seed: invalid int value: 'one' (see"),
        (["pack", "--activations", "int4"], "unknown choice 'int4'; did you mean 'int8'"),
        (["models", "--json", "pvt_v2_b0"], "got 'pvt_v2_b0'; put --json last"),
    ],
)
def test_wrong_usage_is_refused_in_a_line_that_says_what_to_do(arguments, message, capsys):
    assert message in fails(capsys, *arguments)


def test_a_demo_that_cannot_write_says_so(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert "choose another" in fails(capsys, "demo", "--workdir", tmp_path / "file" / "demo")


def test_models_are_listed_with_their_published_sizes(capsys):
    assert main(["models", "pvt_v2_b0", "deit_tiny", "--json"]) == 0
    pvt, deit = json.loads(capsys.readouterr().out)
    assert (pvt["parameters"], pvt["image_size"]) == (3_666_760, 224)
    assert pvt["multiply_adds"] / 1e9 == pytest.approx(0.57, rel=0.03)
    assert deit["multiply_adds"] / 1e9 == pytest.approx(1.26, rel=0.03)
    assert deit["attention"] == ["msa", "linear", "hamming_linear", "hamming_quadratic", "binary_softmax"]


def test_published_weights_are_listed(capsys):
    assert main(["models", "--pretrained"]) == 0
    assert capsys.readouterr().out.split() == sav.list_pretrained()


def test_the_table_of_models_fits_100_columns(capsys):
    assert main(["models", "pvt_v2_nano", "deit_tiny"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert "some: msa, linear, hamming_linear, hamming_quadratic, binary_softmax" in lines
    table = [line for line in lines if line.startswith(("│", "┃"))]
    assert len(table) >= 3
    assert max(map(len, table)) <= 100


def test_report_writes_what_it_prints(checkpoint, tmp_path, capsys):
    file = tmp_path / "report.json"
    command = ["report", str(checkpoint), "--attention", "hamming_linear", "--mlp", "shift"]
    assert main([*command, "--compare", str(checkpoint), "--json", str(file)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert max(map(len, printed)) <= 100
    found = json.loads(file.read_text())
    for name in ("macs", "adds", "shifts", "weight_bytes"):
        modules = [module[name] for module in found["modules"].values()]
        assert found[name] == pytest.approx(sum(modules))
        assert found[name] > 0
    assert found["energy_mj"].keys() == {"compute", "accelerator", "authors"}
    (total,) = (line for line in printed if "total" in line)
    assert f"{found['energy_mj']['accelerator']:.3f}" in total
    saved = 1 - found["energy_mj"]["compute"] / found["compare"]["energy_mj"]["compute"]
    (compared,) = (line for line in printed if "energy, compute" in line)
    assert f"{saved:.1%}" in compared


def test_report_compares_with_the_same_model_made_dense(tmp_path):
    file = tmp_path / "report.json"
    command = ["report", "pvt_v2_nano", "--mlp", "moe", "--shift-share", "0.5", "--image-size", "64"]
    assert main([*command, "--compare", "msa", "--json", str(file)]) == 0
    found = json.loads(file.read_text())
    assert found["shift_share"] == 0.5
    other = found["compare"]["model"]
    assert (other["attention"], other["mlp"], other["image_size"]) == (["msa"] * 4, ["dense"] * 4, 64)


def test_report_takes_the_routing_that_eval_measured(tmp_path, capsys):
    layers = [f"stage{stage}/block1/mlp/{layer}" for stage in (1, 2, 3, 4) for layer in ("fc1", "fc2")]
    measured = tmp_path / "eval.json"
    measured.write_text(json.dumps({"shift_share": dict.fromkeys(layers, 0.25), "top1": 0.9}))
    command = ["report", "pvt_v2_nano", "--mlp", "moe", "--json", f"{tmp_path}/report.json"]
    assert main([*command, "--shift-share", str(measured)]) == 0
    assert "25.0% (25% to 25% by layer) of tokens on shift experts" in capsys.readouterr().out
    modules = json.loads((tmp_path / "report.json").read_text())["modules"]
    # 64 tokens of 32 channels to 128.
    assert modules["stage1/block1/mlp/fc1/shift"]["shifts"] == 0.25 * 64 * 32 * 128


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a checkpoint's folder or a model's name"),
        (["pvt_v2_nano", "--shift-share", "half"], "neither a number nor a file"),
        (["pvt_v2_b0", "--savings"], "give a checkpoint's folder or a model's name"),
        (["pvt_v2_b9"], "did you mean"),
        (["pvt_v2_b0", "--json", "nowhere/report.json"], "there is no such folder"),
        (["pvt_v2_nano", "--batch", "0"], "batch must be at least 1"),
        (["pvt_v2_nano", "--mlp", "moe", "--shift-share", "1.5"], "a share from 0 to 1"),
    ],
)
def test_a_report_that_cannot_be_made_is_refused(arguments, message, capsys):
    assert message in fails(capsys, "report", *arguments)


def test_an_unknown_model_is_refused(capsys):
    assert "did you mean 'deit_tiny'" in fails(capsys, "models", "diet_tiny")


def test_pretrained_weights_become_a_reparameterized_checkpoint(tmp_path, capsys):
    model = sav.create_model("pvt_v2_nano", num_classes=10)
    variables = sav.init_variables(model, jax.random.key(0))
    sav.save_safetensors(model, variables, tmp_path / "weights.safetensors")
    command = ["reparameterize", "--pretrained", str(tmp_path / "weights.safetensors"), "--num-classes", "10"]
    command += ["--model", "pvt_v2_nano", "--attention", "linear", "--output", str(tmp_path / "student")]
    assert main(command) == 0
    assert "drops params/stage1/block1/attn/sr/kernel" in capsys.readouterr().out
    student, found, _ = sav.load_model(tmp_path / "student")
    assert student.attention == ("linear", "linear", "linear", "msa")
    old, new = (tree["params"]["stage1"]["block1"]["attn"] for tree in (variables, found))
    joined = np.concatenate([old["q"]["kernel"], old["kv"]["kernel"]], axis=1)
    np.testing.assert_array_equal(new["qkv"]["kernel"], joined)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give one of --checkpoint and --pretrained"),
        (["--pretrained", "nothing.safetensors", "--model", "pvt_v2_b0"], "no file or folder nothing"),
    ],
)
def test_pretrained_weights_that_cannot_be_had_are_refused(arguments, message, tmp_path, capsys):
    assert message in fails(capsys, "reparameterize", *arguments, "--output", tmp_path / "student")


def test_pack_writes_a_packed_checkpoint_and_says_what_it_saves(tmp_path, capsys):
    model = sav.create_model("pvt_v2_nano", num_classes=10, attention="msa", mlp="shift")
    sav.save_model(tmp_path / "model", model, sav.init_variables(model, jax.random.key(0)))
    command = ["pack", "--checkpoint", f"{tmp_path}/model", "--output", f"{tmp_path}/packed"]
    assert main([*command, "--activations", "int8"]) == 0
    assert "kB became" in capsys.readouterr().out
    packed, _, about = sav.load_model(tmp_path / "packed")
    assert about["packed"]
    assert packed.primitives.activations == "int8"


def test_compile_says_how_many_kernels_it_made_and_where(capsys):
    assert main(["compile", "pvt_v2_nano", "--mlp", "shift"]) == 0
    said = capsys.readouterr().out
    assert "kernels for" in said
    assert "shiftaddvit_jax/kernels" in said


@pytest.mark.parametrize("command", ["compile", "tune"])
def test_kernels_of_an_unknown_model_are_refused_with_the_nearest_names(command, capsys):
    assert "did you mean" in fails(capsys, command, "pvt_v2_b9")


def test_tile_sizes_for_no_images_are_refused(capsys):
    assert "batch must be at least 1, got 0" in fails(capsys, "tune", "pvt_v2_nano", "--batch", "0")


def test_a_command_leaves_loggers_as_they_were(capsys):
    logger = logging.getLogger("shiftaddvit_jax")
    before = (logger.handlers, logger.level, logger.propagate)
    assert command.run_command("train", lambda: logger.info("[step 1]")) == 0
    assert capsys.readouterr().err == "[step 1]\n"
    assert (logger.handlers, logger.level, logger.propagate) == before
