import json

import numpy as np
import pytest

from shiftaddvit_jax.search.costs import Costs, parse_budget, read_costs
from shiftaddvit_jax.search.groups import group_layers

LAYERS = {"block1/mlp/fc1": {"dense": 2.0, "shift": 1.0}, "block1/mlp/fc2": {"dense": 3.0, "shift": 1.5}}


def written(tmp_path, **changes):
    layers = [{"name": name, "choices": choices} for name, choices in LAYERS.items()]
    file = tmp_path / "latencies.json"
    file.write_text(json.dumps({"unit": "ms", "rest": 0.5, "layers": layers} | changes))
    return file


def test_a_file_of_latencies_is_read(tmp_path):
    costs = read_costs(written(tmp_path))
    assert costs == Costs("ms", 0.5, LAYERS)
    np.testing.assert_array_equal(costs.of({"block1": list(LAYERS)}, ["dense", "shift"]), [[5.0, 2.5]])
    assert costs.latencies()["block1/mlp/fc1"] == (2.0, 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"unit": "miles"}, "has the unit 'miles'; expected ms or uJ"),
        ({"rest": -1}, "the rest takes -1.0; expected a finite number of at least 0"),
        ({"layers": [{"name": "a", "choices": {"dense": 0}}]}, "a as dense takes 0.0; expected a positive"),
        ({"layers": [{"name": "a", "latencies": [1, 2]}]}, "holds no latencies by choice; expected what"),
    ],
)
def test_other_files_are_refused(tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        read_costs(written(tmp_path, **changes))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"no latencies in .*: No such file"):
        read_costs(tmp_path / "none.json")


def test_layers_without_latencies_are_refused():
    with pytest.raises(ValueError, match="no latency of block1/mlp/fc1 as moe; measure this model"):
        Costs("ms", 0.0, LAYERS).of({"block1": list(LAYERS)}, ["dense", "moe"])


@pytest.mark.parametrize(
    ("text", "unit", "expected"),
    [
        ("6ms", "ms", 6.0),
        (" 250 us", "ms", 0.25),
        ("1e-3s", "ms", 1.0),
        ("120uJ", "uJ", 120.0),
        ("2µJ", "uJ", 2.0),
    ],
)
def test_budgets_have_units(text, unit, expected):
    assert parse_budget(text, unit) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("text", "unit", "message"),
    [
        ("6", "ms", "'6' is no budget; expected a time, such as 6ms"),
        ("ms", "ms", "is no budget"),
        ("-6ms", "ms", "is no budget"),
        ("nanms", "ms", "is no budget"),
        ("6 parsecs", "uJ", "expected an energy, such as 120uJ"),
        ("6ms", "uJ", "another unit: these costs are the accelerator's energy.*give --latencies"),
        ("6mJ", "ms", "another unit: these costs are latencies, so expected a time"),
    ],
)
def test_other_budgets_are_refused(text, unit, message):
    with pytest.raises(ValueError, match=message):
        parse_budget(text, unit)


def test_groups_are_layers_branches_blocks_or_stages():
    paths = [
        f"stage{stage}/block1/{layer}" for stage in (10, 2) for layer in ("mlp/fc1", "attn/q", "attn/kv")
    ]
    assert list(group_layers(paths, "stage")) == ["stage2", "stage10"]
    assert group_layers(paths, "branch")["stage2/block1/attn"] == [
        "stage2/block1/attn/kv",
        "stage2/block1/attn/q",
    ]
    assert len(group_layers(paths, "block")) == 2
    assert len(group_layers(paths, "layer")) == 6
    assert list(group_layers(["block1/mlp/fc1", "block2/mlp/fc1"], "stage")) == ["model"]
    with pytest.raises(ValueError, match="unknown kind of group 'blok'; did you mean 'block'"):
        group_layers(paths, "blok")
