import functools
import os
import shutil
import tempfile

# Most of the suite's time is XLA compiling small programs. Level 0 halves it, and without the emitters that
# lead each fusion through MLIR it is a third of that. Set before jax is imported.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_cpu_use_fusion_emitters=false")

# What is compiled is kept for the session, for its workers and subprocesses too, and never in the user's
# cache; tile sizes that the user tuned stay out of it.
FOLDER = None if "PYTEST_XDIST_WORKER" in os.environ else tempfile.mkdtemp(prefix="shiftaddvit-tests-")
if FOLDER:
    os.environ |= {f"XDG_{name.upper()}_HOME": f"{FOLDER}/{name}" for name in ("cache", "data")}
    # Reading a program back costs some ten milliseconds: less is compiled again.
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", f"{FOLDER}/jax")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.1")
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")

from pathlib import Path

import hypothesis
import jax
import jaxtyping
import numpy as np
import pytest

# The annotations of what computes, shapes and dtypes among them, are checked at each call. A NumPy array will
# do for one of JAX. Above these floors, tests put stand-ins in the place of what is timed or drawn. Set
# before the package is imported.
CHECKED = (
    "ops",
    "nn",
    "models",
    "reparameterize",
    "calibrate",
    "pack",
    "heads",
    "checkpoints",
    "data",
    "qmc",
    "search",
)
jaxtyping.Array = jax.Array | np.ndarray
jaxtyping.install_import_hook([f"shiftaddvit_jax.{name}" for name in CHECKED], "annotations.check")

from kernels_tvm.cpu import library, targets
from shiftaddvit_jax.ops.implementation import custom_call

# Each example may compile, so none has a deadline; derandomized, so that a run repeats the one before it.
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, max_examples=40, database=None)
hypothesis.settings.load_profile("suite")

IMPLEMENTATIONS = (None, "xla", "tvm")
XLA = (None, "xla")


def pytest_collection_modifyitems(items):
    """Files with slow tests first: begun last, they would leave the other worker idle at the end."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_unconfigure(config):
    if FOLDER:
        shutil.rmtree(FOLDER, ignore_errors=True)


@pytest.fixture(scope="session", params=IMPLEMENTATIONS, ids=str)
def implementation(request):
    return request.param


@pytest.fixture(scope="session", params=XLA, ids=str)
def xla_implementation(request):
    """For what no kernel computes; tests/ops/test_implementation.py says what the kernels say to it."""
    return request.param


@pytest.fixture
def classifiers_on_xla(monkeypatch):
    """Compiling kernels of whole models takes long; tests of bundles run them."""
    monkeypatch.setattr("shiftaddvit_jax.classifier.runs_on_kernels", lambda model: False)


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
