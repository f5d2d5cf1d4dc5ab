import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_images, make_tiny

import shiftaddvit_jax as sav
from shiftaddvit_jax.bench import latency as timing
from shiftaddvit_jax.bench import measure_latency, profile_latency
from shiftaddvit_jax.bench.synthetic import random_variables
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.files import read_latencies
from shiftaddvit_jax.main import load_config
from shiftaddvit_jax.models.variables import linear_layers
from shiftaddvit_jax.names import LAYER_CHOICES
from shiftaddvit_jax.nn.moe import EXPERTS
from shiftaddvit_jax.pictures import plot_expert_latency
from shiftaddvit_jax.search import read_costs

MIXED = {"attention": "hamming_linear", "mlp": ("moe", "dense", "dense", "dense")}
MOE = ["pvt_v2_nano", "--mlp", "moe"]
LAYERS = ["stage1/block1/mlp/fc1", "stage1/block1/mlp/fc2"]


@pytest.fixture(scope="module")
def model():
    return sav.create_model("pvt_v2_nano", num_classes=10, **MIXED)


@pytest.fixture(scope="module")
def variables(model):
    return random_variables(model)


@pytest.fixture(autouse=True)
def short_turns(monkeypatch):
    monkeypatch.setattr(timing, "SECONDS_A_TURN", 0.0)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """The folder with what ``shiftaddvit measure-latency`` wrote."""
    folder = tmp_path_factory.mktemp("latency")
    command = ["measure-latency", "pvt_v2_nano", "--mlp", "moe,dense,dense,dense", "--rounds", "1"]
    command += ["--implementation", "xla", "--json", f"{folder}/a.json", "--plot", f"{folder}/a.png"]
    assert main(command) == 0
    return folder


def test_a_line_through_points_on_a_line_is_that_line():
    base, slope = timing.fit_line([16, 32, 64], [0.5 + 0.01 * tokens for tokens in (16, 32, 64)])
    np.testing.assert_allclose((base, slope), (0.5, 0.01), rtol=1e-12)


def test_the_line_is_the_one_of_least_squares():
    tokens, milliseconds = np.array([1.0, 2, 4, 8]), np.array([1.0, 3, 2, 7])
    centred = tokens - tokens.mean()
    slope = centred @ milliseconds / (centred @ centred)
    expected = milliseconds.mean() - slope * tokens.mean(), slope
    np.testing.assert_allclose(timing.fit_line(tokens, milliseconds), expected, rtol=1e-12)


def test_a_line_needs_two_points():
    with pytest.raises(ValueError, match="two different numbers of tokens"):
        timing.fit_line([4, 4], [1.0, 2.0])


def test_the_call_is_taken_off_medians_and_all_take_turns(monkeypatch):
    turns = []

    def fake(run, seconds):
        turns.append(run)
        return [{"a": 0.5, "b": 0.01}.get(run, 0.02)] * 3

    monkeypatch.setattr(timing, "time_runs", fake)
    medians, call_ms = timing._median_ms({"first": "a", "second": "b"}, rounds=2)
    assert call_ms == 0.02
    assert medians == {"first": 0.48, "second": 1e-6}
    assert turns[:2] == turns[3:5] == ["a", "b"]


@pytest.mark.parametrize("packed", [False, True], ids=["xla", "kernels"])
def test_a_profile_has_every_part_of_the_model_once(packed):
    model, variables = make_tiny(mlp="moe")
    expected = {"embed", "block1/norm1", "block1/attn", "block1/norm2", "block1/mlp", "head"}
    if packed:
        pytest.importorskip("tvm")
        variables = sav.pack(model, variables)
        expected = {"embed", "block1", "head"}
    profile = profile_latency(model, variables, make_images(1), rounds=1)
    assert profile.module_ms.keys() == expected
    assert min(profile.module_ms.values()) > 0
    explained = sum(profile.module_ms.values()) + profile.call_ms
    np.testing.assert_allclose(profile.unexplained_ms + explained, profile.whole_ms)


def test_on_kernels_a_stages_norm_is_timed_with_what_reads_its_output():
    pytest.importorskip("tvm")
    model = sav.create_model("pvt_v2_nano", num_classes=10)
    packed = sav.pack(model, sav.init_variables(model, jax.random.key(0)))
    profile = profile_latency(model, packed, np.zeros((1, 32, 32, 3), np.float32), rounds=1)
    assert "stage2/patch_embed" in profile.module_ms
    assert not any(name.endswith("/norm") for name in profile.module_ms)


def test_packed_experts_are_timed_on_their_kernels():
    pytest.importorskip("tvm")
    model, variables = make_tiny(mlp="moe")
    packed = sav.pack(model, variables)
    layer, inputs, tokens = timing._moe_layers(model, packed, 1)["block1/mlp/fc1"]
    x = jnp.zeros((tokens, inputs))
    for expert in timing._experts(layer, packed["params"]["block1"]["mlp"]["fc1"], x):
        assert "shiftaddvit.linear" in str(jax.make_jaxpr(expert)(x))


