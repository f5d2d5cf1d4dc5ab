import itertools
import json
import logging
import sys
import time
from pathlib import Path

import numpy as np
import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax.bench import models as bench
from shiftaddvit_jax.bench import rounds as timing
from shiftaddvit_jax.bench.kernels import KERNELS
from shiftaddvit_jax.bench.quantized import quantize_for_onnxruntime, runtime_inputs
from shiftaddvit_jax.bench.rounds import Contestant, Worker, ratio, summarize, time_contestants
from shiftaddvit_jax.bench.synthetic import natural_images, random_variables
from shiftaddvit_jax.bench.worker import time_fastest
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.pictures import plot_bench

SMALL = {"runtime": "kernel", "kernel": "matshift", "shape": [8, 4, 4], "contestant": "dense float32"}


def test_summaries_and_ratios_equal_hand_counts():
    times = [[1.0, 3.0, 2.0], [10.0, 20.0, 30.0]]
    assert summarize(times) == {"runs": 6, "median_ms": 6.5, "p10_ms": 1.5, "p90_ms": 25.0}
    # The second round was ten times slower for both: the ratio of each round's medians is what counts.
    assert ratio(times, [[4.0], [40.0]]) == 0.5
    assert ratio(times, [[4.0], [20.0], [1.0]][:2]) == 0.75


def test_a_turn_belongs_to_the_fastest_way_to_run():
    calls = []

    def way(name, seconds):
        def run():
            calls.append(name)
            time.sleep(seconds)

        return run

    times = time_fastest([way("slow", 0.02), way("fast", 0.001)], 0.0)
    assert calls == ["slow"] * 5 + ["fast"] * 10
    assert len(times) == 3
    assert 1 <= min(times) < 20


def test_contestants_take_turns(monkeypatch):
    turns = []

    class Recorder:
        def __init__(self, threads):
            self.loaded = []

        def ask(self, request):
            if "load" in request:
                self.loaded.append(request["load"]["runtime"])
                return {"refused": "not here"} if request["load"]["runtime"] == "b" else {"start_s": 1.0}
            turns.append(self.loaded[request["run"]])
            return {"times_ms": [2.0 if turns[-1] == "a" else 6.0]}

        def __enter__(self):
            return self

        def __exit__(self, *_):
            turns.append("end")

    monkeypatch.setattr(timing, "Worker", Recorder)
    contestants = [
        Contestant(name, {"runtime": name}, "shared" if name in "cd" else None, ("b", "a")) for name in "abcd"
    ]
    rows = time_contestants(contestants, threads=1, rounds=2, seconds=0.0)
    assert turns == ["a", "c", "d", "a", "c", "d", "end", "end", "end"]
    assert [row["name"] for row in rows] == list("abcd")
    assert rows[1] == {"name": "b", "task": {"runtime": "b"}, "refused": "not here"}
    assert (rows[2]["ratio"], rows[2]["reference"], rows[2]["runs"]) == (3.0, "a", 2)


