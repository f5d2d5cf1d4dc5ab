"""Pieces of kernels for CPUs and for GPUs: the function, its arguments, and conditions."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as T

from kernels_tvm.descriptions import joined


class View:
    """A part of a buffer, from ``start`` on, to be read like a buffer of that shape."""

    def __init__(self, whole, start: int, shape: tuple[int, ...]):
        self.whole, self.start, self.shape = whole, start, shape

    def __getitem__(self, index):
        index = index if isinstance(index, tuple) else (index,)
        flat = 0
        for size, at in zip(self.shape, index, strict=True):
            flat = flat * size + at
        return self.whole[flat + self.start]


class Arguments:
    """The buffers of a kernel, in the order in which it declares them."""

    def __init__(self):
        self.symbols = {}

    def __call__(self, name: str, shape: tuple[int | str, ...], dtype: str):
        """A buffer; a string in ``shape`` is a size known only at run time, equal wherever it stands."""
        sizes = []
        handle = T.arg(name, T.handle())
        for size in shape:
            if isinstance(size, str):
                size = self.symbols.setdefault(size, T.int32())
            sizes.append(size)
        return T.match_buffer(handle, tuple(sizes), dtype)

    def parameters(self, description) -> dict:
        """The buffers of a description's parameters, by name; of those that are `joined`, views of one."""
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
def when(condition) -> Iterator[None]:
    """What is inside runs where ``condition`` holds."""
    with T.If(condition), T.Then():
        yield


@contextmanager
def otherwise(condition) -> Iterator[None]:
    """What is inside runs where ``condition`` does not hold."""
    with T.If(T.Not(condition)), T.Then():
        yield


def part(buffers: dict, prefix: str) -> dict:
    """The buffers whose names start with ``prefix``, without it."""
    return {name.removeprefix(prefix): buffer for name, buffer in buffers.items() if name.startswith(prefix)}
