import dataclasses
import hashlib
import os
import re
import shutil
import stat
import subprocess
import sys
import textwrap
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import numpy as np
import pytest

from kernels_tvm import store
from kernels_tvm.cpu import library, targets
from kernels_tvm.descriptions import MatAddDescription
from kernels_tvm.runtime import once
from kernels_tvm.store import Kernel, cache_folder

KERNEL = Kernel("matadd", MatAddDescription(3, 2, "int8"))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An empty cache."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return cache_folder()


@pytest.fixture
def builds(monkeypatch):
    """The kernels compiled so far."""
    compiled, build = [], library.build

    def record(kernel, *arguments):
        compiled.append(kernel)
        return build(kernel, *arguments)

    monkeypatch.setattr(library, "build", record)
    return compiled


def load():
    """The kernel as a process that has not loaded it finds it, once it has added two numbers."""
    import tvm

    function = library.load.__wrapped__(KERNEL)
    codes, values = np.int8([[[1, -1, 0]]]), np.int8([[[5, 6], [7, 9], [1, 1]]])
    y = tvm.runtime.empty((1, 1, 2), "int32")
    function(tvm.runtime.tensor(codes), tvm.runtime.tensor(values), y)
    np.testing.assert_array_equal(y.numpy(), [[[-2, -3]]])
    return function


# What a process of its own does before `load`.
PROCESS = f"""
import os, signal, sys
import numpy as np
from kernels_tvm.cpu import library
from kernels_tvm.descriptions import MatAddDescription
from kernels_tvm.store import Kernel
KERNEL = Kernel{tuple(KERNEL)}
"""
LOAD = """
function = library.load(KERNEL)
import tvm_ffi
y = np.zeros((1, 1, 2), np.int32)
function(*map(tvm_ffi.from_dlpack, (np.int8([[[1, -1, 0]]]), np.int8([[[5, 6], [7, 9], [1, 1]]]), y)))
assert y.tolist() == [[[-2, -3]]]
"""


def start(*code, **environment):
    """A process in this environment; its standard error is a pipe."""
    program = PROCESS + "".join(textwrap.dedent(part) for part in code)
    return subprocess.Popen(
        [sys.executable, "-c", program], stderr=subprocess.PIPE, text=True, env=os.environ | environment
    )


def finish(process):
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors


def entries(folder):
    return [path.name for path in folder.iterdir()]


def test_a_compiled_kernel_is_one_file_in_a_folder_of_the_users_alone(folder):
    load()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    name = library.entry_name(KERNEL, targets.host_target(), targets.thread_count())
    assert entries(folder) == [f"{name}.so"]


def test_without_xdg_cache_home_the_folder_is_in_the_home(monkeypatch, tmp_path):
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "shiftaddvit_jax" / "kernels"


def test_threads_that_ask_at_once_share_one_result():
    @once
    def slow(argument):
        time.sleep(0.05)
        return once(lambda: [argument])()  # one such function may call another

    with ThreadPoolExecutor(4) as pool:
        first, second, third, other = pool.map(slow, (1, 1, 1, 2))
    assert first is second is third
    assert (first, other) == ([1], [2])


@pytest.mark.usefixtures("folder")
def test_a_kernel_is_compiled_once(builds):
    load()
    load()
    assert builds == [KERNEL]


def test_another_process_loads_what_this_one_compiled(folder):
    load()
    finish(start("library.build = None", LOAD))
    assert len(entries(folder)) == 1


def test_a_process_that_compiles_nothing_imports_neither_the_compiler_nor_torch(folder):
    load()
    run = """
        import jax
        from shiftaddvit_jax.ops import matadd
        codes, values = np.int8([[1, -1, 0]]), np.int8([[5, 6], [7, 9], [1, 1]])
        y = jax.jit(lambda codes, values: matadd(codes, values, implementation="tvm"))(codes, values)
        assert y.tolist() == [[-2, -3]]
        assert "jax_tvm_ffi" in sys.modules
        assert not {"tvm", "torch"} & sys.modules.keys()
        """
    finish(start("library.build = None", run))
    assert len(entries(folder)) == 1


def test_a_process_that_has_loaded_a_kernel_compiles_another(folder):
    load()
    compile_another = """
        assert "tvm" not in sys.modules
        other = library.load(Kernel("matadd", MatAddDescription(2, 1, "int8")))
        assert "tvm" in sys.modules
        y = np.zeros((1, 1, 1), np.int32)
        other(*map(tvm_ffi.from_dlpack, (np.int8([[[-1, 1]]]), np.int8([[[5], [7]]]), y)))
        assert y.tolist() == [[[2]]]
        """
    finish(start(LOAD, compile_another, LOAD))
    assert len(entries(folder)) == 2


@pytest.mark.skipif(find_spec("torch") is None, reason="torch is not installed")
def test_torch_can_be_imported_after_a_kernel_and_stays_as_it_was_before_it(folder):
    load()
    imported = """
        import torch
        assert torch.ones(3).sum() == 3
        """
    finish(start(LOAD, imported))
    finish(start(imported, LOAD, "assert tvm_ffi._convert.torch is torch"))


@pytest.mark.skipif(
    not targets.runs_here(targets.named_target("avx2")), reason="this machine does not run avx2"
)
def test_the_environment_has_a_process_compile_for_another_target(folder):
    check = """
        from kernels_tvm.cpu.targets import host_target
        assert host_target().name == "avx2"
        """
    finish(start(check, LOAD, SHIFTADDVIT_TARGET="avx2"))
    name = library.entry_name(KERNEL, targets.named_target("avx2"), targets.thread_count())
    assert entries(folder) == [f"{name}.so"]