def state_of(worker):
    """``"T"`` of a process that is stopped."""
    return Path(f"/proc/{worker.process.pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_a_worker_is_stopped_but_while_it_answers_and_its_failures_are_reported():
    with Worker(1) as worker:
        assert worker.ask({"load": SMALL})["start_s"] > 0
        if Path("/proc/self/stat").exists():
            while state_of(worker) != "T":  # the signal is on its way
                pass
        assert len(worker.ask({"run": 0, "seconds": 0.0})["times_ms"]) == 3
        refused = worker.ask(
            {"load": {"runtime": "jax", "model": {"name": "pvt_v9"}, "examples": {"images": [1, 8, 8, 3]}}}
        )
        assert "unknown model" in refused["refused"]
        with pytest.raises(ValueError, match="failed: KeyError: 'nothing'"):
            worker.ask({"load": {"runtime": "nothing"}})
        worker.process.kill()
        with pytest.raises(ValueError, match="ended with code -9: "):
            worker.ask({"load": SMALL})


@pytest.fixture
def untimed(monkeypatch):
    """Rows without times, and what was to be timed."""
    asked = []

    def refuse(contestants, threads, rounds, seconds):
        asked.extend(contestants)
        return [{"name": each.name, "task": each.task, "refused": "untimed"} for each in contestants]

    monkeypatch.setattr(bench, "time_contestants", refuse)
    return asked


def test_dense_models_compete_in_every_peer(untimed):
    for package in itertools.chain(*bench.PEERS.values()):
        pytest.importorskip(package)
    bench.bench_model("pvt_v2_nano", threads=1, rounds=1, batch=2, image_size=48, peers=tuple(bench.PEERS))
    runtimes = ("JAX {}", "ONNX Runtime {}", "ONNX Runtime {}, int8 dynamic", "ONNX Runtime {}, int8 static")
    runtimes += ("OpenVINO {}, float32", "OpenVINO {}, default", "OpenVINO {}, int8", "PyTorch {}")
    dense = [name.format(kind) for kind in ("msa", "sra") for name in runtimes]
    assert [contestant.name for contestant in untimed] == ["ShiftAddViT tvm", "ShiftAddViT xla", *dense]
    assert all(each.task["examples"] == {"images": (2, 48, 48, 3)} for each in untimed)
    assert untimed[0].task["model"]["implementation"] == "tvm"
    assert untimed[1].task["model"]["mlp"] == ("moe",) * 4
    assert untimed[-1].task["config"]["sr_ratios"] == (8, 4, 2, 1)


def test_the_best_rival_is_the_fastest_of_other_runtimes_in_any_format():
    def row(name, ratio, runtime="openvino", kind="msa"):
        return {"name": name, "task": {"runtime": runtime, "attention": kind}, "ratio": ratio}

    refused = {"name": "none", "task": {"runtime": "openvino", "attention": "msa"}, "refused": "not here"}
    rows = [
        {"name": "ours", "task": {"runtime": "jax"}, "ratio": 1.0},
        refused,
        row("JAX msa", 1.1, "jax"),
        row("a", 3.0),
        row("b, int8", 2.0),
        row("c", 1.5, kind="sra"),
    ]
    assert bench.best_rivals(rows) == {
        "msa": {"name": "b, int8", "ratio": 2.0},
        "sra": {"name": "c", "ratio": 1.5},
    }


@pytest.mark.parametrize("quantization", ["dynamic", "static"])
def test_onnx_runtime_computes_the_dense_model_in_int8(tmp_path, quantization):
    pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    model = sav.create_model("deit_nano", num_classes=10)
    variables = random_variables(model)
    sav.save_onnx(model, variables, tmp_path / "model.onnx", batch=16)
    shapes = {"images": (16, 32, 32, 3)}
    level = logging.getLogger().level
    file = quantize_for_onnxruntime(str(tmp_path / "model.onnx"), quantization, shapes)
    assert logging.getLogger().level == level
    images = natural_images(16, 32, 7)
    (logits,) = onnxruntime.InferenceSession(file).run(None, runtime_inputs(images))
    expected = np.asarray(model.apply(variables, images))
    error = np.sqrt(np.mean(np.square(logits - expected)) / np.var(expected))
    assert 1e-4 < error < 0.3
    assert Path(file).stat().st_size < 0.5 * (tmp_path / "model.onnx").stat().st_size


def test_rays_are_timed_from_their_samples_on(untimed, capsys):
    report = bench.bench_model("gnt_nano", threads=1, rounds=1, batch=5, mlp="dense", peers=["onnxruntime"])
    assert [each.name for each in untimed[2:]] == ["JAX msa", "ONNX Runtime msa"]
    assert untimed[0].task["examples"]["tokens"] == (5, 24, 4, 11)
    assert bench.subject_of(report) == "gnt_nano, 5 rays"


@pytest.mark.slow
def test_a_model_is_timed_beside_its_dense_model_and_a_peer(tmp_path, capsys):
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    command = ["bench", "deit_tiny", "--image-size", "32", "--mlp", "dense", "--peers", "onnxruntime"]
    command += [
        "--implementation",
        "xla",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--json",
        str(tmp_path / "bench.json"),
    ]
    assert main([*command, "--plot", str(tmp_path / "bench.png")]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table[: table.index("└")].splitlines())) <= 100
    report = json.loads((tmp_path / "bench.json").read_text())
    assert report["model"]["mlp"] == ["dense"]
    assert report["machine"]["threads"] == 1
    assert {"jax", "onnxruntime"} <= set(report["versions"])
    rows = {row["name"]: row for row in report["rows"]}
    assert list(rows) == ["ShiftAddViT xla", "JAX msa", "ONNX Runtime msa"]
    for name, row in rows.items():
        assert 0 < row["p10_ms"] <= row["median_ms"] <= row["p90_ms"]
        assert row["reference"] == "ShiftAddViT xla"
        assert row["runs"] >= 3
        assert name in table
    assert rows["ONNX Runtime msa"]["logit_error"] < 1e-5
    assert (tmp_path / "bench.png").stat().st_size > 10_000


