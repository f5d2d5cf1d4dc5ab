import os
import platform
import re

import pytest

from kernels_tvm import runtime
from kernels_tvm.cpu import targets
from kernels_tvm.cpu.targets import TARGETS, named_target

AVX2 = {"avx2", "fma", "bmi2", "f16c"}
AVX512 = AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


@pytest.fixture
def host(monkeypatch):
    """The function that picks a target, for a machine and its CPU's features."""
    monkeypatch.delenv("SHIFTADDVIT_TARGET", raising=False)

    def choose(machine, features, wanted=None):
        monkeypatch.setattr(platform, "machine", lambda: machine)
        monkeypatch.setattr(targets, "_cpu_features", lambda: frozenset(features))
        monkeypatch.setattr(targets, "_may_use_amx", lambda: True)
        if wanted is not None:
            monkeypatch.setenv("SHIFTADDVIT_TARGET", wanted)
        return targets.host_target.__wrapped__()

    return choose


@pytest.mark.parametrize(
    ("machine", "features", "name"),
    [
        ("x86_64", AVX2, "avx2"),
        ("x86_64", AVX2 | {"avx_vnni"}, "avx_vnni"),
        ("x86_64", AVX512, "avx512"),
        ("x86_64", AVX512 | {"avx512_vnni", "sse", "avx_vnni"}, "avx512_vnni"),
        ("x86_64", AVX512 | {"avx512_vnni", "amx_tile", "amx_int8", "amx_bf16"}, "amx"),
        ("aarch64", {"asimd", "asimddp", "fp"}, "neon"),
    ],
)
def test_a_machine_has_the_best_target_that_its_cpu_runs(host, machine, features, name):
    assert host(machine, features).name == name


@pytest.mark.parametrize(
    ("machine", "features"),
    [("x86_64", AVX2 - {"fma"}), ("x86_64", ()), ("aarch64", {"asimd"}), ("riscv64", AVX512)],
)
def test_a_machine_without_the_features_has_no_target(host, machine, features):
    assert host(machine, features) is None


def test_matrix_registers_that_the_system_refuses_are_not_used(host, monkeypatch):
    features = AVX512 | {"avx512_vnni", "amx_tile", "amx_int8", "amx_bf16"}
    host("x86_64", features)
    monkeypatch.setattr(targets, "_may_use_amx", lambda: False)
    assert targets.host_target.__wrapped__().name == "avx512_vnni"


def test_the_environment_names_another_target(host):
    assert host("x86_64", AVX512, "avx2").name == "avx2"


def test_an_unknown_target_in_the_environment_is_an_error_with_the_known_ones(host):
    with pytest.raises(ValueError, match=r"unknown target 'avx3'; choose among amx, avx512_vnni, .*, neon"):
        host("x86_64", AVX512, "avx3")


@pytest.mark.parametrize("wanted", ["neon", "amx"])
def test_a_target_that_does_not_run_is_an_error_with_those_that_do(host, wanted):
    message = f"SHIFTADDVIT_TARGET is '{wanted}', which this machine does not run; it runs avx512, avx2"
    with pytest.raises(ValueError, match=re.escape(message)):
        host("x86_64", AVX512, wanted)


def test_where_no_target_runs_the_error_says_none(host):
    with pytest.raises(ValueError, match="does not run; it runs none"):
        host("riscv64", (), "avx2")


def test_every_target_has_a_name_of_its_own():
    assert [named_target(target.name) for target in TARGETS] == list(TARGETS)


@pytest.mark.parametrize(("value", "threads"), [("3", 3), ("1", 1)])
def test_tvm_num_threads_sets_the_number_of_threads(monkeypatch, value, threads):
    monkeypatch.setenv("TVM_NUM_THREADS", value)
    assert targets.thread_count.__wrapped__() == threads


@pytest.mark.parametrize("value", ["0", "-2", "abc", "2.5", "1_0"])
def test_a_number_of_threads_that_is_none_is_an_error(monkeypatch, value):
    monkeypatch.setenv("TVM_NUM_THREADS", value)
    message = f"TVM_NUM_THREADS is '{value}'; expected a whole number of at least 1"
    with pytest.raises(ValueError, match=re.escape(message)):
        targets.thread_count.__wrapped__()


def test_by_default_there_is_a_thread_for_each_cpu_of_the_process(monkeypatch):
    monkeypatch.delenv("TVM_NUM_THREADS", raising=False)
    monkeypatch.setattr(targets.os, "sched_getaffinity", lambda pid: {0, 2, 5})
    assert targets.thread_count.__wrapped__() == 3


@pytest.mark.parametrize(("given", "used"), [(None, "100"), ("7", "7")])
def test_waiting_threads_sleep_soon_unless_told_otherwise(monkeypatch, given, used):
    name = "TVM_THREAD_POOL_SPIN_COUNT"
    monkeypatch.setenv(name, given or "")
    if given is None:
        monkeypatch.delenv(name)
    runtime.start.__wrapped__()
    assert os.environ[name] == used
