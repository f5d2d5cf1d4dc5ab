"""The same run on one device, on four, and in two processes ends in the same parameters."""

import json
import os
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax.train.devices import check_batch_size, create_mesh, place_state, start_processes

STEPS = 20
SETTINGS = {
    "data.batch_size": 8,
    "model.mlp": "moe,dense,dense,dense",
    "model.drop_path": 0.1,
    "mixing.mixup_alpha": 0.8,
    "mixing.cutmix_alpha": 1.0,
    "augment.erase": 0.5,
    "train.steps": STEPS,
    "train.ema_decay": 0.9,
    "train.log_every": 1,
    "train.checkpoint_every": STEPS // 2,
    "train.keep_best": 0,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """Compilations of one process serve the others."""
    return tmp_path_factory.mktemp("cache")


def start(workdir, cache, *arguments, devices=1, **settings):
    command = [sys.executable, "-m", "shiftaddvit_jax.main", "--config=configs/digits.py"]
    keys = SETTINGS | {name.replace("__", "."): value for name, value in settings.items()}
    command += [
        f"--workdir={workdir}",
        *(f"--config.{key}={value}" for key, value in keys.items()),
        *arguments,
    ]
    environment = os.environ | {
        "XLA_FLAGS": f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={devices}",
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(*processes):
    for process in processes:
        output, _ = process.communicate(timeout=600)
        assert process.returncode == 0, output


def two_processes(workdir, cache, **settings):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    ours = [("--coordinator", address, "--processes", "2", "--process", str(index)) for index in range(2)]
    return [start(workdir, cache, *arguments, **settings) for arguments in ours]


def assert_same(workdir, expected):
    """Losses and parameters within 1e-5."""
    found, wanted = (
        [json.loads(line)["loss"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
        for folder in (workdir, expected)
    )
    assert len(found) == STEPS
    np.testing.assert_allclose(found, wanted, atol=1e-5)
    for name in ("model", "average"):
        jax.tree.map(
            lambda mine, its: np.testing.assert_allclose(mine, its, atol=1e-5),
            sav.load_model(workdir / name)[1],
            sav.load_model(expected / name)[1],
        )


@pytest.fixture(scope="module")
def one(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("one") / "run"
    finish(start(workdir, cache))
    return workdir


@pytest.fixture(scope="module")
def four(tmp_path_factory, cache, one):
    workdir = tmp_path_factory.mktemp("four") / "run"
    finish(start(workdir, cache, devices=4, devices__model=2))
    return workdir


@pytest.mark.slow
def test_four_devices_with_parameters_split_in_two_train_as_one(four, one):
    assert_same(four, one)


def stopped_halfway(workdir, folder):
    """A copy of a run as it was when its first checkpoint was written."""
    copy = shutil.copytree(workdir, folder)
    for name in ("model", "average", f"checkpoints/{STEPS}"):
        shutil.rmtree(copy / name)
    return copy


@pytest.mark.slow
def test_two_processes_with_split_parameters_go_on_from_four_devices(four, one, cache, tmp_path):
    workdir = stopped_halfway(four, tmp_path / "run")
    finish(*two_processes(workdir, cache, devices__model=2))
    assert_same(workdir, one)


@pytest.mark.slow
def test_one_device_goes_on_from_four(four, one, cache, tmp_path):
    workdir = stopped_halfway(four, tmp_path / "run")
    finish(start(workdir, cache))
    assert_same(workdir, one)


def test_arrays_that_are_one_become_two_which_a_step_may_take():
    weight = jax.numpy.ones(64)
    state = place_state(create_mesh(), {"dense": weight, "shift": weight})
    taken = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)(state)
    np.testing.assert_array_equal(taken["shift"], 2)
    np.testing.assert_array_equal(weight, 1)


def test_a_mesh_that_devices_cannot_make_is_refused():
    with pytest.raises(ValueError, match=r"config\.devices\.model is 3, which does not divide 1 devices"):
        create_mesh(3)


def test_a_batch_that_does_not_fill_its_parts_is_refused():
    with pytest.raises(ValueError, match=r"batch_size is 6, expected a multiple of 4: 1 dev.* = 4"):
        check_batch_size(create_mesh(), 6, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("127.0.0.1:9", None, None), "belong together; give all three, or none"),
        (("127.0.0.1", 2, 0), "--coordinator must be HOST:PORT, got '127.0.0.1'"),
        (("127.0.0.1:9", 2, 2), "--process must be from 0 to 1, got 2"),
    ],
)
def test_processes_that_cannot_be_joined_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        start_processes(*arguments)
