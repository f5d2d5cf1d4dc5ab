"""Pieces of kernels for CPUs and for GPUs: the function, its arguments, and conditions."""

from collections.abc import Callable, Generator
from contextlib import contextmanager

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from kernels_tvm.descriptions import joined


class View:
    """A part of a flat buffer, from ``start`` on, that is read like a buffer of ``shape``."""

    def __init__(self, whole, start: int, shape: tuple[int, ...]):
        self.whole, self.start, self.shape = whole, start, shape

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        flat = 0
        for size, at in zip(self.shape, index, strict=True):
            flat = flat * size + at
        return self.whole[flat + self.start]


class Arguments:
    """The arguments of a kernel: each call declares the next one."""

    def __init__(self):
        self.symbols = {}

    def __call__(self, name: str, shape: tuple[int | str, ...], dtype: str):
        """A buffer. A string in ``shape`` names a size known at run time; equal names are equal sizes."""
        sizes = []
        handle = T.arg(name, T.handle())
        for size in shape:
            if isinstance(size, str):
                size = self.symbols.setdefault(size, T.int32())
            sizes.append(size)
        return T.match_buffer(handle, tuple(sizes), dtype)

    def parameters(self, description) -> dict:
        """The buffers of a description's parameters, by name; `joined` parameters are views of one buffer."""
        starts, size = joined(description)
        parameters = description.arguments()
        buffers = {name: self(name, shape, dtype) for name, shape, dtype in parameters if name not in starts}
        whole = self("joined", (size,), "float32")
        return buffers | {
            name: View(whole, starts[name], shape) for name, shape, _ in parameters if name in starts
        }


def kernel(body: Callable[[Arguments], None]):
    """The TIR function ``main`` that ``body`` emits."""
    with IRBuilder() as builder, T.prim_func():
        T.func_name("main")
        T.func_attr({"tirx.noalias": True, "global_symbol": "main"})
        body(Arguments())
    return builder.get()


@contextmanager
def when(condition) -> Generator[None]:
    """A context whose statements run if ``condition`` holds."""
    with T.If(condition), T.Then():
        yield


@contextmanager
def otherwise(condition) -> Generator[None]:
    """A context whose statements run if ``condition`` does not hold."""
    with T.If(T.Not(condition)), T.Then():
        yield


def part(buffers: dict, prefix: str) -> dict:
    """The buffers whose names start with ``prefix``, by their names without it."""
    return {name.removeprefix(prefix): buffer for name, buffer in buffers.items() if name.startswith(prefix)}
