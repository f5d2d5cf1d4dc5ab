"""From the expressions of a trace to the nodes of an ONNX graph.

LayerNorm, softmax and GELU are many small operations in a trace and one in ONNX: each function is traced
alone, and its graph is looked for in the model's. Depthwise convolutions and products with power-of-two
weights or Hadamard matrices are found by the names of their jits. All else is translated primitive by
primitive.
"""

import functools
import math
from collections.abc import Callable, Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from shiftaddvit_jax.checkpoints.to_onnx.nodes import (
    ANY_BATCH,
    Node,
    constant,
    convolve,
    cut,
    elementwise,
    expand,
    integers,
    reshape,
    squeeze,
    transpose,
)
from shiftaddvit_jax.checkpoints.to_onnx.trace import DEPTHWISE, HADAMARD, MATSHIFT, Expression, find, trace
from shiftaddvit_jax.ops import hadamard


def translate(graph: list[Expression], inputs: Sequence[Node]) -> Node:
    """The node that computes the last expression of ``graph`` from its inputs."""
    plan, needed = {}, {graph[-1]}
    for expression in reversed(graph):
        if expression in needed:
            plan[expression] = _lift(expression)
            needed |= set(plan[expression][0])
    nodes = dict(zip(graph, inputs, strict=False))
    for expression in graph[len(inputs) :]:
        if expression in plan:
            needs, build = plan[expression]
            nodes[expression] = build(*(nodes[other] for other in needs))
    return nodes[graph[-1]]


def _lift(expression: Expression) -> tuple[tuple[Expression, ...], Callable[..., Node]]:
    """The inputs of a node for ``expression``, as expressions, and the function that builds the node."""
    for root, pattern_of, build in _PATTERNS:
        if root == expression.primitive and expression.shape:
            pattern = pattern_of(expression.shape)
            found, captured = {}, {}
            if find(pattern[-1], expression, found, captured):
                inputs = tuple(found[e] for e in pattern if e.primitive == "input")
                return inputs, functools.partial(build, expression.shape, captured)
    return expression.inputs, functools.partial(_node, expression)


@functools.cache
def _trace_layer_norm(shape):
    channels = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)

    def layer_norm(x, scale, bias):
        return nn.LayerNorm(math.nan).apply({"params": {"scale": scale, "bias": bias}}, x)

    return trace(layer_norm, jax.ShapeDtypeStruct(shape, jnp.float32), channels, channels)


@functools.cache
def _trace_softmax(axis, shape):
    softmax = functools.partial(jax.nn.softmax, axis=max(axis, -len(shape)))
    return trace(softmax, jax.ShapeDtypeStruct(shape, jnp.float32))


@functools.cache
def _trace_gelu(shape):
    gelu = functools.partial(jax.nn.gelu, approximate=False)
    return trace(gelu, jax.ShapeDtypeStruct(shape, jnp.float32))


# The primitive that comes last, the trace to look for, and the node that takes its place.
_PATTERNS = (
    (
        "add",
        _trace_layer_norm,
        lambda shape, captured, *inputs: Node(
            "LayerNormalization", inputs, shape, {"axis": -1, "epsilon": captured["number"]}
        ),
    ),
    *(
        (
            "div",
            functools.partial(_trace_softmax, axis),
            lambda shape, captured, x, axis=axis: Node("Softmax", (x,), shape, {"axis": axis}),
        )
        for axis in (-1, -2)  # over keys or classes; over the views of a point
    ),
    ("mul", _trace_gelu, lambda shape, captured, x: Node("Gelu", (x,), shape)),
)


def _node(expression: Expression, *inputs: Node) -> Node:
    """The node of one primitive."""
    name, params, shape = expression.primitive, expression.params, expression.shape
    if name == "constant":
        return constant(expression.value)
    if name == "reshape":
        return reshape(expand(inputs[0], expression.inputs[0].shape), shape)
    if name == "broadcast_in_dim":
        ones = np.ones(len(shape), int)
        axes = params["broadcast_dimensions"]
        ones[list(axes)[len(axes) - len(inputs[0].shape) :]] = inputs[0].shape
        return reshape(inputs[0], tuple(int(side) for side in ones))
    constants = all(node.value is not None for node in inputs) and ANY_BATCH not in shape
    if constants and not expression.value.multiple_results:
        arrays = (
            np.broadcast_to(np.asarray(node.value), other.shape)
            for node, other in zip(inputs, expression.inputs, strict=True)
        )
        return constant(np.asarray(expression.value.bind(*arrays, **params)))
    if name in _ELEMENTWISE:
        return elementwise(_ELEMENTWISE[name], *inputs)
    if name in _BUILT_ELEMENTWISE:
        return _BUILT_ELEMENTWISE[name](expression, *inputs)
    inputs = tuple(expand(node, other.shape) for node, other in zip(inputs, expression.inputs, strict=True))
    if name not in _TRANSLATIONS:
        raise _refusal(expression, name)
    return _TRANSLATIONS[name](expression, *inputs)


def _refusal(expression: Expression, what: str) -> ValueError:
    return ValueError(
        f"{expression.where} needs {what}, which is not translated to ONNX; export a model of `create_model` "
        "or add a translation to shiftaddvit_jax/checkpoints/to_onnx/translations.py"
    )


def _power(expression, x):
    exponent = expression.params["y"]
    return elementwise("Mul", x, x) if exponent == 2 else elementwise("Pow", x, _float(exponent))


def _round(expression, x):
    if expression.params["rounding_method"] != jax.lax.RoundingMethod.TO_NEAREST_EVEN:
        raise _refusal(expression, "rounding away from zero")
    return elementwise("Round", x)


