"""Runs the rows of the study, several at a time, each on cores of its own; what is done stays done."""

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from pathlib import Path

from shiftaddvit_jax.bench.rounds import available_threads
from studies.fashion_mnist.rows import BY_NAME, LATENCIES, ROWS, Row, shown

# glibc then asks for pages of 2 MB: a step's buffers are new memory, and XLA takes a quarter less time.
LARGE_PAGES = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}

logger = logging.getLogger(__name__)
Task = tuple[Row, int]


def record_file(workdir: Path, row: Row, seed: int) -> Path:
    """Where a row's record lies once it is done."""
    return row.folder(workdir, seed) / "record.json"


def run_rows(workdir: Path, data: Path, rows: Sequence[Row], seeds: Sequence[int], jobs: int) -> list[str]:
    """Run what is not done yet, and what that begins with, ``jobs`` commands at a time.

    Returns:
      The names of what failed, or could not begin because of that.

    Raises:
      ValueError: more jobs than cores.
    """
    cores = sorted(os.sched_getaffinity(0))
    if not 1 <= jobs <= len(cores):
        raise ValueError(f"--jobs must be 1 to {len(cores)}, the cores there are, got {jobs}")
    workdir.mkdir(parents=True, exist_ok=True)
    tasks = _undone(workdir, rows, seeds)
    if (
        any(LATENCIES in str((row.settings, row.options)) for row, _ in tasks)
        and not (workdir / LATENCIES).exists()
    ):
        _measure_latencies(workdir)
    free = [cores[first::jobs] for first in range(jobs)]
    lock, failed = threading.Lock(), []
    running: dict[Future, Task] = {}

    def run(row, seed):
        with lock:
            mine = free.pop()
        try:
            _run_task(workdir, data, row, seed, mine)
        finally:
            with lock:
                free.append(mine)

    with ThreadPoolExecutor(jobs) as pool:
        while tasks or running:
            for task in list(tasks):
                row, seed = task
                start = BY_NAME.get(row.start), seed
                if start in failed:
                    failed.append(task)
                    tasks.remove(task)
                elif len(running) < jobs and start not in (*tasks, *running.values()):
                    tasks.remove(task)
                    running[pool.submit(run, *task)] = task
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                task = running.pop(future)
                if error := future.exception():
                    logger.error("%s", error)
                    failed.append(task)
    return [f"{row.name}-{seed}" for row, seed in failed]


def _undone(workdir, rows, seeds) -> list[Task]:
    """Tasks without a record, or without the model that another of them begins with, in `ROWS`' order."""
    tasks: list[Task] = []
    for row, seed in reversed(_with_starts(rows, seeds)):
        begins = any((row.name, seed) == (other.start, other_seed) for other, other_seed in tasks)
        lacks_model = begins and not (row.folder(workdir, seed) / "model").exists()
        if lacks_model or not record_file(workdir, row, seed).exists():
            tasks.insert(0, (row, seed))
    return tasks


def _with_starts(rows, seeds) -> list[Task]:
    """All tasks in the order of `ROWS`, with the rows that they begin with."""
    names = {row.name for row in rows}
    for row in reversed(ROWS):  # a row begins with one above it
        if row.name in names and row.start:
            names.add(row.start)
    return [(row, seed) for row in ROWS if row.name in names for seed in seeds]


def _run_task(workdir, data, row, seed, cores):
    """The row's command, then its record, each a process that may use ``cores`` alone."""
    folder = row.folder(workdir, seed)
    folder.mkdir(exist_ok=True)
    line = row.line(workdir, data, seed)
    logger.info("%s-%d: %s", row.name, seed, shown(line))
    commands = [["-m", "studies.fashion_mnist.record", row.name, str(seed), str(workdir), str(data)]]
    if row.command == "train" or not (folder / "model").exists():  # else it stopped ahead of its record
        commands.insert(0, ["-m", "shiftaddvit_jax", *line])
    with open(folder / "output.txt", "a") as output:
        for arguments in commands:
            process = subprocess.Popen(
                [sys.executable, *arguments],
                env=LARGE_PAGES | os.environ,
                stdout=output,
                stderr=subprocess.STDOUT,
                preexec_fn=lambda: os.sched_setaffinity(0, cores),
            )
            if status := process.wait():
                raise RuntimeError(f"{row.name}-{seed} ended with {status}; see {folder / 'output.txt'}")
    found = json.loads(record_file(workdir, row, seed).read_text())
    logger.info("%s-%d: top-1 %.2f %%", row.name, seed, 100 * found["top1"])


def _measure_latencies(workdir):
    """The experts' latencies on this machine, before anything else runs on it."""
    logger.info("timing experts on %d cores", available_threads())
    model = ["pvt_v2_nano", "--attention", "hamming_linear", "--mlp", "moe"]
    command = [sys.executable, "-m", "shiftaddvit_jax", "measure-latency", *model]
    subprocess.run([*command, "--json", str(workdir / LATENCIES)], check=True)
