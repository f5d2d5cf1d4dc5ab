import itertools
import json

import jax
import numpy as np
import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax.calibrate.choice import MULTIPLY, SHIFT, fit_choices
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.models import VisionTransformer
from shiftaddvit_jax.models.inspect import outputs_of
from shiftaddvit_jax.models.variables import linear_layers
from shiftaddvit_jax.search import energy_costs, group_layers, make_design, make_loss, make_run, search
from shiftaddvit_jax.search.run import BATCH
from shiftaddvit_jax.search.supernet import make_supernet

CHOICES = ("dense", "shift_two_terms", "moe", "shift")
COSTS_OF = {"dense": MULTIPLY["float32"], "shift": SHIFT, "shift_two_terms": 2 * SHIFT}


@pytest.fixture(scope="module")
def vit():
    model = VisionTransformer(
        "deit_tiny", 32, 3, 16, 2, 2, False, ("msa",), ("dense",), ("dense",), layer_norm_eps=1e-6
    )
    variables = sav.init_variables(model, jax.random.key(0))
    keys = iter(jax.random.split(jax.random.key(1), 400))
    variables = jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape), variables)
    images = np.random.default_rng(1).standard_normal((40, 32, 32, 3), np.float32)
    return model, variables, images


@pytest.fixture(scope="module")
def fitted(vit):
    model, variables, images = vit
    shares = dict.fromkeys(linear_layers(model), 0.6)
    return fit_choices(model, variables, images[:20], shares)


def test_the_supernet_computes_what_each_composed_model_does(vit, fitted):
    model, variables, images = vit
    choices = ("dense", "moe", "dense_int8", "shift", "shift_two_terms")
    logits = make_supernet(model, fitted, choices)
    picks = np.arange(len(fitted)) % len(choices)
    layers = {path: choices[pick] for path, pick in zip(fitted, picks, strict=True)}
    composed, parameters = sav.reparameterize(model, variables, layers=layers)
    for path, choice in layers.items():
        *outer, name = path.split("/")
        module = parameters["params"]
        for part in outer:
            module = module[part]
        module[name] = fitted[path][choice]
    expected = jax.jit(composed.apply)(parameters, images[20:])
    np.testing.assert_allclose(logits(variables, fitted, picks, images[20:]), expected, atol=1e-5)


def test_what_is_dense_keeps_its_parameters(vit, fitted):
    _, variables, _ = vit
    for path, choices in fitted.items():
        layer = variables["params"]
        for part in path.split("/"):
            layer = layer[part]
        np.testing.assert_array_equal(choices["dense"]["kernel"], layer["kernel"])


def test_the_first_layer_is_fitted_as_a_whole_calibration_fits_it(vit, fitted):
    model, variables, images = vit
    _, whole = sav.calibrate(model, variables, images[:20], layers={"block1/attn/qkv": "shift"})
    expected = whole["params"]["block1"]["attn"]["qkv"]["kernel"]
    np.testing.assert_allclose(fitted["block1/attn/qkv"]["shift"]["kernel"], expected, rtol=1e-6)


