"""Where figures of training go: every place holds what was written, once, also of a run that was stopped."""

import importlib.machinery
import json
import logging
import sys
import types
from contextlib import contextmanager

import numpy as np
import pytest

from shiftaddvit_jax.files import read_metrics
from shiftaddvit_jax.train.writers import open_writers


def write(workdir, steps, first_step=1, names=("jsonl",)):
    with open_writers(names, workdir, {"train.steps": 9}, first_step) as writers:
        for step in steps:
            writers.write(step, {"loss": 1 / step, "accuracy": np.float32(0.5)})
        writers.flush()


def steps_in(workdir):
    return [entry["step"] for entry in read_metrics(workdir)]


def events(workdir):
    """Each loss by its step, as TensorBoard reads them: a new file purges what follows its first step."""
    from tensorboardX.event_file_writer import event_pb2  # what the records are made of

    found = {}
    for file in sorted(workdir.glob("events.*"), key=lambda file: file.stat().st_mtime_ns):
        data = file.read_bytes()
        while data:
            length = int.from_bytes(data[:8], "little")
            event = event_pb2.Event.FromString(data[12 : 12 + length])
            data = data[16 + length :]
            if event.session_log.status == event_pb2.SessionLog.START:
                found = {step: value for step, value in found.items() if step < event.step}
            for one in event.summary.value:
                if one.tag == "loss":
                    found[event.step] = one.simple_value
    return found


def test_lines_are_strict_json_in_the_order_of_steps(tmp_path):
    write(tmp_path, [1, 2])
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 1.0, "accuracy": 0.5},
        {"step": 2, "loss": 0.5, "accuracy": 0.5},
    ]


def test_a_line_is_there_as_soon_as_it_is_written(tmp_path):
    with open_writers(["jsonl"], tmp_path, {}, 1) as writers:
        writers.write(1, {"loss": 2.0})
        assert read_metrics(tmp_path) == [{"step": 1, "loss": 2.0}]


def test_a_resumed_run_drops_the_steps_that_it_does_again(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    write(tmp_path, [3, 4, 5], first_step=3)
    assert steps_in(tmp_path) == [1, 2, 3, 4, 5]


def test_a_run_from_the_beginning_drops_all(tmp_path):
    write(tmp_path, [1, 2])
    write(tmp_path, [1])
    assert steps_in(tmp_path) == [1]


def test_metrics_are_read_up_to_a_step(tmp_path):
    write(tmp_path, [1, 2, 3])
    assert [entry["step"] for entry in read_metrics(tmp_path, 2)] == [1, 2]


def test_a_cut_last_line_is_dropped_and_not_joined_to_the_next(tmp_path, caplog):
    write(tmp_path, [1, 2])
    file = tmp_path / "metrics.jsonl"
    file.write_text(file.read_text()[:-10])
    assert steps_in(tmp_path) == [1]
    assert not caplog.records
    write(tmp_path, [2, 3], first_step=2)
    assert steps_in(tmp_path) == [1, 2, 3]


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"loss": 1}',
        '{"step": "1"}',
        '{"step": 1, "loss": NaN}',
        '{"step": 1, "loss": "a"}',
        "\xff",
    ],
)
def test_a_damaged_line_is_left_out_and_counted(tmp_path, caplog, line):
    write(tmp_path, [1, 2])
    file = tmp_path / "metrics.jsonl"
    file.write_bytes(line.encode("latin1") + b"\n" + file.read_bytes())
    assert steps_in(tmp_path) == [1, 2]
    assert "1 of 3 lines are not whole" in caplog.text


def test_a_lost_file_is_said_where_steps_were_done(tmp_path, caplog):
    assert read_metrics(tmp_path, 0) == []
    assert not caplog.records
    with caplog.at_level(logging.WARNING):
        assert read_metrics(tmp_path, 20) == []
    assert "what was logged up to step 20 is lost" in caplog.text


@pytest.mark.parametrize(
    ("step", "values", "message"),
    [
        (2, {"loss": float("nan")}, "loss is nan at step 2; expected a finite number"),
        (2, {"loss": np.float32("inf")}, "loss is inf at step 2"),
        (1, {"loss": 1.0}, "step 1 is before the first, 2"),
        (2, {"step": 1.0}, "a value is called 'step'"),
    ],
)
def test_what_cannot_be_read_again_is_not_written_anywhere(tmp_path, step, values, message):
    with open_writers(["jsonl", "tensorboard"], tmp_path, {}, 2) as writers:
        with pytest.raises(ValueError, match=message):
            writers.write(step, values)
        writers.write(3, {"loss": 1.0})
    assert steps_in(tmp_path) == [3]
    assert set(events(tmp_path)) == {3}