def test_experts_are_timed_at_each_layers_shape(model, variables):
    report = measure_latency(model, variables, batch=2, rounds=1)
    assert [layer["name"] for layer in report["layers"]] == LAYERS
    # 8 x 8 tokens of two images; the MLP widens 32 channels fourfold.
    shapes = [(layer["tokens"], layer["inputs"], layer["outputs"]) for layer in report["layers"]]
    assert shapes == [(128, 32, 128), (128, 128, 32)]
    for layer in report["layers"]:
        assert layer["counts"] == [32, 64, 128, 256]
        for index, expert in enumerate(("dense", "shift")):
            assert layer["latencies"][index] == layer[expert]["median_ms"][2] > 0
    json.dumps(report)


def test_the_file_is_read_back_as_the_medians_at_each_layers_tokens(measured):
    layers = json.loads((measured / "a.json").read_text())["layers"]
    expected = {
        layer["name"]: tuple(
            layer[expert]["median_ms"][layer["counts"].index(layer["tokens"])] for expert in EXPERTS
        )
        for layer in layers
    }
    assert read_latencies(measured / "a.json") == expected
    assert list(expected) == LAYERS


def test_the_config_takes_the_files_name_on_the_command_line(measured, tmp_path, capsys):
    override = f"--config.train.latencies={measured}/a.json"
    assert load_config("configs/digits.py", [override]).train.latencies == (f"{measured}/a.json",)
    command = ["train", "--config", "configs/digits.py", "--workdir", str(tmp_path / "run")]
    assert main([*command, f"--config.train.latencies={measured}/none.json"]) == 2
    assert "no latencies in" in capsys.readouterr().err


def test_a_file_of_something_else_is_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"rows": []}')
    with pytest.raises(ValueError, match="holds no latencies; expected what"):
        read_latencies(tmp_path / "other.json")


def test_the_fit_is_drawn(measured, tmp_path):
    report = json.loads((measured / "a.json").read_text())
    figure = plot_expert_latency(report, tmp_path / "experts.svg")
    layer = report["layers"][0]
    line, points = figure.axes[0].lines[:2]
    np.testing.assert_allclose(points.get_ydata(), 1e3 * np.array(layer["dense"]["median_ms"]))
    base, slope = timing.fit_line(layer["counts"], layer["dense"]["median_ms"])
    np.testing.assert_allclose(line.get_ydata(), 1e3 * (base + slope * line.get_xdata()), atol=1e-9)
    assert "µs" in figure.get_supylabel()
    assert (measured / "a.png").stat().st_size > 10_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["pvt_v2_nano"], "no mixtures of experts to time; give it --mlp moe"),
        (
            ["pvt_v2_nano", "--mlp", "moe", "--implementation", "xla", "--rounds", "0"],
            "rounds must be at least 1",
        ),
        (
            ["pvt_v2_nano", "--mlp", "moe", "--implementation", "xla", "--batch", "0"],
            "batch must be at least 1",
        ),
        (["pvt_v2_nan", "--mlp", "moe"], "did you mean 'pvt_v2_nano'"),
        ([*MOE, "--json", "nowhere/a.json"], "there is no such folder"),
        ([*MOE, "--plot", "a.txt"], "must end in .png or .svg"),
    ],
)
def test_what_cannot_be_measured_is_refused(arguments, message, capsys):
    assert main(["measure-latency", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_every_layer_is_timed_as_each_of_its_choices(tmp_path, capsys, monkeypatch):
    def medians(runs, rounds):
        for run in runs.values():
            run()
        return {name: 100.0 if name == timing.WHOLE else 0.5 for name in runs}, 0.25

    monkeypatch.setattr(timing, "_median_ms", medians)
    command = ["measure-latency", "pvt_v2_nano", "--choices", "--rounds", "1", "--implementation", "xla"]
    assert main([*command, "--json", str(tmp_path / "a.json")]) == 0
    assert "The rest of the dense model takes" in capsys.readouterr().out
    costs = read_costs(tmp_path / "a.json")
    layers = linear_layers(sav.create_model("pvt_v2_nano"))
    assert sorted(costs.layers) == sorted(layers)
    assert all(set(choices) == set(LAYER_CHOICES) for choices in costs.layers.values())
    assert costs.rest == 100 - 0.5 * len(layers)
    assert costs.of({"all": layers}, LAYER_CHOICES).shape == (1, len(LAYER_CHOICES))


def test_choices_have_no_picture_of_experts(tmp_path, capsys):
    command = ["measure-latency", "pvt_v2_nano", "--choices", "--plot", str(tmp_path / "a.png")]
    assert main(command) == 2
    assert "--plot draws experts; leave it out with --choices" in capsys.readouterr().err
