"""The table of CPUs: every hardware fact that the schedules read."""

import ctypes
import os
import platform
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, Literal

from kernels_tvm.targets import choose_target

Dot = Literal[
    "amx",
    "vpdpbusd_512",
    "vpdpbusd_256",
    "vpmaddubsw_512",
    "vpmaddubsw_256",
    "vpmaddwd_512",
    "vpmaddwd_256",
    "sdot_128",
]


@dataclass(frozen=True)
class Target:
    """A kind of CPU.

    Attributes:
      name: its name in records, cache entries and messages.
      machine: the value of `platform.machine` on such a CPU.
      features: the flags that /proc/cpuinfo must have.
      llvm: TVM's description of the target.
      float_tile: rows and columns of a float32 product whose sums registers hold; products with fewer columns
        take more rows.
      int8_tile: the same for an int8 product with int32 sums.
      strip_bytes: hidden activations that a thread keeps in its cache.
      convolved_tokens: how many neighbours a depthwise convolution computes at once.
      tables: whether an instruction looks up numbers in a table of 32, held by two registers.
      dot: the instruction that multiplies int8 numbers and adds the products to an int32. ``"amx"`` stands
        for matrix registers, which multiply bfloat16 numbers, too.
    """

    name: str
    machine: str
    features: frozenset[str]
    llvm: tuple[tuple[str, Any], ...]
    float_tile: tuple[int, int]
    int8_tile: tuple[int, int]
    strip_bytes: int
    convolved_tokens: int
    tables: bool
    dot: Dot

    @property
    def float_sums(self) -> int:
        """Sums of a float32 product that registers hold."""
        return self.float_tile[0] * self.float_tile[1]

    @property
    def int8_sums(self) -> int:
        """Sums of an int8 product that registers hold."""
        return self.int8_tile[0] * self.int8_tile[1]

    @property
    def activation_offset(self) -> int:
        """The number added to int8 activations: most of x86's instructions take unsigned ones."""
        return 128 if self.row_dtype == "uint8" else 0

    @property
    def row_dtype(self) -> str:
        """The dtype of int8 activations in memory."""
        if self.dot.startswith("vpmaddwd"):
            return "int16"
        return "int8" if self.dot == "sdot_128" else "uint8"

    @property
    def dot_inputs(self) -> int:
        """How many inputs a word of 32 bits holds, whose products `dot` adds up."""
        return 2 if self.row_dtype == "int16" else 4

    @property
    def claims(self) -> bool:
        """Whether threads can claim work from each other, see `emit.Claims`."""
        return self.machine == "x86_64"


_AVX2 = frozenset({"avx2", "fma", "bmi2", "f16c"})
_AVX512 = _AVX2 | {"avx512f", "avx512bw", "avx512dq", "avx512vl"}


def _x86(name, mcpu, features, dot, **facts):
    llvm = (("kind", "llvm"), ("mtriple", "x86_64-linux-gnu"), ("mcpu", mcpu))
    return Target(name, "x86_64", frozenset(features), llvm, dot=dot, **facts)


# 32 registers of 512 bits hold 6 x 64 sums, their factors and a broadcast; 16 of 256 bits hold 6 x 16 sums.
_WIDE: dict[str, Any] = {
    "float_tile": (6, 64),
    "int8_tile": (6, 64),
    "strip_bytes": 512 * 1024,
    "convolved_tokens": 7,
    "tables": True,
}
_NARROW: dict[str, Any] = {
    "float_tile": (6, 16),
    "int8_tile": (4, 16),
    "strip_bytes": 320 * 1024,
    "convolved_tokens": 2,
    "tables": False,
}

_AMX = _AVX512 | {"avx512_vnni", "amx_tile", "amx_int8", "amx_bf16"}

