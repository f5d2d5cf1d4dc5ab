import json
from pathlib import Path

import numpy as np
import pytest

from shiftaddvit_jax import main as command
from shiftaddvit_jax import qmc
from shiftaddvit_jax.train import default_config, sweep, train_and_evaluate
from shiftaddvit_jax.train.sweep import run_sweep, sweep_configs

PAIRS = (("train.learning_rate", "loguniform:1e-4:1e-2"), ("train.warmup_steps", "uniform:10:200"))


def swept(*pairs):
    config = default_config()
    config.sweep = pairs
    return config


def test_configs_have_haltons_points_in_their_keys():
    found = sweep_configs(swept(*PAIRS), 12)
    points = np.asarray(qmc.sample([text for _, text in PAIRS], 12))
    rates = [config.train.learning_rate for _, config in found]
    np.testing.assert_allclose(rates, points[:, 0], rtol=1e-6)
    assert [config.train.warmup_steps for _, config in found] == np.round(points[:, 1]).tolist()
    assert all(config.sweep == () for _, config in found)
    assert found[0][0] == {"train.learning_rate": rates[0], "train.warmup_steps": round(float(points[0, 1]))}


def test_more_runs_begin_with_the_same_ones():
    few, many = (sweep_configs(swept(*PAIRS), count) for count in (5, 9))
    assert [values for values, _ in many[:5]] == [values for values, _ in few]


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ((("train.learning_rat", "uniform:0:1"),), "unknown number of the config.*'train.learning_rate'"),
        ((("train.optimizer", "uniform:0:1"),), "unknown number of the config 'train.optimizer'"),
        ((("train.learning_rate", "logunifrm:1:2"),), "is no distribution; write one as in uniform:-20:20"),
        ((("train.learning_rate", "uniform:-2:-1"),), "config.train.learning_rate must be positive"),
        ((("train.learning_rate",),), "config.sweep must hold pairs"),
        ((PAIRS[0], PAIRS[0]), "names a number twice"),
        ((), "there is nothing to sweep: set config.sweep"),
    ],
)
def test_bad_sweeps_are_refused_before_anything_runs(pairs, message):
    with pytest.raises(ValueError, match=message):
        sweep_configs(swept(*pairs), 4)


def test_no_run_is_refused():
    with pytest.raises(ValueError, match="--sweep must be at least 1 run, got 0"):
        sweep_configs(swept(*PAIRS), 0)


def test_one_run_of_a_sweep_says_how_to_run_it(tmp_path):
    with pytest.raises(ValueError, match=r"config.sweep is of several runs; give --sweep N"):
        train_and_evaluate(swept(*PAIRS), tmp_path)


@pytest.fixture
def trained(monkeypatch):
    """Runs that do nothing: the smaller the learning rate, the better; one of them diverges."""
    calls = []

    def run(config, workdir):
        calls.append(Path(workdir))
        if len(calls) == 2:
            raise FloatingPointError("the loss is nan at step 3")
        return {"top1": 1 - config.train.learning_rate, "top5": 1.0, "loss": 0.5}

    monkeypatch.setattr(sweep, "train_and_evaluate", run)
    return calls


def test_runs_have_folders_and_a_table_with_the_best_first(trained, tmp_path):
    rows = run_sweep(swept(*PAIRS), tmp_path, 5)
    assert trained == [tmp_path / f"{number:03d}" for number in range(5)]
    scores = [row["top1"] for row in rows[:4]]
    assert scores == sorted(scores, reverse=True)
    assert rows[4]["run"] == "001"
    assert rows[4]["failed"] == "the loss is nan at step 3"
    assert json.loads((tmp_path / "sweep.json").read_text()) == rows


def test_the_command_prints_the_table(trained, tmp_path, capsys):
    pairs = f"--config.sweep={PAIRS!r}"
    config = ["--config", "configs/digits.py", "--workdir", str(tmp_path), "--sweep", "3"]
    assert command.main([*config, pairs]) == 0
    printed = capsys.readouterr().out
    assert "3 runs, the best first" in printed
    assert "failed" in printed
