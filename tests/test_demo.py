import json

import numpy as np
import pytest
from PIL import Image

import shiftaddvit_jax as sav
from shiftaddvit_jax.demo import print_report, run_demo, stage_config


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("demo")
    return workdir, run_demo(workdir, steps_scale=0.02)


@pytest.mark.slow
def test_the_report_on_disk_is_the_one_returned(demo):
    workdir, report = demo
    assert json.loads((workdir / "report.json").read_text()) == report
    assert [stage["name"] for stage in report["stages"]] == ["dense", "add_attention", "shift", "moe"]
    assert report["seconds"] > 0


@pytest.mark.slow
def test_even_a_few_steps_learn_something(demo):
    # Chance is 10 %.
    assert demo[1]["stages"][-1]["top1"] > 0.15


@pytest.mark.slow
def test_each_stage_multiplies_less_than_the_dense_model_and_shift_weights_are_smaller(demo):
    dense, attention, shift, moe = demo[1]["stages"]
    assert dense["shifts"] == dense["adds"] == attention["shifts"] == 0
    assert shift["macs"] < moe["macs"] < dense["macs"]
    assert shift["adds"] == attention["adds"] > 0
    assert shift["packed_bytes"] < 0.6 * dense["packed_bytes"]
    assert 0 < moe["shift_share"] < 1
    assert dense["shift_share"] is attention["shift_share"] is shift["shift_share"] is None


@pytest.mark.slow
def test_the_stages_hold_the_kinds_they_are_named_after(demo):
    workdir, _ = demo
    kinds = {}
    for name in ("dense", "add_attention", "shift", "moe"):
        model, _, _ = sav.load_model(workdir / name / "model")
        kinds[name] = (model.attention[0], model.mlp[0], model.projections[0])
    assert kinds == {
        "dense": ("msa", "dense", "dense"),
        "add_attention": ("hamming_linear", "dense", "dense"),
        "shift": ("hamming_linear", "shift", "shift"),
        "moe": ("hamming_linear", "moe", "moe"),
    }


@pytest.mark.slow
def test_the_pictures_show_something_and_the_samples_are_digits(demo):
    workdir, _ = demo
    for name in ("confusion.png", "training.png"):
        assert np.asarray(Image.open(workdir / name)).std() > 10
    assert len(list((workdir / "samples").glob("*.png"))) == 10


@pytest.mark.slow
def test_the_table_fits_100_columns_and_says_what_comes_next(demo, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    workdir, report = demo
    print_report(report, workdir)
    output = capsys.readouterr().out
    table = [line for line in output.splitlines() if line.startswith(("│", "┃", "┏", "└"))]
    assert len(table) >= 6
    assert max(map(len, table)) <= 100
    assert "shiftaddvit predict --checkpoint" in output


def test_seeds_reach_every_stage(tmp_path):
    assert stage_config(tmp_path, "moe", seed=7).seed == 7
    assert stage_config(tmp_path, "moe").init_from == str(tmp_path / "add_attention" / "model")