def test_energies_are_those_of_the_products(vit):
    model, variables, _ = vit
    costs = energy_costs(model, variables, ["block1/mlp/fc1"])
    tokens, products = (32 // 16) ** 2 + 1, 16 * 64
    for choice, picojoules in COSTS_OF.items():
        found = costs.layers["block1/mlp/fc1"][choice]
        assert found == pytest.approx(tokens * products * picojoules * 1e-6)


@pytest.fixture(scope="module")
def searched(vit):
    model, variables, images = vit
    groups = group_layers(linear_layers(model), "branch")
    costs = energy_costs(model, variables, linear_layers(model))
    choices = ("dense", "shift")
    run = make_run(model, variables, groups, choices, costs, images[:20], images[20:])
    loss = make_loss(outputs_of(model, variables, images[20:], BATCH))
    table = costs.of(groups, choices)
    budget = 0.5 * float(table.sum(axis=0).sum())
    design = make_design(len(groups), len(choices), 16)
    found = search(run, loss, groups, choices, costs, budget, design, baselines=True)
    return found, run, loss, table, budget


def test_the_best_found_is_the_best_of_all(searched):
    found, run, loss, table, budget = searched
    within = [
        levels
        for levels in map(np.array, itertools.product((0, 1), repeat=4))
        if table[np.arange(4), levels].sum() <= budget
    ]
    least = min(float(loss(run(levels))) for levels in within)
    assert found.best(budget, 1)[0].loss == pytest.approx(least)
    assert found.best(budget, 1)[0].cost <= budget


def test_the_front_falls_and_stays_within_its_budgets(searched):
    found, *_ = searched
    losses = [point.best.loss for point in found.front]
    assert losses == sorted(losses, reverse=True)
    assert all(point.best.cost <= point.budget * (1 + 1e-6) for point in found.front)
    assert found.uniform["dense"].loss == pytest.approx(0, abs=1e-6)
    assert found.front[-1].greedy == pytest.approx(0, abs=1e-6)


def test_finetuning_brings_a_configuration_nearer(vit):
    model, variables, images = vit
    groups = group_layers(linear_layers(model), "stage")
    costs = energy_costs(model, variables, linear_layers(model))
    loss, levels = make_loss(outputs_of(model, variables, images[:20], BATCH)), np.array([1])
    before, after = (
        float(
            loss(
                make_run(
                    model, variables, groups, ("dense", "shift"), costs, images[:20], images[:20], steps
                )(levels)
            )
        )
        for steps in (0, 20)
    )
    assert after < before


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search") / "dense"
    model = sav.create_model("pvt_v2_nano", num_classes=10, attention="msa")
    sav.save_model(
        folder, model, sav.init_variables(model, jax.random.key(0)), {"class_names": list("0123456789")}
    )
    return folder


def command(checkpoint, *more):
    return ["search", str(checkpoint), "--images", "digits", "--count", "4", *map(str, more)]


@pytest.mark.slow
def test_what_search_writes_other_commands_take(checkpoint, tmp_path, capsys):
    settings = (
        "--budget",
        "3uJ",
        "--groups",
        "stage",
        "--choices",
        "dense,shift",
        "--runs",
        "16",
        "--confirm",
        "1",
        "--baselines",
    )
    files = (
        "--output",
        tmp_path / "found",
        "--json",
        tmp_path / "all.json",
        "--plot",
        tmp_path / "front.png",
    )
    assert main(command(checkpoint, *settings, *files)) == 0
    printed = capsys.readouterr().out
    assert "all shift:" in printed
    assert "random" in printed
    assert (tmp_path / "front.png").stat().st_size > 1000
    report = json.loads((tmp_path / "all.json").read_text())
    best = json.loads((tmp_path / "found" / "1.json").read_text())
    assert best == report["confirmed"][0]
    assert best["cost"] <= 3
    shifts = {path: choice for path, choice in best["layers"].items() if choice == "shift"}
    assert shifts
    layers = ["--layers", str(tmp_path / "found" / "1.json")]
    new = str(tmp_path / "new")
    assert main(["reparameterize", "--checkpoint", str(checkpoint), *layers, "--output", new]) == 0
    assert dict(sav.load_model(new)[0].primitives.layers) == best["layers"]
    images = ["--images", "digits", "--count", "8"]
    assert main(["convert", str(checkpoint), *images, *layers, "--output", new]) == 0
    assert dict(sav.load_model(new)[0].primitives.layers) == best["layers"]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--budget", "6ms"), "another unit: these costs are the accelerator's energy"),
        (("--budget", "six"), "'six' is no budget; expected an energy, such as 120uJ"),
        (("--budget", "1nJ"), "is below the cheapest configuration's"),
        (("--budget", "3uJ", "--runs", "48"), "take 128 runs, or a larger power of two"),
        (("--budget", "3uJ", "--runs", "8"), "take 128 runs, or a larger power of two"),
        (("--budget", "3uJ", "--choices", "dense,shift,moe"), "2 or 4 choices in a search, got 3"),
        (("--budget", "3uJ", "--choices", "dense,shfit"), "unknown choice 'shfit'; did you mean 'shift'"),
        (("--budget", "3uJ", "--choices", "dense,dense"), "--choices names one twice"),
        (("--budget", "3uJ", "--latencies", "none.json"), "no latencies in none.json"),
        (("--budget", "3uJ", "--count", "0"), "--count must be at least 1, got 0"),
        (("--budget", "3uJ", "--images", "here", "--loss", "cross_entropy"), "needs labels"),
    ],
)
def test_bad_input_is_one_line(checkpoint, capsys, more, message):
    groups = ("--groups", "branch")
    assert main(command(checkpoint, *groups, *more)) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert message in lines[-1]
    assert "Traceback" not in "".join(lines)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{}", "holds no layers; expected what"),
        ('{"layers": {"block9": "shift"}}', "unknown linear layer 'block9'"),
    ],
)
def test_other_files_of_layers_are_refused(checkpoint, tmp_path, capsys, text, message):
    file = tmp_path / "layers.json"
    file.write_text(text)
    arguments = ["--checkpoint", str(checkpoint), "--layers", str(file), "--output", str(tmp_path / "new")]
    assert main(["reparameterize", *arguments]) == 2
    assert message in capsys.readouterr().err
