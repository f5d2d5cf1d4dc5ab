"""Routers whose shares of tokens follow latencies, by their biases."""

from dataclasses import asdict
from functools import partial

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

from shiftaddvit_jax import balance_routers, create_model, load_model, pack, save_model
from shiftaddvit_jax.balance import measured_shares, router_biases, with_router_biases
from shiftaddvit_jax.bench.synthetic import random_images, random_variables
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.data import evaluation_batches, load_dataset
from shiftaddvit_jax.files import write_json
from shiftaddvit_jax.models import model_preprocessing
from shiftaddvit_jax.nn.moe import routing_layers


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_routers_share_tokens_out_to_the_nearest(share):
    model = create_model("pvt_v2_nano", mlp="moe", activations="int8", implementation="xla")
    variables, images = random_variables(model), random_images((3, 32, 32, 3))
    biases = router_biases(model, variables, images, share)
    balanced = with_router_biases(variables, biases)
    _, stats = jax.jit(partial(model.apply, mutable=["routing"]))(balanced, images)
    layers = routing_layers(stats["routing"])
    assert {f"{name}/router" for name in layers} == biases.keys()
    for layer in layers.values():
        tokens = float(layer["tokens"].sum())
        assert layer["tokens"][1] == round(share * tokens)


def test_a_layer_without_a_share_is_named():
    model = create_model("pvt_v2_nano", mlp="moe", implementation="xla")
    variables, images = random_variables(model), random_images((1, 32, 32, 3))
    with pytest.raises(ValueError, match="shift_share lacks the MoE layer stage1/block1/mlp/fc"):
        router_biases(model, variables, images, {"head": 0.5})


@pytest.fixture(scope="module")
def mixture():
    model = create_model("pvt_v2_nano", mlp="moe", implementation="xla")
    return model, random_variables(model), random_images((4, 32, 32, 3))


def test_every_layer_has_its_share_to_the_nearest_token(mixture):
    model, variables, images = mixture
    routers = [name for name in flatten_dict(variables["params"], sep="/") if name.endswith("router/bias")]
    layers = [name.removesuffix("/router/bias") for name in routers]
    shares = dict(zip(layers, np.linspace(0, 1, len(layers)), strict=True))
    balanced = with_router_biases(variables, router_biases(model, variables, images, shares))
    _, stats = jax.jit(partial(model.apply, mutable=["routing"]))(balanced, images)
    found = routing_layers(stats["routing"])
    assert found.keys() == shares.keys()
    for name, layer in found.items():
        assert layer["tokens"][1] == round(shares[name] * float(layer["tokens"].sum()))


def test_shares_follow_latencies(mixture):
    model, variables, images = mixture
    shares = measured_shares(model, balance_routers(model, variables, images, (3.0, 1.0)), images)
    assert next(iter(shares)) == "stage1/block1/mlp/fc1"
    np.testing.assert_allclose(list(shares.values()), 3 / 4, atol=0.5 / 4)  # the last stage has 4 tokens


def test_only_biases_of_routers_change(mixture):
    model, variables, images = mixture
    balanced = balance_routers(model, variables, images)
    old, new = (flatten_dict(each["params"], sep="/") for each in (variables, balanced))
    changed = {name for name in old if not np.array_equal(old[name], new[name])}
    assert changed == {name for name in old if name.endswith("router/bias")}


def test_packed_variables_stay_packed_and_get_the_same_biases(mixture):
    model, variables, images = mixture
    whole = balance_routers(model, variables, images)
    packed = balance_routers(model, pack(model, variables), images)
    old, new = (each["params"]["stage1"]["block1"]["mlp"]["fc1"] for each in (whole, packed))
    assert "kernel" not in new["shift"]
    np.testing.assert_allclose(new["router"]["bias"], old["router"]["bias"], atol=1e-5)


def test_a_model_without_mixtures_is_refused():
    model = create_model("pvt_v2_nano", mlp="shift", implementation="xla")
    with pytest.raises(ValueError, match="the model has no mixtures of experts, so no routers to balance"):
        balance_routers(model, random_variables(model), random_images((1, 32, 32, 3)))


def test_the_command_writes_a_model_with_the_shares_that_latencies_ask_for(mixture, tmp_path, capsys):
    model, variables, _ = mixture
    about = {"preprocessing": asdict(model_preprocessing(model)), "top1": 0.5}
    save_model(tmp_path / "model", model, variables, about)
    layers = [{"name": name, "latencies": [1.0, 3.0]} for name in measured_shares(*mixture)]
    write_json(tmp_path / "latencies.json", {"layers": layers})
    images = ["--images", "digits", "--count", "8", "--latencies", str(tmp_path / "latencies.json")]
    assert main(["balance", str(tmp_path / "model"), *images, "--output", str(tmp_path / "balanced")]) == 0
    assert "8 routers, 8 images" in capsys.readouterr().out
    _, balanced, about = load_model(tmp_path / "balanced")
    digits = load_dataset("digits").train.evenly(8)
    pixels = next(evaluation_batches(digits, preprocessing=model_preprocessing(model), batch_size=8))["image"]
    shares = measured_shares(model, balanced, pixels)
    np.testing.assert_allclose(list(shares.values()), 1 / 4, atol=0.5 / 8)
    assert "top1" not in about