@pytest.mark.parametrize("text", ["{", "[]", '{"matadd": 3}', '{"matadd": {"tiles": 3}}'])
def test_a_damaged_record_of_tile_sizes_is_ignored_with_a_warning(monkeypatch, tmp_path, text):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    path = library.user_records(targets.host_target())
    path.parent.mkdir(parents=True)
    path.write_text(text)
    with pytest.warns(UserWarning, match=r"does not hold tile sizes .*; delete it, and tune again"):
        assert library.kernel_target(KERNEL) == targets.host_target()


def test_a_process_has_the_threads_that_its_kernels_are_cut_for(folder):
    unset = """
        os.environ.pop("TVM_NUM_THREADS", None)
        """
    check = """
        assert tvm_ffi.get_global_func("runtime.NumThreads")() == len(os.sched_getaffinity(0))
        """
    finish(start(unset, LOAD, check))


def test_a_target_that_does_not_run_ends_a_process_with_the_reason():
    process = start(LOAD, SHIFTADDVIT_TARGET="avx3")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 1
    assert "ValueError: unknown target 'avx3'; choose among amx" in errors


def test_two_processes_at_once_compile_and_load_the_same_kernel(folder):
    processes = [start(LOAD), start(LOAD)]
    for process in processes:
        finish(process)
    assert len(entries(folder)) == 1
    load()


def changed(content):
    return content[:5000] + bytes([content[5000] ^ 1]) + content[5001:]


def with_its_hash(content):
    return content + hashlib.sha256(content).digest()


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 3],
        lambda content: content[:-1],
        changed,
        lambda content: with_its_hash(b"no library"),
        lambda content: with_its_hash(content[:100]),
    ],
    ids=["empty", "a third", "a byte less", "a changed bit", "text", "a header"],
)
def test_a_damaged_entry_is_compiled_again(folder, builds, tmp_path, monkeypatch, damage):
    load()
    (entry,) = folder.iterdir()
    # Elsewhere: the library that is loaded stays as it is.
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "damaged"))
    cache_folder().mkdir(parents=True)
    (cache_folder() / entry.name).write_bytes(damage(entry.read_bytes()))
    load()
    load()
    assert builds == [KERNEL] * 2
    assert entries(cache_folder()) == [entry.name]


def test_a_process_killed_while_it_writes_leaves_no_entry(folder, builds):
    killed = start(
        """
        from kernels_tvm.cpu import library
        def write_half(self, path):
            with open(path, "wb") as file:
                file.write(b"half a library")
            os.kill(os.getpid(), signal.SIGKILL)
        import tvm
        tvm.runtime.Executable.export_library = write_half
        """,
        LOAD,
    )
    killed.communicate(timeout=300)
    assert killed.returncode == -9
    assert not list(folder.glob("*.so"))
    load()
    assert builds == [KERNEL]
    assert len(list(folder.glob("*.so"))) == 1


def test_a_folder_that_cannot_be_written_is_done_without(monkeypatch, tmp_path, builds):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    message = f"{cache_folder()} can't be written, so every kernel is compiled at every start"
    with pytest.warns(UserWarning, match=re.escape(message)):
        load()
    with warnings.catch_warnings(action="error"):
        load()
    assert builds == [KERNEL] * 2


def test_a_machine_without_a_linker_keeps_kernels_for_the_process(folder, monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    load()
    assert not folder.exists()


def test_a_cpu_that_is_no_target_is_an_error(monkeypatch):
    monkeypatch.setattr(library, "host_target", lambda: None)
    with pytest.raises(ValueError, match=r"no kernels for this CPU, only for amx, .*, neon"):
        library.load.__wrapped__(KERNEL)


def test_an_entry_is_named_by_all_that_it_depends_on(monkeypatch):
    amx, avx2 = (targets.named_target(name) for name in ("amx", "avx2"))

    def name(kernel=KERNEL, target=amx, threads=2):
        return library.entry_name(kernel, target, threads)

    names = {
        name(),
        name(Kernel("hamming_product", KERNEL.description)),
        name(Kernel("matadd", MatAddDescription(3, 2))),
        name(Kernel("matadd", MatAddDescription(2, 3, "int8"))),
        name(target=avx2),
        name(threads=3),
        *(name(target=dataclasses.replace(amx, **{fact.name: 1})) for fact in dataclasses.fields(amx)),
    }
    monkeypatch.setattr(store, "source_hash", lambda side: "other")
    names.add(name())
    monkeypatch.setattr(store.metadata, "version", lambda package: "other")
    names.add(name())
    assert len(names) == 8 + len(dataclasses.fields(amx))
    assert all(name.startswith(("matadd-", "hamming_product-")) for name in names)


@pytest.mark.parametrize("fact", [fact.name for fact in dataclasses.fields(targets.Target)])
def test_an_entry_is_named_by_each_fact_of_its_target(fact):
    avx2 = targets.named_target("avx2")
    changed = dataclasses.replace(avx2, **{fact: 1})
    assert library.entry_name(KERNEL, changed, 2) != library.entry_name(KERNEL, avx2, 2)


def test_an_entry_has_the_same_name_in_every_process():
    name = library.entry_name(KERNEL, targets.named_target("avx2"), 2)
    check = f"""
        from kernels_tvm.cpu.targets import named_target
        assert library.entry_name(KERNEL, named_target("avx2"), 2) == {name!r}
        """
    for process in [start(check, PYTHONHASHSEED=seed) for seed in ("1", "2")]:
        finish(process)
