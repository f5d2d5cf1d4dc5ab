"""``--engine ray``: the same rows and figures as in one process, in the same order, whoever computes them."""

import json
import os
import subprocess
import sys
import types
from contextlib import contextmanager

import jax
import numpy as np
import pytest
from PIL import Image

import shiftaddvit_jax as sav
from shiftaddvit_jax import classifier, cluster
from shiftaddvit_jax.cli import main, predict, training
from shiftaddvit_jax.cluster import Worker, value_of, worker_resources

NAMES = ["ant", "bee"]


def predicted(output, *arguments):
    """What ``predict`` wrote; a file that can't be read is no error where others can."""
    main(["predict", *map(str, arguments), "--output", str(output), "--batch", "2"])
    return output.read_bytes()


pytestmark = pytest.mark.usefixtures("classifiers_on_xla")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    path = tmp_path_factory.mktemp("checkpoint") / "model"
    model = sav.create_model("pvt_v2_nano", num_classes=2, attention="msa", mlp="moe")
    sav.save_model(path, model, sav.init_variables(model, jax.random.key(0)), {"class_names": NAMES})
    return str(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Folders of two classes with 33 images each: two batches of `eval`."""
    folder, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name in NAMES:
        (folder / name).mkdir()
        for index in range(33):
            pixels = rng.integers(0, 256, (40, 30, 3), np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.png")
    return folder


@pytest.fixture(scope="module")
def files(images):
    """Four of the images and a file that is none."""
    (images / "bad.png").write_bytes(b"no image")
    yield [
        images / "ant" / "0.png",
        images / "bad.png",
        *(images / "bee" / f"{index}.png" for index in range(3)),
    ]
    (images / "bad.png").unlink()


@pytest.fixture(scope="module")
def local_rows(checkpoint, files, tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, "runs_on_kernels", lambda model: False)
        return predicted(tmp_path_factory.mktemp("local") / "rows.jsonl", checkpoint, *files)


@pytest.fixture
def workers(monkeypatch):
    """A worker without Ray, with small parts; the list of what it got."""
    got = []

    @contextmanager
    def connect(address):
        def map_on_workers(make, items):
            worker = Worker(make)
            for item in items:
                got.append(item)
                (result,) = worker({"item": [json.dumps(item)]})["result"]
                yield value_of({"result": result})

        yield map_on_workers

    monkeypatch.setattr(cluster, "connect", connect)
    monkeypatch.setattr(predict, "PART", 1)
    monkeypatch.setattr(training, "PART", 1)
    return got


def test_a_worker_is_made_once_and_its_results_are_json():
    made = []
    worker = Worker(lambda: made.append(1) or (lambda item: {"twice": 2 * item}))
    results = worker({"item": ["1", "2"]})["result"] + worker({"item": ["3"]})["result"]
    assert [value_of({"result": result}) for result in results] == [{"twice": 2}, {"twice": 4}, {"twice": 6}]
    assert made == [1]


def test_an_error_of_the_input_is_a_result_of_one_line():
    def make():
        raise ValueError("no such\ncheckpoint")

    (result,) = Worker(make)({"item": ["1"]})["result"]
    with pytest.raises(ValueError, match="no such checkpoint"):
        value_of({"result": result})


def node(is_alive=True, **resources):
    return {"Alive": is_alive, "Resources": resources}


@pytest.mark.parametrize(
    ("nodes", "expected"),
    [
        ([node(CPU=2.0)], (1, {"num_cpus": 2.0})),
        ([node(CPU=8.0), node(CPU=4.0), node()], (2, {"num_cpus": 4.0})),
        ([node(CPU=8.0, GPU=4.0), node(CPU=8.0, GPU=2.0), node(CPU=16.0)], (6, {"num_gpus": 1})),
        ([node(CPU=8.0), node(is_alive=False, CPU=8.0, GPU=8.0)], (1, {"num_cpus": 8.0})),
    ],
)
def test_a_worker_has_a_gpu_or_a_machine(nodes, expected):
    assert worker_resources(nodes) == expected


def test_a_cluster_without_anything_to_compute_on_is_refused():
    with pytest.raises(ValueError, match="neither GPUs nor CPUs"):
        worker_resources([node()])


def test_rows_of_workers_are_those_of_one_process(workers, checkpoint, files, local_rows, tmp_path):
    assert predicted(tmp_path / "rows.jsonl", checkpoint, *files, "--engine", "ray") == local_rows
    assert workers == [[str(file) for file in part] for part in (files[:2], files[2:4], files[4:])]


def test_rows_have_paths_as_they_were_given_and_workers_whole_ones(
    workers, checkpoint, files, tmp_path, monkeypatch
):
    monkeypatch.chdir(files[1].parent)
    (row,) = predicted(tmp_path / "rows.jsonl", checkpoint, "ant/../bad.png", "--engine", "ray").splitlines()
    assert json.loads(row)["path"] == "ant/../bad.png"
    assert json.loads(row)["error"].startswith("ant/../bad.png cannot be read")
    assert workers == [[str(files[1])]]


def test_a_stopped_run_of_workers_does_only_what_is_missing(workers, checkpoint, files, local_rows, tmp_path):
    output, lines = tmp_path / "rows.jsonl", local_rows.splitlines(keepends=True)
    output.write_bytes(b"".join(lines[:2]) + lines[2][:20])
    assert predicted(output, checkpoint, *files, "--engine", "ray") == local_rows
    assert [len(part) for part in workers] == [2, 1]


def test_a_wrong_source_is_one_line(workers, images, capsys):
    assert main(["predict", "nothing", str(images), "--engine", "ray"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "nothing" in line


def test_an_address_needs_the_engine(checkpoint, images, capsys):
    assert main(["predict", checkpoint, str(images), "--address", "127.0.0.1:6379"]) == 2
    assert "add --engine ray" in capsys.readouterr().err


def test_without_ray_an_error_says_what_to_install(checkpoint, images, capsys, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda package: None)
    assert main(["predict", checkpoint, str(images), "--engine", "ray"]) == 2
    assert "shiftaddvit-jax[ray]" in capsys.readouterr().err


def evaluated(capsys, checkpoint, images, engine):
    command = ["eval", "--checkpoint", checkpoint, "--data", "folder", "--path", str(images)]
    assert main([*command, "--json", "--engine", engine]) == 0
    return capsys.readouterr().out


def test_figures_of_workers_are_those_of_one_process(workers, checkpoint, images, capsys):
    local = evaluated(capsys, checkpoint, images, "local")
    assert evaluated(capsys, checkpoint, images, "ray") == local
    assert workers == [(0, 1), (1, 2)]
    assert json.loads(local)["images"] == 66


@pytest.fixture
def ray_starts(monkeypatch):
    """A stand-in for Ray: what it was started with, and the variables that it saw then."""
    starts = []

    def init(**settings):
        starts.append((settings, {name: os.environ.get(name) for name in cluster.ALONE}))
        if settings["address"] == "nowhere:1":
            raise ConnectionError("nobody\nanswers")

    ray = types.ModuleType("ray")
    ray.data = types.ModuleType("ray.data")
    ray.init, ray.shutdown, ray.is_initialized = init, lambda: starts.append("shutdown"), lambda: False
    monkeypatch.setitem(sys.modules, "ray", ray)
    monkeypatch.setitem(sys.modules, "ray.data", ray.data)
    monkeypatch.setattr(cluster, "require", lambda *arguments: None)
    for name in ("RAY_ADDRESS", *cluster.ALONE):
        monkeypatch.delenv(name, raising=False)
    return starts


def test_a_ray_that_is_started_here_is_alone_and_silent(ray_starts):
    with cluster.connect():
        pass
    (settings, variables), end = ray_starts
    assert (settings["address"], settings["include_dashboard"], end) == ("local", False, "shutdown")
    assert variables == cluster.ALONE
    assert not set(cluster.ALONE) & set(os.environ)


@pytest.mark.parametrize(("given", "variable"), [("head:1", None), (None, "head:1"), ("head:1", "other:1")])
def test_a_cluster_is_joined_as_it_is(ray_starts, monkeypatch, given, variable):
    if variable:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    with cluster.connect(given):
        pass
    settings, variables = ray_starts[0]
    assert settings["address"] == "head:1"
    assert "include_dashboard" not in settings
    assert set(variables.values()) == {None}


@pytest.mark.usefixtures("ray_starts")
def test_a_cluster_that_does_not_answer_is_one_line():
    with pytest.raises(ValueError, match="no cluster of Ray at nowhere:1: nobody answers"):
        cluster.connect("nowhere:1").__enter__()


WITH_RAY = """
import sys
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.cluster import connect

with connect():
    import ray

    (node,) = ray.nodes()
    print(node["NodeManagerAddress"])
    sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_ray_computes_the_same_and_listens_to_this_machine_alone(checkpoint, images, capsys):
    pytest.importorskip("ray")
    local = evaluated(capsys, checkpoint, images, "local")
    command = ["eval", "--checkpoint", checkpoint, "--data", "folder", "--path", str(images), "--json"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    done = subprocess.run(
        [sys.executable, "-c", WITH_RAY, *command, "--engine", "ray"],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    address, found = done.stdout.splitlines()
    assert address == "127.0.0.1"
    assert found == local.strip()
