"""Runs GPU kernels on the CPU: their OpenCL source through PoCL, launched as the TIR's ``main`` says.

Thread blocks, shared memory and barriers are real. Launches run in order, as on one stream.
"""

import functools
import math
import operator

import numpy as np
import pytest

FENCE = 4096  # bytes after each array

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

    def __init__(self, function, target):
        self.queue = queue()
        import pyopencl as cl

        from kernels_tvm.gpu import build

        self.main = build.split(function, target)["main"]
        # With its optimizations, PoCL 3.0 stores where a condition says not to.
        source = build.source(function, target)
        program = cl.Program(self.queue.context, source).build(["-cl-opt-disable"])
        self.kernels = {kernel.function_name: kernel for kernel in program.all_kernels()}

    def __call__(self, arrays, *outputs):
        """The outputs, each given as a shape and a dtype, of the kernel on ``arrays``.

        Fails where a kernel writes beyond an array's end. What it does not write stays 77 in every byte.
        """
        sizes = [math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in outputs]
        results = [
            _untouched(size).view(dtype).reshape(shape)
            for size, (shape, dtype) in zip(sizes, outputs, strict=True)
        ]
        arrays, values = [np.ascontiguousarray(array) for array in arrays] + results, {}
        for buffer, array in zip(self.main.params, arrays, strict=True):
            assert str(buffer.dtype) == array.dtype.name, f"{buffer.dtype} expected, {array.dtype} given"
            for size, have in zip(buffer.shape, array.shape, strict=True):
                expected = values.setdefault(hash(size), have) if _kind(size) == "Var" else size.value
                assert expected == have, f"{buffer.shape} expected, {array.shape} given"
            values[hash(buffer)] = self._upload(array)
        self._run(self.main.body, values)
        after = [self._download(values[hash(b)], a) for b, a in zip(self.main.params, arrays, strict=True)]
        return after[-len(results) :]

    def _upload(self, array):
        import pyopencl as cl

        data = np.concatenate([array.reshape(-1).view(np.uint8), _untouched(FENCE)])
        flags = cl.mem_flags.READ_WRITE | cl.mem_flags.COPY_HOST_PTR
        return cl.Buffer(self.queue.context, flags, hostbuf=data)

    def _download(self, buffer, like):
        import pyopencl as cl

        content = _untouched(like.nbytes + FENCE)
        cl.enqueue_copy(self.queue, content, buffer)
        np.testing.assert_array_equal(content[like.nbytes :], 77, err_msg="written beyond an array's end")
        return content[: like.nbytes].view(like.dtype).reshape(like.shape)

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


def _untouched(size):
    return np.full(size, 77, np.uint8)


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