def test_shares_follow_latencies_measured_here(untimed, tmp_path, capsys):
    layers = [f"stage{stage}/block1/mlp/{layer}" for stage in (1, 2, 3, 4) for layer in ("fc1", "fc2")]
    latencies = [{"name": name, "latencies": [3.0, 1.0 + (name == layers[0])]} for name in layers]
    file = tmp_path / "latencies.json"
    file.write_text(json.dumps({"layers": latencies}))
    report = tmp_path / "bench.json"
    assert main(["bench", "pvt_v2_nano", "--shift-share", str(file), "--json", str(report)]) == 0
    assert json.loads(report.read_text())["shift_share"] == dict.fromkeys(layers, 0.75) | {layers[0]: 0.6}
    assert "73.1% (60% to 75% by layer) of tokens on shift experts" in capsys.readouterr().out


def test_a_model_without_mixtures_has_no_router_to_balance(untimed):
    report = bench.bench_model("pvt_v2_nano", threads=1, rounds=1, mlp="shift")
    assert report["shift_share"] is None
    assert untimed[0].task["router_biases"] == {}


def test_all_implementations_have_the_same_router_biases(untimed):
    report = bench.bench_model("pvt_v2_nano", threads=1, rounds=1, shift_share=0.25)
    assert report["shift_share"] == 0.25
    first, second = (contestant.task["router_biases"] for contestant in untimed[:2])
    assert first
    assert first == second


def test_a_runtime_that_computes_something_else_is_refused(monkeypatch):
    def measured(contestants, *_):
        about = {"median_ms": 1.0, "precision": "float32"}
        rows = [{"name": each.name, "task": each.task, **about} for each in contestants]
        return [row | {"logits": [1.0, 1.0 + 0.01 * index]} for index, row in enumerate(rows)]

    monkeypatch.setattr(bench, "time_contestants", measured)
    with pytest.raises(ValueError, match=r"ONNX Runtime msa computes another model: .* 1.0% of"):
        bench.bench_model("deit_tiny", threads=1, rounds=1, image_size=16, peers=["onnxruntime"])


def test_kernels_compute_what_they_are_compared_with():
    depthwise = KERNELS["depthwise_conv_2d"].contestants
    np.testing.assert_allclose(depthwise["xla"](6, 8)(), depthwise["dense float32"](6, 8)(), atol=1e-5)


def test_kernels_of_one_implementation_share_a_process(untimed):
    bench.bench_kernels(threads=1, rounds=1)
    assert len({contestant.name for contestant in untimed}) == len(untimed) >= 40
    assert {each.process for each in untimed} == {each.task["contestant"] for each in untimed}
    assert all(each.references[0].endswith("dense float32") for each in untimed)