# Best first.
TARGETS = (
    _x86("amx", "sapphirerapids", _AMX, "amx", **(_WIDE | {"float_tile": (32, 32), "int8_tile": (32, 32)})),
    _x86("avx512_vnni", "cascadelake", _AVX512 | {"avx512_vnni"}, "vpdpbusd_512", **_WIDE),
    _x86("avx512", "skylake-avx512", _AVX512, "vpmaddubsw_512", **_WIDE),
    _x86("avx_vnni", "alderlake", _AVX2 | {"avx_vnni"}, "vpdpbusd_256", **_NARROW),
    _x86("avx2", "haswell", _AVX2, "vpmaddubsw_256", **_NARROW),
    Target(
        "neon",
        "aarch64",
        frozenset({"asimd", "asimddp"}),
        (("kind", "llvm"), ("mtriple", "aarch64-linux-gnu"), ("mattr", ("+neon", "+dotprod"))),
        dot="sdot_128",
        **_NARROW,
    ),
)


def without_matrices(target: Target) -> Target:
    """A target with AMX, without its matrix registers."""
    return replace(target, dot="vpdpbusd_512", float_tile=_WIDE["float_tile"], int8_tile=_WIDE["int8_tile"])


def for_whole_int8(target: Target) -> Target:
    """A target whose `dot` is exact for all int8 weights, not only for those of at most 64.

    vpmaddubsw adds two products in 16 bits: 2 * 255 * 64 = 32640 fits, larger sums saturate. vpmaddwd takes
    numbers of 16 bits and adds products in 32: 4 instructions for 32 products instead of 3, and twice the
    bytes of rows and decoded weights.
    """
    names: dict[Dot, Dot] = {"vpmaddubsw_512": "vpmaddwd_512", "vpmaddubsw_256": "vpmaddwd_256"}
    return replace(target, dot=names.get(target.dot, target.dot))


def named_target(name: str) -> Target:
    """The target of that name.

    Raises:
      ValueError: unknown name.
    """
    return choose_target(name, TARGETS)


@cache
def host_target() -> Target | None:
    """The best target that this machine runs, None if it runs none.

    The environment variable SHIFTADDVIT_TARGET chooses another one, such as ``avx2`` on a newer CPU.

    Raises:
      ValueError: SHIFTADDVIT_TARGET names an unknown target, or one that this machine does not run.
    """
    running = [target for target in TARGETS if runs_here(target)]
    wanted = os.environ.get("SHIFTADDVIT_TARGET")
    if wanted is None:
        return running[0] if running else None
    target = named_target(wanted)
    if target not in running:
        raise ValueError(
            f"SHIFTADDVIT_TARGET is {wanted!r}, which this machine does not run; it runs "
            f"{', '.join(t.name for t in running) or 'none'}"
        )
    return target


def runs_here(target: Target) -> bool:
    """Whether this machine's CPU and system run the target's code."""
    if target.machine != platform.machine() or not target.features <= _cpu_features():
        return False
    return target.dot != "amx" or _may_use_amx()


def _may_use_amx() -> bool:
    """Ask Linux for the matrix registers, which a process may not use before."""
    arch_prctl, request_permission, tile_data = 158, 0x1023, 18
    return ctypes.CDLL(None).syscall(arch_prctl, request_permission, tile_data) == 0


def _cpu_features() -> frozenset[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return frozenset()
    for line in lines:
        name, _, value = line.partition(":")
        if name.strip() in ("flags", "Features"):
            return frozenset(value.split())
    return frozenset()


@cache
def thread_count() -> int:
    """The number of threads that share a kernel's work: TVM_NUM_THREADS, else the CPUs of this process.

    Raises:
      ValueError: TVM_NUM_THREADS is no whole number of at least 1.
    """
    wanted = os.environ.get("TVM_NUM_THREADS")
    if not wanted:
        return len(os.sched_getaffinity(0))
    if not (wanted.isascii() and wanted.isdigit() and int(wanted) >= 1):
        raise ValueError(f"TVM_NUM_THREADS is {wanted!r}; expected a whole number of at least 1")
    return int(wanted)
