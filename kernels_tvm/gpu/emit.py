"""Pieces of GPU kernels: launches, shared memory, barriers, vectors of 128 bits.

Kernels are Python functions that emit TIR. A Python loop and a loop of `T.unroll` are unrolled; a loop of
`T.serial` stays a loop.
"""

import functools
from collections.abc import Generator
from contextlib import contextmanager

from tvm.script.ir_builder import tirx as T

WORD_LANES = 4  # words of 32 bits in 128


@contextmanager
def launch(threads: int, x, y=1) -> Generator[tuple]:
    """A context that runs in x * y blocks of ``threads`` threads; yields a block's indices and a thread's."""
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
    """A thread's own buffer; its elements are registers if all loops over it unroll."""
    return T.alloc_buffer((size,), dtype, scope="local")


def opaque(value, dtype: str = "int32"):
    """A number that TVM's simplifier does not replace by its expression, which would grow with each use."""
    place = registers(1, dtype)
    T.buffer_store(place, value, [0])
    return place[0]


def barrier() -> None:
    """Wait until all threads of the block are here."""
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
