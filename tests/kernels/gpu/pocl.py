"""Runs GPU kernels on the CPU: their OpenCL source through PoCL, launched as the TIR's ``main`` says.

Thread blocks, shared memory and barriers are real. Launches run in order, as on one stream.
"""

import functools
import operator

import numpy as np
import pytest

from kernels_tvm.gpu.targets import OPENCL

OPERATORS = {
    "Add": operator.add,
    "Sub": operator.sub,
    "Mul": operator.mul,
    "FloorDiv": operator.floordiv,
    "Max": max,
    "Min": min,
    "LT": operator.lt,
    "GT": operator.gt,
    "And": lambda a, b: a and b,
}


@functools.cache
def queue():
    """The CPU's command queue; the test is skipped where OpenCL or PoCL is missing."""
    cl = pytest.importorskip(
        "pyopencl", reason="pyopencl is not installed (pip install 'shiftaddvit-jax[test]')"
    )
    try:
        devices = [d for p in cl.get_platforms() for d in p.get_devices(cl.device_type.CPU)]
    except cl.LogicError:
        devices = []
    if not devices:
        pytest.skip("OpenCL finds no CPU (pip install pocl-binary-distribution)")
    return cl.CommandQueue(cl.Context(devices[:1]))


class Program:
    """A kernel's TIR, built for OpenCL."""

    def __init__(self, function):
        self.queue = queue()
        import pyopencl as cl

        from kernels_tvm.gpu import build

        self.main = build.split(function, OPENCL)["main"]
        program = cl.Program(self.queue.context, build.source(function, OPENCL)).build()
        self.kernels = {kernel.function_name: kernel for kernel in program.all_kernels()}

    def __call__(self, arrays, *outputs):
        """The outputs, each given as a shape and a dtype, of the kernel on ``arrays``.

        What a kernel does not write stays 77 in every byte.
        """
        results = [
            np.full(np.prod(shape) * np.dtype(dtype).itemsize, 77, np.uint8) for shape, dtype in outputs
        ]
        results = [
            result.view(dtype).reshape(shape) for result, (shape, dtype) in zip(results, outputs, strict=True)
        ]
        values, memory = {}, []
        for buffer, array in zip(self.main.params, [*arrays, *results], strict=True):
            array = np.ascontiguousarray(array)
            assert str(buffer.dtype) == array.dtype.name, f"{buffer.dtype} expected, {array.dtype} given"
            for size, have in zip(buffer.shape, array.shape, strict=True):
                expected = values.setdefault(hash(size), have) if _kind(size) == "Var" else size.value
                assert expected == have, f"{buffer.shape} expected, {array.shape} given"
            memory.append(self._upload(array))
            values[hash(buffer)] = memory[-1]
        self._run(self.main.body, values)
        for buffer, result in zip(memory[len(arrays) :], results, strict=True):
            self._download(buffer, result)
        return results if len(results) > 1 else results[0]

    def _upload(self, array):
        import pyopencl as cl

        # OpenCL has no empty buffers.
        data = array if array.size else np.zeros(1, array.dtype)
        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
        return cl.Buffer(self.queue.context, flags, hostbuf=data)

    def _download(self, buffer, result):
        import pyopencl as cl

        if result.size:
            cl.enqueue_copy(self.queue, result, buffer)

    def _run(self, statement, values):
        kind = _kind(statement)
        if kind == "SeqStmt":
            for part in statement.seq:
                self._run(part, values)
        elif kind == "DeclBuffer":
            values[hash(statement.buffer)] = _evaluate(statement.data, values)
        elif kind == "Bind":
            values[hash(statement.var)] = _evaluate(statement.value, values)
        elif kind == "IfThenElse" and statement.else_case is None:
            if _evaluate(statement.condition, values):
                self._run(statement.then_case, values)
        elif kind == "Evaluate" and statement.value.op.name == "tirx.call_ffi_kernel":
            self._launch(statement.value, values)
        else:
            raise NotImplementedError(statement.script())

    def _launch(self, call, values):
        name, *arguments = call.args
        arguments = [_evaluate(argument, values) for argument in arguments]
        tags = call.attrs.launch_params
        extents = dict(zip(tags, arguments[-len(tags) :], strict=True))
        threads = [extents.get(f"threadIdx.{axis}", 1) for axis in "xyz"]
        blocks = [extents.get(f"blockIdx.{axis}", 1) for axis in "xyz"]
        assert min(blocks) > 0, "a GPU launches no empty grid"
        arguments = [np.int32(a) if isinstance(a, int) else a for a in arguments[: -len(tags)]]
        size = [b * t for b, t in zip(blocks, threads, strict=True)]
        self.kernels[name.value](self.queue, size, threads, *arguments)


def _kind(node):
    return type(node).__name__


def _evaluate(expression, values):
    kind = _kind(expression)
    if kind == "IntImm":
        return int(expression.value)
    if kind == "Var":
        return values[hash(expression)]
    if kind == "Call" and expression.op.name == "tirx.buffer_data":
        return values[hash(expression.args[0])]
    return OPERATORS[kind](_evaluate(expression.a, values), _evaluate(expression.b, values))
