"""Killing a run at any moment and starting it again ends in the parameters of a run left alone."""

import os
import signal
import subprocess
import sys
import time

import jax
import numpy as np
import pytest

import shiftaddvit_jax as sav

STEPS = 9


def start(workdir, cache):
    settings = {
        "config.model.attention": "hamming_linear,msa,msa,msa",
        "config.model.drop_path": "0.1",
        "config.data.batch_size": "8",
        "config.train.steps": str(STEPS),
        "config.train.log_every": "1",
        "config.train.checkpoint_every": "2",
    }
    command = [
        sys.executable,
        "-m",
        "shiftaddvit_jax.main",
        "--config=configs/digits.py",
        f"--workdir={workdir}",
    ]
    command += [f"--{name}={value}" for name, value in settings.items()]
    # The compilations of the first process serve the others.
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def finish(process):
    output, _ = process.communicate(timeout=600)
    assert process.returncode == 0, output


def parameters(workdir):
    return jax.tree.map(np.asarray, sav.load_model(workdir / "model")[1])


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, cache):
    workdir = tmp_path_factory.mktemp("undisturbed")
    finish(start(workdir, cache))
    return parameters(workdir)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("moment", "pattern"),
    [
        ("before the first checkpoint", "config.json"),
        ("while a checkpoint is written", "checkpoints/4*tmp*"),
        ("between two checkpoints", "checkpoints/6"),
        ("while the model is exported", ".model.new"),
    ],
)
def test_a_killed_run_goes_on_bit_for_bit(moment, pattern, undisturbed, cache, tmp_path):
    process = start(tmp_path, cache)
    deadline = time.monotonic() + 300
    while not list(tmp_path.glob(pattern)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.0005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finish(start(tmp_path, cache))
    jax.tree.map(np.testing.assert_array_equal, parameters(tmp_path), undisturbed)
    assert not list(tmp_path.glob(".model.new"))
