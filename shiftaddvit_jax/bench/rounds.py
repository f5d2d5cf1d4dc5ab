"""Timing contestants against each other, in rounds, on one machine.

Each contestant is prepared once, in a process of its own. Then contestants take turns, A B C A B C ..., so
that a machine that slows down does so for all of them. A turn begins with unmeasured runs. A process is
stopped (SIGSTOP) unless it is its turn: thread pools differ in how long they spin without work, and no pool
may take time from another's turn. Two contestants' ratio is the median over the rounds of the ratio of their
medians in a round.
"""

import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from shiftaddvit_jax.progress import track

Run = Callable[[], Any]

WORKER = "shiftaddvit_jax.bench.worker"
WARM_UP_RUNS, LEAST_RUNS = 2, 3


@dataclass(frozen=True)
class Contestant:
    """What is timed.

    Attributes:
      name: its unique name, for people.
      task: what the worker loads, see `shiftaddvit_jax.bench.worker`.
      process: the name of its process, which contestants can share; by default it has its own.
      references: names of contestants; the ratio of times is to the first of them that runs.
    """

    name: str
    task: dict[str, Any]
    process: str | None = None
    references: tuple[str, ...] = ()


class Worker:
    """A process for contestants on the CPU, stopped except while it answers.

    It has a process group of its own, so that its parent alone handles Ctrl-C. If the parent is killed, the
    system ends the group as it does any stopped group without a parent, by SIGHUP and SIGCONT.
    """

    def __init__(self, threads: int) -> None:
        # XLA, OpenMP and TVM read their number of threads from the environment alone.
        count = dict.fromkeys(("NPROC", "OMP_NUM_THREADS", "TVM_NUM_THREADS"), str(threads))
        # By default glibc gives the memory of large results back to the system, in some processes in every
        # run. For 6 MB, that and the page faults that follow take 2 ms, more than the product that is timed.
        memory = {"MALLOC_MMAP_THRESHOLD_": str(2**25), "MALLOC_TRIM_THRESHOLD_": str(2**30)}
        self.log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the process)
        self.process = subprocess.Popen(
            [sys.executable, "-m", WORKER, str(threads)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log,
            text=True,
            env=os.environ | count | memory | {"JAX_PLATFORMS": "cpu"},
            process_group=0,
        )

    def ask(self, request: dict[str, Any]) -> dict[str, Any]:
        """The reply to one request.

        Raises:
          ValueError: the process failed or ended; the message has its last line on standard error.
        """
        self.process.send_signal(signal.SIGCONT)
        assert self.process.stdout is not None  # a pipe
        try:
            print(json.dumps(request), file=self.process.stdin, flush=True)
            reply = self.process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:
            self.log.seek(0)
            last = (self.log.read().decode(errors="replace").strip().splitlines() or ["no message"])[-1]
            raise ValueError(f"a benchmark process ended with code {self.process.wait()}: {last}")
        self.process.send_signal(signal.SIGSTOP)
        reply = json.loads(reply)
        if "failed" in reply:
            raise ValueError(f"a benchmark process failed: {reply['failed']}")
        return reply

    def __enter__(self) -> "Worker":
        return self

    def __exit__(self, *_) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()


def available_threads() -> int:
    """How many threads of this process can run at once."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def describe_machine(threads: int) -> dict[str, Any]:
    """The machine's ``cpu`` by name, ``system`` and available ``cores``, and the given ``threads``.

    Raises:
      ValueError: another number of threads than 1 to ``cores``.
    """
    cores = available_threads()
    if not 1 <= threads <= cores:
        raise ValueError(f"threads must be between 1 and {cores}, the cores there are; got {threads}")
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    return {"cpu": cpu, "system": platform.platform(), "cores": cores, "threads": threads}


def installed_versions(*packages: str) -> dict[str, str]:
    """The versions of those of the packages that are installed."""
    found = {package: list(metadata.Distribution.discover(name=package)) for package in packages}
    return {package: distributions[0].version for package, distributions in found.items() if distributions}


def versions_of(rows: Iterable[Mapping[str, Any]]) -> dict[str, str]:
    """The versions of all packages that take part in rows of `time_contestants`, by their names."""
    return dict(sorted({package for row in rows for package in row.get("versions", {}).items()}))


def describe_timing(threads: int | None = None) -> dict[str, Any]:
    """What times of JAX's programs and of kernels hold for: ``machine``, and ``versions`` of what computes.

    Raises:
      ValueError: as `describe_machine`; by default there are as many threads as can run at once.
    """
    machine = describe_machine(available_threads() if threads is None else threads)
    return {"machine": machine, "versions": installed_versions("jax", "jaxlib", "apache-tvm")}


def time_contestants(
    contestants: Sequence[Contestant], threads: int, rounds: int, seconds: float
) -> list[dict[str, Any]]:
    """A row for each contestant, in their order.

    A row has the contestant's ``name`` and ``task``, and its worker's reply to the load. If that has no
    message ``refused``, the row also has ``runs``, the number of measured runs; ``median_ms``, ``p10_ms`` and
    ``p90_ms``, the median and the 10th and 90th percentiles of their milliseconds; and, if one of its
    references ran, ``reference``, that one's name, and ``ratio``, the contestant's time over the reference's.

    Args:
      contestants: what is timed.
      threads: how many threads each contestant may use.
      rounds: turns of each contestant.
      seconds: how long a turn lasts, without its unmeasured runs.

    Raises:
      ValueError: a contestant whose process fails or ends.
    """
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    with ExitStack() as stack:
        workers, indices, rows = {}, {}, []
        loads = dict.fromkeys((c.process or c.name for c in contestants), 0)
        for contestant in track(contestants, "preparing", len(contestants)):
            process = contestant.process or contestant.name
            if process not in workers:
                workers[process] = stack.enter_context(Worker(threads))
            about = workers[process].ask({"load": contestant.task})
            indices[contestant.name] = (workers[process], loads[process])
            loads[process] += 1
            rows.append({"name": contestant.name, "task": contestant.task, **about})
        running = [row["name"] for row in rows if "refused" not in row]
        times = {name: [] for name in running}
        for _ in track(range(rounds), "rounds", rounds):
            for name in running:
                worker, index = indices[name]
                times[name].append(worker.ask({"run": index, "seconds": seconds})["times_ms"])
    for contestant, row in zip(contestants, rows, strict=True):
        if contestant.name in times:
            row |= summarize(times[contestant.name])
            reference = next((name for name in contestant.references if name in times), None)
            if reference is not None:
                row |= {"reference": reference, "ratio": ratio(times[contestant.name], times[reference])}
    return rows


def time_runs(run: Run, seconds: float) -> list[float]:
    """Milliseconds of each run, for ``seconds`` and at least three runs, after unmeasured ones."""
    for _ in range(WARM_UP_RUNS):
        run()
    times = []
    end = time.perf_counter() + seconds
    while len(times) < LEAST_RUNS or time.perf_counter() < end:
        start = time.perf_counter()
        run()
        times.append(1e3 * (time.perf_counter() - start))
    return times


def summarize(times_ms: Sequence[Sequence[float]]) -> dict[str, float]:
    """Number, median and percentiles of the runs of all rounds."""
    runs = np.concatenate(times_ms)
    low, median, high = np.percentile(runs, (10, 50, 90))
    return {"runs": len(runs), "median_ms": float(median), "p10_ms": float(low), "p90_ms": float(high)}


def ratio(times_ms: Sequence[Sequence[float]], reference_ms: Sequence[Sequence[float]]) -> float:
    """The median over the rounds of the ratio of a round's medians."""
    pairs = zip(times_ms, reference_ms, strict=True)
    return statistics.median(statistics.median(mine) / statistics.median(other) for mine, other in pairs)
