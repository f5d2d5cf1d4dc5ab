import json

import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.costs import (
    accelerator_cost,
    compute_energy,
    cost_report,
    count_products,
    energy_savings,
    group_modules,
    sum_costs,
    weight_bytes,
)
from shiftaddvit_jax.models.variables import variable_shapes


@pytest.fixture(scope="module")
def model():
    return sav.create_model("pvt_v2_nano", num_classes=10, attention="hamming_linear", mlp="moe")


@pytest.fixture(scope="module")
def variables(model):
    return variable_shapes(model)


@pytest.fixture(scope="module")
def report(model, variables):
    return cost_report(model, variables, shift_share=0.5)


def test_totals_are_those_of_the_products(model, variables, report):
    products = count_products(model, variables, 0.5)
    for primitive in ("macs", "adds", "shifts", "popcounts"):
        counts = [product.count for product in products if product.primitive == primitive]
        assert report[primitive] == pytest.approx(sum(counts))
    assert report["energy_mj"] == pytest.approx(
        {
            "compute": sum(map(compute_energy, products)),
            "accelerator": sum(accelerator_cost(product).energy_mj for product in products),
            "authors": sum(accelerator_cost(product, mode="authors").energy_mj for product in products),
        }
    )
    assert report["latency_ms"] == pytest.approx(
        1e3 * sum(accelerator_cost(product).latency_s for product in products)
    )
    assert report["weight_bytes"] == pytest.approx(sum(weight_bytes(model, variables).values()))


def test_modules_and_groups_add_up_to_the_totals(report):
    total = sum_costs(report["modules"].values())
    assert {name: report[name] for name in total} == total
    grouped = sum_costs(group_modules(report["modules"]).values())
    assert grouped["energy_mj"] == pytest.approx(total["energy_mj"])
    assert {"stage1/patch_embed", "stage1/attn", "stage1/mlp", "head"} <= group_modules(
        report["modules"]
    ).keys()


def test_a_module_holds_its_own_costs(report):
    # 64 tokens of 32 channels to 128, half of them by each expert, 5 bits a shift weight.
    shift = report["modules"]["stage1/block1/mlp/fc1/shift"]
    assert shift["shifts"] == 0.5 * 64 * 32 * 128
    assert shift["macs"] == 0
    assert shift["activation_bytes"] == 0.5 * 64 * 128 * 4
    assert shift["weight_bytes"] == 32 * 128 * 5 / 8 + 128 * 4
    assert shift["energy_mj"]["compute"] == pytest.approx(shift["shifts"] * 0.93e-9)


def test_the_model_without_variables_is_the_one_not_packed(model, report):
    assert cost_report(model, shift_share=0.5) == report


def test_formats_that_the_authors_do_not_know_lack_their_energy(model, variables):
    energy = cost_report(model, variables, number_format="float16")["energy_mj"]
    assert energy.keys() == {"compute", "accelerator"}


def test_int8_costs_less_than_float32_by_every_model(model, variables):
    narrow, wide = (
        cost_report(model, variables, number_format=number_format)["energy_mj"]
        for number_format in ("int8", "float32")
    )
    assert all(narrow[name] < wide[name] for name in narrow)


def test_additive_attention_and_mixtures_save_the_papers_headline_against_msa():
    (row,) = energy_savings(["pvt_v2_b0"])
    energy = row["energy_mj"]
    saved = {name: 1 - ours / energy["msa"][name] for name, ours in energy["shiftaddvit"].items()}
    assert min(saved.values()) >= 0.429
    assert all(energy["shiftaddvit"][name] < energy["sra"][name] for name in saved)


def test_a_model_without_spatial_reduction_is_not_compared_with_it(tmp_path, monkeypatch):
    monkeypatch.setattr("shiftaddvit_jax.cli.analysis.PAPER_MODELS", ["deit_tiny"])
    assert main(["report", "--savings", "--json", str(tmp_path / "savings.json")]) == 0
    (row,) = json.loads((tmp_path / "savings.json").read_text())
    assert row["energy_mj"].keys() == {"shiftaddvit", "msa"}
