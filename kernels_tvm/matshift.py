"""MatShift: rows times a packed power-of-two weight, plus a bias."""

from collections.abc import Callable

from tvm.script.ir_builder import tirx as T

from kernels_tvm.descriptions import Linear
from kernels_tvm.emit import (
    Arguments,
    for_each_vector,
    kernel,
    lanes,
    load_lanes,
    otherwise,
    store_lanes,
    when,
)
from kernels_tvm.linear import apply_layer, few_rows
from kernels_tvm.targets import Target, without_matrices

VECTOR_ROWS = 12  # multiplied in less time than their weights are written the way matrix registers read them


def linear_kernel(target: Target, threads: int, linear: Linear):
    """``y = linear(x)``: x [rows, inputs] float32, the parameters, y [rows, outputs] float32."""

    def body(arguments: Arguments):
        x = arguments("x", ("rows", linear.inputs), "float32")
        buffers = arguments.parameters(linear)
        y = arguments("y", ("rows", linear.outputs), "float32")

        def load_row(row, buffer, offset):
            copy_row(x, row, linear.inputs, buffer, offset)

        multiply_rows(target, threads, linear, buffers, arguments.symbols["rows"], load_row, y)

    return kernel(body)


def multiply_rows(
    target: Target, threads: int, linear: Linear, buffers: dict, rows, load_row: Callable, y
) -> None:
    """Emit ``y`` = a layer of ``rows`` rows, however many they are at run time.

    ``load_row`` is the ``load_rows`` of `Layer.tile`, for one row.
    """

    def store(row, column, value, lanes_):
        store_lanes(y, value, [row], column, lanes_)

    def apply(target, few):
        apply_layer(target, threads, linear, buffers, rows, load_row, store, few)

    few = T.bind(few_rows(rows, linear))
    with when(few):
        if target.dot == "amx":
            with when(rows <= VECTOR_ROWS):
                apply(without_matrices(target), True)
            with otherwise(rows <= VECTOR_ROWS):
                apply(target, True)
        else:
            apply(target, True)
    with otherwise(few):
        apply(target, False)


def copy_row(x, row, channels: int, buffer, offset) -> None:
    """Copy a row of ``x`` to scratch memory, with zeros up to the next whole vector."""

    def copy(column, count):
        T.buffer_store(buffer, load_lanes(x, [row], column, count), [lanes(offset + column)])

    for_each_vector(channels, copy)