def test_operations_of_kernels_equal_hand_counts():
    counts = {name: kernel.operations((3, 5, 7)[: len(kernel.shapes[0])]) for name, kernel in KERNELS.items()}
    # Two products of 3 x 7 by 7 x 7 in 5 heads; 9 taps on 3 x 3 pixels of 5 channels;
    # two rounds of additions for 3 rows of 5 numbers.
    assert counts == {
        "peak": 105,
        "matshift": 105,
        "matadd": 2 * 5 * 3 * 49,
        "depthwise_conv_2d": 9 * 9 * 5,
        "hadamard": 30,
    }


def test_peers_that_are_not_installed_are_named_with_the_extra(monkeypatch, capsys):
    for package in ("openvino", "onnx"):
        monkeypatch.setitem(sys.modules, package, None)
    assert main(["bench", "pvt_v2_nano", "--peers", "openvino"]) == 2
    error = capsys.readouterr().err
    assert "needs openvino and onnx: pip install 'shiftaddvit-jax[peers]'" in error
    assert len(error.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give a model's name, or --kernels"),
        (["pvt_v2_nano", "--kernels", "--plot", "a.png"], "have neither --plot nor"),
        (["pvt_v2_nan"], "did you mean 'pvt_v2_nano'"),
        (["pvt_v2_nano", "--peers", "onnxruntim"], "did you mean 'onnxruntime'"),
        (["pvt_v2_nano", "--attention", "hammin_linear"], "did you mean 'hamming_linear'"),
        (["pvt_v2_nano", "--image-size", "4"], "needs images of at least"),
        (["pvt_v2_nano", "--threads", "0"], "threads must be between 1 and"),
        (["pvt_v2_nano", "--batch", "0"], "batch must be at least 1"),
        (["pvt_v2_nano", "--shift-share", "1.5"], "shift_share is a share from 0 to 1, got 1.5"),
        (["pvt_v2_nano", "--mlp", "shift", "--shift-share", "1.5"], "a share from 0 to 1, got 1.5"),
        (["pvt_v2_nano", "--rounds", "0"], "rounds must be at least 1"),
        (["pvt_v2_nano", "--json", "none/bench.json"], "none/bench.json cannot be written"),
        (["pvt_v2_nano", "--plot", "none/bench.png"], "none/bench.png cannot be written"),
        (["--kernels", "--plot", "bench.gif"], "bench.gif is no name for a picture"),
        (["deit_tiny", "--peers", "torch"], "the peer torch has PVTv2 alone, not deit_tiny"),
    ],
)
def test_wrong_usage_is_refused_in_one_line(arguments, message, capsys):
    assert main(["bench", *arguments]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert message in error


def test_times_and_ratios_are_drawn(tmp_path):
    def row(name, milliseconds, **task):
        times = {"median_ms": milliseconds, "p10_ms": milliseconds - 1, "p90_ms": milliseconds + 2}
        return {"name": name, "task": task, **times, "ratio": milliseconds / 4, "reference": "a"}

    machine = {"cpu": "a CPU", "threads": 2}
    refused = {"name": "none", "task": {}, "refused": "not here"}
    rows = [refused, row("a", 4.0, runtime="jax"), row("b", 6.0, runtime="jax", attention="msa")]
    model = {"name": "pvt_v2_b0", "image_size": 224}
    figure = plot_bench({"machine": machine, "model": model, "batch": 1, "rows": rows}, tmp_path / "a.png")
    (panel,) = figure.axes
    assert [bar.get_width() for bar in panel.patches] == [4.0, 6.0]
    assert [label.get_text() for label in panel.get_yticklabels()] == ["a", "b"]
    assert panel.patches[0].get_facecolor() != panel.patches[1].get_facecolor()
    assert "(ms)" in panel.get_xlabel()
    kernels = [row("a", 4.0, contestant="dense float32"), row("b", 6.0, contestant="xla"), refused]
    (panel,) = plot_bench({"machine": machine, "rows": kernels}, tmp_path / "b.png").axes
    assert [bar.get_width() for bar in panel.patches] == [1.5]
    assert "a CPU" in panel.get_title()
