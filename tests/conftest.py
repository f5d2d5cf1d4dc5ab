import functools
import os
import shutil
import tempfile

# Most of the suite's time is XLA compiling small programs, and level 0 halves it. Set before jax is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

from pathlib import Path

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest

# The package's annotations, shapes and dtypes among them, are checked at each call. A NumPy array will do for
# one of JAX. Set before the package is imported.
jaxtyping.Array = jax.Array | np.ndarray
jaxtyping.install_import_hook("shiftaddvit_jax", "annotations.check")

from kernels_tvm.cpu import library, targets  # noqa: E402
from shiftaddvit_jax.ops.implementation import custom_call  # noqa: E402

# Each example may compile, so none has a deadline; derandomized, so that a run repeats the one before it.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40, database=None)
hypothesis.settings.load_profile("suite")

IMPLEMENTATIONS = (None, "xla", "tvm")
XLA = (None, "xla")


FOLDER = pytest.StashKey[str]()


def pytest_configure(config):
    # Compiled kernels are kept for the session, for its workers too, never in the user's cache; tile sizes
    # that the user tuned stay out of it.
    if not hasattr(config, "workerinput"):
        config.stash[FOLDER] = folder = tempfile.mkdtemp(prefix="shiftaddvit-tests-")
        for name in ("cache", "data"):
            os.environ[f"XDG_{name.upper()}_HOME"] = str(Path(folder) / name)


def pytest_unconfigure(config):
    if FOLDER in config.stash:
        shutil.rmtree(config.stash[FOLDER], ignore_errors=True)


@pytest.fixture(scope="session", params=IMPLEMENTATIONS, ids=str)
def implementation(request):
    return request.param


@pytest.fixture(scope="session", params=XLA, ids=str)
def xla_implementation(request):
    """For what no kernel computes; tests/ops/test_implementation.py says what the kernels say to it."""
    return request.param


@functools.cache
def kernel_caches(target, threads):
    """Functions that compile and register kernels, as a process on such a machine has them."""
    return functools.cache(library.load.__wrapped__), functools.cache(custom_call._register.__wrapped__)


@pytest.fixture
def on_machine(monkeypatch):
    """Has kernels compiled for another target or number of threads than this machine's."""
    here = targets.host_target(), targets.thread_count()
    what_it_has = (targets.host_target, targets.thread_count, custom_call.unavailable)

    def choose(target=None, threads=None):
        for name, value in (("SHIFTADDVIT_TARGET", target), ("TVM_NUM_THREADS", threads)):
            if value is not None:
                monkeypatch.setenv(name, str(value))
        for cached in what_it_has:
            cached.cache_clear()
        there = targets.host_target(), targets.thread_count()
        if there != here:
            load, register = kernel_caches(*there)
            monkeypatch.setattr(library, "load", load)
            monkeypatch.setattr(custom_call, "_register", register)

    yield choose
    monkeypatch.undo()
    for cached in what_it_has:
        cached.cache_clear()


@pytest.fixture(scope="session")
def golden():
    """The authors' layers as ``golden[group][case][name]``; names keep their slash, as in ``param/...``."""
    groups = {}
    with np.load(Path(__file__).parent / "data" / "authors_layers.npz") as arrays:
        for key in arrays.files:
            group, case, *name = key.split("/", 2)
            if name:
                groups.setdefault(group, {}).setdefault(case, {})[name[0]] = arrays[key]
            else:
                groups.setdefault(group, {})[case] = arrays[key]
    return groups
