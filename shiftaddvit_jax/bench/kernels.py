"""The kernels that `shiftaddvit bench --kernels` times, and what it times them against.

To add a contestant, add a line to its kernel's ``contestants`` in `KERNELS`. `shiftaddvit_jax.costs.shapes`
says where the shapes come from.
"""

import math
import os
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from shiftaddvit_jax.bench.rounds import Contestant, Run
from shiftaddvit_jax.costs.shapes import ATTENTIONS, DEPTHWISE, LAYERS, PAPER_LAYERS
from shiftaddvit_jax.ops import (
    binarize,
    depthwise_conv_2d,
    hadamard,
    matadd,
    pack_weight,
    packed_product,
    power_of_two,
    shift_product,
)
from shiftaddvit_jax.ops.activations import Activations
from shiftaddvit_jax.ops.implementation import Implementation
from shiftaddvit_jax.ops.packing import packed_bits
from shiftaddvit_jax.optional import require

DENSE = "dense float32"  # what the others' times are compared with: XLA on ordinary numbers


class KernelBenchmark(NamedTuple):
    """A kernel to time.

    Attributes:
      shapes: the shapes to time it at.
      operations: from a shape to its multiply-accumulates, or to the operations that take their place.
      contestants: functions by name, from a shape to a run, which waits for its result. If the function
        raises a ``ValueError``, the table holds the message.
    """

    shapes: tuple[tuple[int, ...], ...]
    operations: Callable[[tuple[int, ...]], int]
    contestants: dict[str, Callable[..., Run]]


def compiled(function: Callable, *arguments: np.ndarray) -> Run:
    """A run of ``function`` under jit; its arguments are already on the device."""
    on_device = [jnp.asarray(argument) for argument in arguments]
    program = jax.jit(function).lower(*on_device).compile()
    return lambda: program(*on_device).block_until_ready()


