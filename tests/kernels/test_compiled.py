"""The package of compiled kernels: used where it suits, refused where it does not."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from kernels_tvm import store
from kernels_tvm.cpu import compiled, library
from kernels_tvm.cpu.compiled import PACKAGE, choose, makers
from kernels_tvm.cpu.targets import TARGETS, host_target, thread_count
from kernels_tvm.descriptions import MatAddDescription
from kernels_tvm.store import Kernel
from shiftaddvit_jax.compile import write_package

pytestmark = pytest.mark.skipif(host_target() is None, reason="no kernel runs on this machine")
KERNEL = Kernel("matadd", MatAddDescription(3, 2, "int8"))

# A process that says what it compiled, and with "absent" one where TVM is not installed.
PROCESS = f"""
import importlib.util, logging, sys
import numpy as np
if sys.argv[1:] == ["absent"]:
    found = importlib.util.find_spec
    importlib.util.find_spec = lambda name, *rest: None if name == "tvm" else found(name, *rest)
    sys.modules["tvm"] = None
logging.basicConfig(level=logging.INFO, stream=sys.stdout, format="%(message)s")
from kernels_tvm.cpu import library
from kernels_tvm.descriptions import MatAddDescription
from kernels_tvm.store import Kernel
build = library.build
def record(kernel, *rest):
    print("compiled", kernel.name)
    return build(kernel, *rest)
library.build = record
function = library.load(Kernel{tuple(KERNEL)})
import tvm_ffi
y = np.zeros((1, 1, 2), np.int32)
function(*map(tvm_ffi.from_dlpack, (np.int8([[[1, -1, 0]]]), np.int8([[[5, 6], [7, 9], [1, 1]]]), y)))
print(y.tolist())
"""
SUM = "[[[-2, -3]]]"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a package with one kernel for this machine."""
    folder = tmp_path_factory.mktemp("site-packages") / PACKAGE
    write_package(folder, [KERNEL], [host_target()], [thread_count()])
    return folder


@pytest.fixture
def package(made, tmp_path):
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "site-packages" / PACKAGE)


def load(package, *arguments):
    """What such a process with an empty cache and this package prints, line by line."""
    paths = os.pathsep.join(filter(None, (str(package.parent), os.environ.get("PYTHONPATH"))))
    here = {"PYTHONPATH": paths, "XDG_CACHE_HOME": str(package.parent / "cache")}
    run = subprocess.run(
        [sys.executable, "-c", PROCESS, *arguments],
        capture_output=True,
        text=True,
        env={**os.environ, **here},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.splitlines()


def test_a_kernel_of_the_package_is_not_compiled(package):
    assert load(package) == [SUM]


def test_a_kernel_of_the_package_runs_where_tvm_is_not_installed(package):
    assert load(package, "absent") == [SUM]


def test_a_changed_library_is_refused_and_the_kernel_compiled(package):
    (path,) = (package / "kernels" / host_target().name).iterdir()
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    refused, _, compiled_here, result = load(package)
    assert refused == f"{path} is damaged and not used; install the package again"
    assert (compiled_here, result) == ("compiled matadd", SUM)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda part: part["made_by"].update(source="other"), "other versions made them"),
        (lambda part: part.update(threads=77), f"they are for 77 threads, and there are {thread_count()}"),
        (lambda part: part.update(targets={"other": {}}), "they are for other, not for this CPU"),
        (lambda part: part.pop("made_by"), "its manifest.json is not whole"),
    ],
)
def test_a_package_that_does_not_suit_is_ignored_in_one_line(package, monkeypatch, caplog, change, reason):
    manifest = json.loads((package / "manifest.json").read_text())
    change(manifest["kernels"][0])
    (package / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.syspath_prepend(package.parent)
    assert compiled.installed.__wrapped__() is None
    assert caplog.messages == [f"the compiled kernels in {package} are not used: {reason}"]


def test_tile_sizes_that_were_tuned_here_come_before_the_package(monkeypatch, tmp_path):
    monkeypatch.setattr(library, "installed_library", lambda key: tmp_path)
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    records = library.user_records(host_target())
    records.parent.mkdir(parents=True)
    records.write_text(json.dumps({KERNEL.key: {}}))
    assert not library.is_provided(KERNEL.key)
    assert library.is_provided("another kernel")


def part(threads, *targets):
    return {
        "threads": threads,
        "made_by": makers(),
        "targets": {name: {"key": f"{name} for {threads}"} for name in targets},
    }


PARTS = [part(threads, "avx2", "avx512_vnni") for threads in (1, 2, 4)]


@pytest.fixture
def machine(monkeypatch):
    """Has `choose` choose for another machine, by its features and threads, with TVM or without."""

    def describe(features, threads, has_tvm):
        mine = [target for target in TARGETS if target.name in features]
        monkeypatch.setattr(compiled, "runs_here", mine.__contains__)
        monkeypatch.setattr(compiled, "host_target", lambda: mine[0])
        monkeypatch.setattr(compiled, "thread_count", lambda: threads)
        monkeypatch.setattr(store, "is_installed", lambda: has_tvm)
        monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
        monkeypatch.delenv("SHIFTADDVIT_TARGET", raising=False)

    return describe


@pytest.mark.parametrize(
    ("features", "threads", "has_tvm", "chosen"),
    [
        (("avx512_vnni", "avx2"), 2, True, "avx512_vnni for 2"),
        (("avx2",), 4, True, "avx2 for 4"),
        (("avx512", "avx2"), 4, False, "avx2 for 4"),
        (("avx512_vnni", "avx2"), 3, False, "avx512_vnni for 2"),
        (("avx512_vnni", "avx2"), 64, False, "avx512_vnni for 4"),
    ],
)
def test_the_best_libraries_that_run_are_chosen(machine, features, threads, has_tvm, chosen):
    machine(features, threads, has_tvm)
    assert choose(PARTS)[0] == {"key": chosen}


@pytest.mark.parametrize(
    ("features", "threads", "has_tvm"),
    [(("avx512", "avx2"), 4, True), (("avx2",), 3, True), (("avx_vnni",), 1, False)],
)
def test_a_compiler_is_preferred_to_libraries_for_a_lesser_machine(machine, features, threads, has_tvm):
    machine(features, threads, has_tvm)
    with pytest.raises(ValueError, match="they are for"):
        choose(PARTS)


def test_threads_and_target_of_the_environment_are_heeded(machine, monkeypatch):
    machine(("avx512_vnni", "avx2"), 8, has_tvm=False)
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    monkeypatch.setenv("SHIFTADDVIT_TARGET", "avx2")
    assert choose(PARTS) == ({"key": "avx2 for 1"}, 1)
    monkeypatch.setenv("TVM_NUM_THREADS", "3")
    with pytest.raises(ValueError, match="they are for 1, 2, 4 threads, and there are 3"):
        choose(PARTS)
