"""Pieces that GPU kernels are written with: launches, shared memory, barriers, vectors of 128 bits.

Kernels are Python functions that emit TIR, as on CPUs (`kernels_tvm.cpu.emit`). A Python loop and a loop of
`T.unroll` are unrolled; one of `T.serial` stays a loop.
"""

import functools
from collections.abc import Iterator
from contextlib import contextmanager

from tvm.script.ir_builder import tirx as T

WORD_LANES = 4  # words of 32 bits in 128


@contextmanager
def launch(threads: int, x, y=1) -> Iterator[tuple]:
    """What is inside runs as x * y blocks of ``threads`` threads; yields a block's indices and a thread's."""
    with (
        T.launch_thread("blockIdx.x", x) as block_x,
        T.launch_thread("blockIdx.y", y) as block_y,
        T.launch_thread("threadIdx.x", threads) as thread,
    ):
        yield block_x, block_y, thread


def shared(shape: tuple[int, ...], dtype: str = "float32"):
    """A buffer that the threads of a block share."""
    return T.alloc_buffer(shape, dtype, scope="shared")


def registers(size: int, dtype: str = "float32"):
    """A thread's own buffer; loops over it must unroll, so that its elements are registers."""
    return T.alloc_buffer((size,), dtype, scope="local")


def barrier() -> None:
    """All threads of the block get here before any goes on."""
    T.evaluate(T.tvm_storage_sync("shared"))


def quad(start):
    """The indices of a vector of 128 bits."""
    return T.ramp(start, 1, WORD_LANES)


def fill(buffer, value, size: int) -> None:
    """Write ``value`` to each of a thread's ``size`` registers."""
    with T.unroll(0, size) as i:
        T.buffer_store(buffer, value, [i])


def words_of(buffer, shape: tuple[int, ...], dtype: str = "int32"):
    """The same memory seen as words of 32 bits."""
    return T.decl_buffer(shape, dtype, data=buffer.data)


def all_of(*conditions):
    """Whether all conditions hold."""
    return functools.reduce(T.And, conditions)