def test_tensorboard_has_each_step_once(tmp_path):
    write(tmp_path, [1, 2, 3], names=["tensorboard"])
    write(tmp_path, [2, 3, 4], first_step=2, names=["tensorboard"])
    assert events(tmp_path) == pytest.approx({1: 1, 2: 1 / 2, 3: 1 / 3, 4: 1 / 4})


def test_an_unknown_writer_opens_nothing(tmp_path):
    with (
        pytest.raises(ValueError, match="unknown writer 'tensorbord'; did you mean 'tensorboard'"),
        open_writers(["jsonl", "tensorbord"], tmp_path, {}, 1),
    ):
        pass
    assert not list(tmp_path.iterdir())


class Run:
    def __init__(self, settings):
        self.settings, self.logged, self.finished = settings, [], False

    def log(self, values, step):
        self.logged.append((step, values))

    def finish(self):
        self.finished = True


def stand_in(monkeypatch, name, **functions):
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None)
    vars(module).update(functions)
    monkeypatch.setitem(sys.modules, name, module)


@pytest.fixture
def wandb_runs(monkeypatch):
    runs = []

    @contextmanager
    def init(**settings):
        runs.append(Run(settings))
        yield runs[-1]
        runs[-1].finish()

    stand_in(monkeypatch, "wandb", init=init, login=lambda prompt: prompt or logged_in[0])
    logged_in = [False]
    monkeypatch.delenv("WANDB_MODE", raising=False)
    return runs, logged_in


def test_wandb_gets_config_and_values(wandb_runs, tmp_path):
    write(tmp_path, [1, 2], names=["wandb"])
    ((run,), _) = wandb_runs
    assert run.settings["config"] == {"train.steps": 9}
    assert run.settings["dir"] == str(tmp_path)
    assert run.logged == [(1, {"loss": 1.0, "accuracy": 0.5}), (2, {"loss": 0.5, "accuracy": 0.5})]
    assert run.finished


@pytest.mark.parametrize(
    ("is_logged_in", "asked", "mode"),
    [
        (False, None, "offline"),
        (False, "online", "offline"),
        (False, "disabled", "disabled"),
        (True, None, None),
        (True, "disabled", "disabled"),
    ],
)
def test_wandb_never_asks_for_a_login(wandb_runs, tmp_path, monkeypatch, is_logged_in, asked, mode):
    runs, logged_in = wandb_runs
    logged_in[0] = is_logged_in
    if asked:
        monkeypatch.setenv("WANDB_MODE", asked)
    write(tmp_path, [], names=["wandb"])
    assert runs[0].settings["mode"] == mode


def test_a_resumed_run_is_the_same_run_and_another_folder_another(wandb_runs, tmp_path):
    runs, _ = wandb_runs
    for name in ("first", "first", "second"):
        (tmp_path / name).mkdir(exist_ok=True)
        write(tmp_path / name, [], names=["wandb"])
    first, again, second = (run.settings["id"] for run in runs)
    assert first == again != second
    assert runs[1].settings["resume"] == "allow"


def test_trackio_gets_values_and_ends_after_an_error(monkeypatch, tmp_path):
    runs = []
    stand_in(monkeypatch, "trackio", init=lambda **settings: runs.append(Run(settings)) or runs[-1])

    def stop():
        with open_writers(["trackio"], tmp_path, {"seed": 1}, 1) as writers:
            writers.write(1, {"loss": 1.0})
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stop()
    assert runs[0].logged == [(1, {"loss": 1.0})]
    assert runs[0].settings["config"] == {"seed": 1}
    assert runs[0].finished


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_a_missing_package_is_one_line_and_opens_nothing(monkeypatch, tmp_path, name):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        "importlib.util.find_spec", lambda package: None if package == name else found(package)
    )
    with (
        pytest.raises(ValueError, match=rf"the writer '{name}' needs {name}: pip install .*\[{name}\]"),
        open_writers(["jsonl", name], tmp_path, {}, 1),
    ):
        pass
    assert not list(tmp_path.iterdir())
