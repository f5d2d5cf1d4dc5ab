"""Work that threads claim: all of it, once, and none waits for a thread that is late."""

import dataclasses

import numpy as np
import pytest

from kernels_tvm.cpu import targets

RUNNING = [target for target in targets.TARGETS if targets.runs_here(target)]
pytestmark = pytest.mark.skipif(not RUNNING, reason="no kernel runs on this machine")


def run(threads, count, known=False, parallel=True, target=None):
    """How often each number's work is done, which thread does it, and as the how manieth of that thread."""
    import tvm
    from tvm.script.ir_builder import tirx as T

    from kernels_tvm.cpu.build import compile_kernel
    from kernels_tvm.cpu.emit import Claims
    from kernels_tvm.emit import kernel

    target = target or RUNNING[0]

    def body(arguments):
        times, owner, order, done = (
            arguments(name, (size,), "int32")
            for name, size in [("times", "n"), ("owner", "n"), ("order", "n"), ("done", threads)]
        )
        claims = Claims(target, count if known else arguments.symbols["n"], threads)
        with (T.parallel if parallel else T.serial)(0, threads) as thread, claims.of(thread) as number:
            T.buffer_store(times, times[number] + 1, [number])
            T.buffer_store(owner, thread, [number])
            T.buffer_store(order, done[thread], [number])
            T.buffer_store(done, done[thread] + 1, [thread])

    arrays = [tvm.runtime.tensor(np.zeros(size, np.int32)) for size in (count, count, count, threads)]
    compile_kernel(kernel(body), target)["main"](*arrays)
    return [array.numpy() for array in arrays[:3]]


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
@pytest.mark.parametrize(
    ("count", "known"), [(1, True), (7, True), (300, True), (0, False), (5, False), (1001, False)]
)
def test_every_number_is_claimed_once(threads, count, known):
    times, _, _ = run(threads, count, known)
    np.testing.assert_array_equal(times, 1)


def test_the_share_of_a_thread_that_comes_late_is_taken_from_its_end():
    # One after the other, so that the second and the third find nothing left.
    _, owner, order = run(3, 9, known=True, parallel=False)
    np.testing.assert_array_equal(owner, 0)
    np.testing.assert_array_equal(order, [0, 1, 2, 5, 4, 3, 8, 7, 6])


def test_without_an_instruction_to_claim_with_each_thread_does_its_share():
    fixed = dataclasses.replace(RUNNING[0], machine="aarch64")
    times, owner, order = run(3, 8, known=True, target=fixed)
    np.testing.assert_array_equal(times, 1)
    np.testing.assert_array_equal(owner, [0, 0, 0, 1, 1, 1, 2, 2])
    np.testing.assert_array_equal(order, [0, 1, 2, 0, 1, 2, 0, 1])