def _convert(expression, x):
    if expression.inputs[0].dtype == expression.dtype:
        return x
    if x.operator == "Where":
        which, *cases = x.inputs
        if all(case.value is not None for case in cases):  # binarization: the codes are constants
            cases = (constant(case.value.astype(expression.dtype)) for case in cases)
            return elementwise("Where", which, *cases)
    return Node("Cast", (x,), x.shape, {"to": np.dtype(expression.dtype)})


def _select(expression, which, *cases):
    if expression.inputs[0].dtype != bool:
        raise _refusal(expression, "a choice among more than two")
    return elementwise("Where", which, *reversed(cases))


def _float(number: float) -> Node:
    return constant(np.asarray(number, np.float32))


_ELEMENTWISE = {
    "abs": "Abs",
    "add": "Add",
    "and": "And",
    "div": "Div",
    "eq": "Equal",
    "exp": "Exp",
    "floor": "Floor",
    "ge": "GreaterOrEqual",
    "gt": "Greater",
    "max": "Max",
    "min": "Min",
    "mul": "Mul",
    "neg": "Neg",
    "sqrt": "Sqrt",
    "sub": "Sub",
}
# Those that one name does not say; inputs are broadcast as in `_ELEMENTWISE`.
_BUILT_ELEMENTWISE = {
    "clamp": lambda expression, low, x, high: elementwise("Min", elementwise("Max", x, low), high),
    "convert_element_type": _convert,
    "integer_pow": _power,
    "ne": lambda expression, *numbers: elementwise("Not", elementwise("Equal", *numbers)),
    "round": _round,
    "rsqrt": lambda expression, x: elementwise("Reciprocal", elementwise("Sqrt", x)),
    "select_n": _select,
    "square": lambda expression, x: elementwise("Mul", x, x),
}


def _translate_slice(expression, x):
    params = expression.params
    if params["strides"] and set(params["strides"]) != {1}:
        raise _refusal(expression, f"a slice with strides {params['strides']}")
    for axis, (start, stop) in enumerate(zip(params["start_indices"], params["limit_indices"], strict=True)):
        x = cut(x, axis, start, stop)
    return x


def _translate_squeeze(expression, x):
    for axis in sorted(expression.params["dimensions"], reverse=True):
        x = squeeze(x, axis)
    return x


def _translate_reduction(operator, expression, x):
    axes = integers(expression.params["axes"])
    return Node(operator, (x, axes), expression.shape, {"keepdims": 0})


def _translate_top_k(expression, x):
    if expression.params["k"] != 1 or expression.output != 1:
        raise _refusal(expression, "more than the place of the largest number")
    largest = Node("ArgMax", (x,), expression.shape, {"axis": len(x.shape) - 1, "keepdims": 1})
    return Node("Cast", (largest,), expression.shape, {"to": np.dtype(expression.dtype)})


def _translate_dot(expression, left, right):
    contracted, batch = expression.params["dimension_numbers"]
    batch = tuple(map(tuple, batch))
    free = [
        tuple(axis for axis in range(len(node.shape)) if axis not in (*contracted[side], *batch[side]))
        for side, node in enumerate((left, right))
    ]
    left = transpose(left, (*batch[0], *free[0], *contracted[0]))
    right = transpose(right, (*batch[1], *contracted[1], *free[1]))
    leading, inner = len(batch[0]), len(contracted[0])
    sides = tuple(left.shape[:leading]), math.prod(left.shape[len(left.shape) - inner :])
    if not (leading == 0 and inner == 1 and len(right.shape) == 2):  # unlike a linear layer
        left = reshape(left, (*sides[0], math.prod(left.shape[leading:-inner]), sides[1]))
        right = reshape(right, (*sides[0], sides[1], math.prod(right.shape[leading + inner :])))
    return reshape(_product(left, right), expression.shape)


def _translate_matshift(expression, x, weight):
    if weight.value is not None:
        weight = Node("Codes", (), weight.shape, value=weight.value)
    return _product(x, weight)


def _translate_hadamard(expression, x):
    matrix = np.sign(hadamard(jnp.eye(expression.shape[-1]), "xla"))
    return _product(x, constant(matrix))


def _product(left: Node, right: Node) -> Node:
    return Node("MatMul", (left, right), (*left.shape[:-1], right.shape[-1]))


def _translate_convolution(expression, x, kernel):
    params = expression.params
    layout = params["dimension_numbers"]
    if tuple(layout) != ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)) or {
        *params["lhs_dilation"],
        *params["rhs_dilation"],
        params["batch_group_count"],
    } != {1}:
        raise _refusal(expression, f"a convolution with {layout} and these dilations")
    groups = params["feature_group_count"]
    return convolve(x, kernel, params["window_strides"], params["padding"], expression.shape, groups)


def _translate_depthwise(expression, x, kernel):
    *sides, channels = kernel.shape
    padding = [(side // 2, side // 2) for side in sides]
    return convolve(x, reshape(kernel, (*sides, 1, channels)), (1, 1), padding, expression.shape, channels)


def _translate_concatenation(expression, *parts):
    return Node("Concat", parts, expression.shape, {"axis": expression.params["dimension"]})


_TRANSLATIONS = {
    "transpose": lambda expression, x: transpose(x, tuple(expression.params["permutation"])),
    "slice": _translate_slice,
    "squeeze": _translate_squeeze,
    "concatenate": _translate_concatenation,
    "reduce_max": functools.partial(_translate_reduction, "ReduceMax"),
    "reduce_sum": functools.partial(_translate_reduction, "ReduceSum"),
    "top_k": _translate_top_k,
    "dot_general": _translate_dot,
    "conv_general_dilated": _translate_convolution,
    DEPTHWISE: _translate_depthwise,
    HADAMARD: _translate_hadamard,
    MATSHIFT: _translate_matshift,
}