def normal(*shape: int) -> np.ndarray:
    """Normally distributed float32, always the same."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def dense(tokens: int, inputs: int, outputs: int) -> Run:
    """A linear layer in float32; its weight is a constant, as in inference."""
    weight = normal(inputs, outputs)
    return compiled(lambda x: x @ weight, normal(tokens, inputs))


def shift_xla(tokens: int, inputs: int, outputs: int) -> Run:
    """A linear layer with power-of-two weights, by XLA."""
    weight = np.asarray(power_of_two(jnp.asarray(normal(inputs, outputs) / 16)))
    return compiled(lambda x: shift_product(x, jnp.asarray(weight), "float", "xla"), normal(tokens, inputs))


def packed_shift(implementation: Implementation, activations: Activations = "float") -> Callable[..., Run]:
    """A linear layer with power-of-two weights, packed as the kernels take them."""

    def make(tokens, inputs, outputs):
        weight = power_of_two(jnp.asarray(normal(inputs, outputs) / 16))
        packed = pack_weight(weight, packed_bits(activations))
        return compiled(
            lambda x: packed_product(x, packed, outputs, activations, implementation), normal(tokens, inputs)
        )

    return make


def dense_products(tokens: int, heads: int, head_dim: int) -> Run:
    """The products q (k^T v), in float32."""
    q, k, v = (normal(1, heads, tokens, head_dim) for _ in range(3))
    return compiled(lambda q, k, v: q @ (k.swapaxes(-1, -2) @ v), q, k, v)


def additive_products(implementation: Implementation) -> Callable[..., Run]:
    """The products q (k^T v), where queries and keys become codes {0, 1} first."""

    def products(q, k, v):
        q, k = (binarize(part, implementation=implementation) for part in (q, k))
        return matadd(q, matadd(k.swapaxes(-1, -2), v, implementation), implementation)

    def make(tokens, heads, head_dim):
        return compiled(products, *(normal(1, heads, tokens, head_dim) for _ in range(3)))

    return make


def hadamard_product(rows: int, size: int) -> Run:
    """A product with a Hadamard matrix."""
    matrix = hadamard(jnp.eye(size), "xla")
    return compiled(lambda x: x @ matrix, normal(rows, size))


def fast_hadamard(implementation: Implementation) -> Callable[..., Run]:
    """The fast Walsh-Hadamard transform."""

    def make(rows, size):
        return compiled(lambda x: hadamard(x, implementation), normal(rows, size))

    return make


def depthwise(implementation: Implementation) -> Callable[..., Run]:
    """A 3 x 3 depthwise convolution."""

    def make(side, channels):
        kernel = normal(3, 3, channels)
        return compiled(
            lambda x: depthwise_conv_2d(x, jnp.asarray(kernel), implementation),
            normal(1, side, side, channels),
        )

    return make


def grouped(side: int, channels: int) -> Run:
    """A 3 x 3 depthwise convolution, as a grouped convolution of XLA."""
    kernel = normal(3, 3, 1, channels)

    def convolve(x):
        layout = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, jnp.asarray(kernel), (1, 1), "SAME", dimension_numbers=layout, feature_group_count=channels
        )

    return compiled(convolve, normal(1, side, side, channels))


def int8_xla(tokens: int, inputs: int, outputs: int) -> Run:
    """A product of int8 by int8 to int32, by XLA."""
    x, weight = _integers(tokens, inputs, np.int8), _integers(inputs, outputs, np.int8)
    return compiled(lambda x: jax.lax.dot(x, weight, preferred_element_type=jnp.int32), x)


def int8_onnxruntime(tokens: int, inputs: int, outputs: int) -> Run:
    """A product of uint8 by int8 to int32, for which ONNX Runtime has its fastest kernels."""
    require("peers", "the peer onnxruntime", "onnxruntime", "onnx")
    import onnx
    import onnxruntime

    helper, types = onnx.helper, onnx.TensorProto
    weight = onnx.numpy_helper.from_array(_integers(inputs, outputs, np.int8), "weight")
    x = helper.make_tensor_value_info("x", types.UINT8, (tokens, inputs))
    y = helper.make_tensor_value_info("y", types.INT32, (tokens, outputs))
    product = helper.make_node("MatMulInteger", ["x", "weight"], ["y"])
    graph = helper.make_graph([product], "product", [x], [y], [weight])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = int(os.environ["OMP_NUM_THREADS"])
    session = onnxruntime.InferenceSession(model.SerializeToString(), options)
    arguments = {"x": _integers(tokens, inputs, np.uint8)}
    return lambda: session.run(None, arguments)


def _integers(rows, columns, dtype):
    limits = np.iinfo(dtype)
    return np.random.default_rng(0).integers(limits.min, limits.max, (rows, columns), dtype, endpoint=True)


KERNELS = {
    # A large product shows the machine's peak. Shapes here and in matshift: tokens, inputs, outputs.
    "peak": KernelBenchmark(
        ((2048, 2048, 2048),),
        math.prod,
        {DENSE: dense, "int8 xla": int8_xla, "int8 onnxruntime": int8_onnxruntime},
    ),
    "matshift": KernelBenchmark(
        (PAPER_LAYERS[0], *LAYERS),
        math.prod,
        {
            DENSE: dense,
            "xla": shift_xla,
            "tvm": packed_shift("tvm"),
            "tvm int8": packed_shift("tvm", "int8"),
            "tvm_shift int8": packed_shift("tvm_shift", "int8"),
        },
    ),
    # Tokens, heads, head_dim.
    "matadd": KernelBenchmark(
        ATTENTIONS,
        lambda shape: 2 * math.prod(shape) * shape[-1],
        {DENSE: dense_products, "xla": additive_products("xla"), "tvm": additive_products("tvm")},
    ),
    # Rows, as many as there are tokens and heads, and the size of the transform.
    "hadamard": KernelBenchmark(
        ((3136, 64), (6272, 32), (784, 320), (196, 1024)),
        lambda shape: math.prod(shape) * round(math.log2(shape[-1])),
        {DENSE: hadamard_product, "xla": fast_hadamard("xla"), "tvm": fast_hadamard("tvm")},
    ),
    # Side of the grid, channels.
    "depthwise_conv_2d": KernelBenchmark(
        DEPTHWISE,
        lambda shape: 9 * shape[0] * math.prod(shape),
        {DENSE: grouped, "xla": depthwise("xla"), "tvm": depthwise("tvm")},
    ),
}


def kernel_contestants() -> list[Contestant]:
    """The contestants of all `KERNELS`; those of one name share a process, so that no two runtimes do."""
    return [
        Contestant(
            name=_name(kernel, shape, contestant),
            task={"runtime": "kernel", "kernel": kernel, "shape": shape, "contestant": contestant},
            process=contestant,
            references=(_name(kernel, shape, DENSE),),
        )
        for kernel, case in KERNELS.items()
        for shape in case.shapes
        for contestant in case.contestants
    ]


def _name(kernel, shape, contestant):
    return f"{kernel} {' x '.join(map(str, shape))} {contestant}"
