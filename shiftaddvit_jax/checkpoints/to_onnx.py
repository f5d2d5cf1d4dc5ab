"""Dense models as ONNX files, for other runtimes.

The ONNX graph comes from a trace of the model, so the model is defined once. LayerNorm, softmax and GELU are
many small operations in a trace and one in ONNX: each function is traced alone, and its graph is looked for
in the model's. Depthwise convolutions are found by the name of their jit. Constants are folded, shapes are
static, and transpositions, slices and biases move to where runtimes fuse them.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Literal
from jaxtyping import PyTree

from shiftaddvit_jax.files import whole_file
from shiftaddvit_jax.optional import require

OPSET, IR_VERSION = 20, 9  # the first with Gelu, and the format that came with it


def save_onnx(model: nn.Module, variables: PyTree, path: str | Path, *, batch: int = 1) -> None:
    """Write a dense model with its variables as an ONNX file, whole or not at all.

    The file's input is ``images``, float32 [batch, 3, image_size, image_size], channels first as in other
    runtimes; its output is ``logits``, float32 [batch, num_classes].

    Args:
      model: the original, dense one with softmax attention, in float32.
      variables: its variables.
      path: where the file goes.
      batch: number of images in the input.

    Raises:
      ValueError: an operation that is not translated, onnx not installed, or a path that cannot be written.
    """
    require("peers", "writing ONNX", "onnx")
    import onnx

    size = model.image_size
    shape = jax.ShapeDtypeStruct((batch, size, size, 3), jnp.float32)
    # With JAX arrays, the trace has the same equations as the traces to look for.
    variables = jax.tree.map(jnp.asarray, variables)
    graph = _trace(functools.partial(model.apply, variables), shape)
    images = _Node("Input", (), (batch, 3, size, size))
    logits = _translate(graph, _transpose(images, (0, 2, 3, 1)))
    try:
        with whole_file(path) as temporary:
            onnx.save_model(_serialize(onnx, images, logits, model.variant), str(temporary))
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None


@dataclass(eq=False)
class _Expression:
    """One equation of a trace, or one of its inputs (``"input"``) or constants (``"constant"``)."""

    primitive: str
    inputs: tuple["_Expression", ...] = ()
    shape: tuple[int, ...] = ()
    params: dict[str, Any] = field(default_factory=dict)
    value: Any = None  # a constant's array, or an equation's JAX primitive
    where: str = ""


_SAME = {"copy", "stop_gradient"}
_CALLS = {"jit": "jaxpr", "custom_vjp_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr"}
_KEPT_WHOLE = "_depthwise_conv"


def _trace(function: Callable, *shapes: jax.ShapeDtypeStruct) -> list[_Expression]:
    """The function's equations in order, calls inlined: the inputs come first, the one output last."""
    closed = jax.make_jaxpr(function)(*shapes)
    order = []

    def add(*arguments, **keywords):
        order.append(_Expression(*arguments, **keywords))
        return order[-1]

    def constant(value):
        return add("constant", shape=np.shape(value), value=np.asarray(value))

    def walk(jaxpr, consts, arguments):
        known = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*consts, *arguments), strict=True))

        def read(variable):
            if isinstance(variable, Literal):
                aval: Any = variable.aval
                return constant(np.asarray(variable.val, aval.dtype))
            return known[variable]

        for equation in jaxpr.eqns:
            inputs = [read(variable) for variable in equation.invars]
            name, params = equation.primitive.name, equation.params
            if name in _CALLS and params.get("name") != _KEPT_WHOLE:
                inner = params[_CALLS[name]]
                outputs = walk(inner.jaxpr, map(constant, inner.consts), inputs)
            elif name in _SAME:
                outputs = inputs
            else:
                outputs = [
                    add(
                        params["name"] if name in _CALLS else name,
                        tuple(inputs),
                        variable.aval.shape,
                        params,
                        equation.primitive,
                        str(equation.source_info.name_stack),
                    )
                    for variable in equation.outvars
                ]
            known |= dict(zip(equation.outvars, outputs, strict=True))
        return [read(variable) for variable in jaxpr.outvars]

    inputs = [add("input", shape=variable.aval.shape) for variable in closed.jaxpr.invars]
    (output,) = walk(closed.jaxpr, [constant(value) for value in closed.consts], inputs)
    return order[: order.index(output) + 1]


def _find(
    pattern: _Expression, expression: _Expression, found: dict[_Expression, _Expression], captured: dict
) -> bool:
    """Whether ``expression`` computes ``pattern``; ``found`` receives an expression for each input.

    A NaN in the pattern stands for any number, which ``captured`` receives.
    """
    if pattern.primitive == "input":
        return found.setdefault(pattern, expression) is expression
    if pattern.primitive != expression.primitive or pattern.shape != expression.shape:
        return False
    if pattern.primitive == "constant":
        if np.isnan(pattern.value).all():
            captured["number"] = float(expression.value)
            return True
        return np.array_equal(pattern.value, expression.value)
    return pattern.params == expression.params and all(
        _find(*pair, found, captured) for pair in zip(pattern.inputs, expression.inputs, strict=True)
    )


_CHANNELS_FIRST, _CHANNELS_LAST = (0, 3, 1, 2), (0, 2, 3, 1)


@dataclass(eq=False)
class _Node:
    """A node of the ONNX graph, or its ``"Input"``, or a ``"Constant"``.

    The node's shape may have ones, or lack leading axes, where the traced shape is broadcast.
    """

    operator: str
    inputs: tuple["_Node", ...]
    shape: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    value: np.ndarray | None = None


def _constant(value: np.ndarray) -> _Node:
    value = np.asarray(value)
    return _Node("Constant", (), value.shape, value=value)


def _integers(values) -> _Node:
    return _constant(np.asarray(values, np.int64))


def _reshape(node: _Node, shape: tuple[int, ...]) -> _Node:
    if node.shape == shape:
        return node
    if node.value is not None:
        return _constant(node.value.reshape(shape))
    if node.operator == "Reshape":
        return _reshape(node.inputs[0], shape)
    if node.operator == "LayerNormalization" and shape == _tokens(node.shape):
        x, *rest = node.inputs
        return _Node(node.operator, (_reshape(x, shape), *rest), shape, node.attributes)
    if node.attributes.get("perm") == _CHANNELS_LAST and shape == _tokens(node.shape):
        batch, tokens, channels = shape
        return _transpose(_reshape(node.inputs[0], (batch, channels, tokens)), (0, 2, 1))
    return _Node("Reshape", (node, _integers(shape)), shape)


def _tokens(grid: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a grid's tokens, row after row."""
    return grid[0], math.prod(grid[1:-1]), grid[-1]


def _transpose(node: _Node, permutation: tuple[int, ...]) -> _Node:
    if permutation == tuple(range(len(permutation))):
        return node
    if node.value is not None:
        return _constant(node.value.transpose(permutation))
    if node.operator == "Transpose":
        inner = node.attributes["perm"]
        return _transpose(node.inputs[0], tuple(inner[axis] for axis in permutation))
    shape = tuple(node.shape[axis] for axis in permutation)
    if (
        permutation == _CHANNELS_FIRST
        and node.operator == "Reshape"
        and node.inputs[0].shape == _tokens(node.shape)
    ):
        return _reshape(_transpose(node.inputs[0], (0, 2, 1)), shape)
    return _Node("Transpose", (node,), shape, {"perm": permutation})


def _slice(node: _Node, axis: int, start: int, stop: int) -> _Node:
    """Part of one axis, sliced as early as possible: in the weights, if these make the axis."""
    if (start, stop) == (0, node.shape[axis]):
        return node
    if node.value is not None:
        return _constant(node.value[(slice(None),) * axis + (slice(start, stop),)])
    shape = (*node.shape[:axis], stop - start, *node.shape[axis + 1 :])
    if node.operator == "Transpose":
        permutation = node.attributes["perm"]
        return _transpose(_slice(node.inputs[0], permutation[axis], start, stop), permutation)
    if node.operator == "Reshape" and node.inputs[0].shape == (
        *node.shape[:axis],
        math.prod(node.shape[axis:]),
    ):
        inside = math.prod(node.shape[axis + 1 :])
        return _reshape(_slice(node.inputs[0], axis, start * inside, stop * inside), shape)
    if node.operator in ("Add", "MatMul") and axis == len(node.shape) - 1:
        first, second = node.inputs
        whole = second.shape[-1:] == node.shape[-1:] and first.shape[:-1] == node.shape[:-1]
        if second.value is not None and whole:
            if node.operator == "Add":
                first = _slice(_expand(first, node.shape), axis, start, stop)
            second = _slice(second, len(second.shape) - 1, start, stop)
            return _Node(node.operator, (first, second), shape)
    inputs = (node, _integers([start]), _integers([stop]), _integers([axis]))
    return _Node("Slice", inputs, shape)


def _squeeze(node: _Node, axis: int) -> _Node:
    if node.operator == "Transpose":
        permutation = node.attributes["perm"]
        gone = permutation[axis]
        rest = tuple(p - (p > gone) for p in permutation if p != gone)
        return _transpose(_squeeze(node.inputs[0], gone), rest)
    return _reshape(node, (*node.shape[:axis], *node.shape[axis + 1 :]))


def _expand(node: _Node, shape: tuple[int, ...]) -> _Node:
    """The node broadcast to ``shape``."""
    if node.shape == shape:
        return node
    if node.value is not None:
        return _constant(np.broadcast_to(node.value, shape))
    return _Node("Expand", (node, _integers(shape)), shape)


def _elementwise(operator: str, *inputs: _Node) -> _Node:
    shape = np.broadcast_shapes(*(node.shape for node in inputs))
    if operator == "Add":
        node, other = inputs
        for x, bias in ((node, other), (other, node)):
            if bias.value is not None and bias.value.size == x.shape[-1]:
                return _add_bias(x, _constant(bias.value.reshape(-1)), shape)
    return _Node(operator, inputs, shape)


def _add_bias(x: _Node, bias: _Node, shape: tuple[int, ...]) -> _Node:
    """``x`` plus one number a channel; if ``x`` is a convolution, the convolution adds them."""
    if x.attributes.get("perm") == _CHANNELS_LAST and x.inputs[0].operator == "Conv":
        convolution = x.inputs[0]
        if len(convolution.inputs) == 2:
            inputs = (*convolution.inputs, bias)
            biased = _Node("Conv", inputs, convolution.shape, convolution.attributes)
            return _transpose(biased, _CHANNELS_LAST)
    return _Node("Add", (x, bias), shape)


def _convolve(x: _Node, kernel: _Node, strides, padding, shape, groups=1) -> _Node:
    """A convolution of [batch, height, width, channels] with a kernel [height, width, in / groups, out]."""
    weight = _transpose(kernel, (3, 2, 0, 1))
    (top, bottom), (left, right) = padding
    attributes = {
        "kernel_shape": weight.shape[2:],
        "strides": tuple(strides),
        "pads": (top, left, bottom, right),
        "group": groups,
    }
    first = tuple(shape[axis] for axis in _CHANNELS_FIRST)
    y = _Node("Conv", (_transpose(x, _CHANNELS_FIRST), weight), first, attributes)
    return _transpose(y, _CHANNELS_LAST)


def _translate(graph: list[_Expression], images: _Node) -> _Node:
    """The node that computes the last expression of ``graph`` from its input."""
    plan, needed = {}, {graph[-1]}
    for expression in reversed(graph):
        if expression in needed:
            plan[expression] = _lift(expression)
            needed |= set(plan[expression][0])
    nodes = {graph[0]: images}
    for expression in graph[1:]:
        if expression in plan:
            inputs, build = plan[expression]
            nodes[expression] = build(*(nodes[other] for other in inputs))
    return nodes[graph[-1]]


def _lift(expression: _Expression) -> tuple[tuple[_Expression, ...], Callable[..., _Node]]:
    """The inputs of a node for ``expression``, as expressions, and the function that builds the node."""
    for root, trace, build in _PATTERNS:
        if root == expression.primitive and expression.shape:
            pattern = trace(expression.shape)
            found, captured = {}, {}
            if _find(pattern[-1], expression, found, captured):
                inputs = tuple(found[e] for e in pattern if e.primitive == "input")
                return inputs, functools.partial(build, expression.shape, captured)
    return expression.inputs, functools.partial(_node, expression)


@functools.cache
def _trace_layer_norm(shape):
    channels = jax.ShapeDtypeStruct(shape[-1:], jnp.float32)

    def layer_norm(x, scale, bias):
        return nn.LayerNorm(math.nan).apply({"params": {"scale": scale, "bias": bias}}, x)

    return _trace(layer_norm, jax.ShapeDtypeStruct(shape, jnp.float32), channels, channels)


@functools.cache
def _trace_softmax(shape):
    return _trace(jax.nn.softmax, jax.ShapeDtypeStruct(shape, jnp.float32))


@functools.cache
def _trace_gelu(shape):
    gelu = functools.partial(jax.nn.gelu, approximate=False)
    return _trace(gelu, jax.ShapeDtypeStruct(shape, jnp.float32))


# The primitive that comes last, the trace to look for, and the node that takes its place.
_PATTERNS = (
    (
        "add",
        _trace_layer_norm,
        lambda shape, captured, *inputs: _Node(
            "LayerNormalization", inputs, shape, {"axis": -1, "epsilon": captured["number"]}
        ),
    ),
    ("div", _trace_softmax, lambda shape, captured, x: _Node("Softmax", (x,), shape, {"axis": -1})),
    ("mul", _trace_gelu, lambda shape, captured, x: _Node("Gelu", (x,), shape)),
)


def _node(expression: _Expression, *inputs: _Node) -> _Node:
    """The node of one primitive."""
    name, params, shape = expression.primitive, expression.params, expression.shape
    if name == "constant":
        return _constant(expression.value)
    if name == "reshape":
        return _reshape(_expand(inputs[0], expression.inputs[0].shape), shape)
    if name == "broadcast_in_dim":
        ones = np.ones(len(shape), int)
        ones[list(params["broadcast_dimensions"])] = inputs[0].shape
        return _reshape(inputs[0], tuple(int(side) for side in ones))
    if all(node.value is not None for node in inputs) and not expression.value.multiple_results:
        arrays = (
            np.broadcast_to(np.asarray(node.value), other.shape)
            for node, other in zip(inputs, expression.inputs, strict=True)
        )
        return _constant(np.asarray(expression.value.bind(*arrays, **params)))
    if name in _ELEMENTWISE:
        return _elementwise(_ELEMENTWISE[name], *inputs)
    inputs = tuple(_expand(node, other.shape) for node, other in zip(inputs, expression.inputs, strict=True))
    if name not in _TRANSLATIONS:
        raise ValueError(
            f"{expression.where} needs {name}, which is not translated to ONNX; only dense models with "
            "softmax attention are"
        )
    return _TRANSLATIONS[name](params, shape, *inputs)


def _translate_slice(params, shape, x):
    if params["strides"] and set(params["strides"]) != {1}:
        raise ValueError(f"a slice with strides {params['strides']} is not translated to ONNX")
    for axis, (start, stop) in enumerate(zip(params["start_indices"], params["limit_indices"], strict=True)):
        x = _slice(x, axis, start, stop)
    return x


def _translate_squeeze(params, shape, x):
    for axis in sorted(params["dimensions"], reverse=True):
        x = _squeeze(x, axis)
    return x


def _translate_dot(params, shape, left, right):
    contracted, batch = params["dimension_numbers"]
    batch = tuple(map(tuple, batch))
    free = [
        tuple(axis for axis in range(len(node.shape)) if axis not in (*contracted[side], *batch[side]))
        for side, node in enumerate((left, right))
    ]
    left = _transpose(left, (*batch[0], *free[0], *contracted[0]))
    right = _transpose(right, (*batch[1], *contracted[1], *free[1]))
    leading, inner = len(batch[0]), len(contracted[0])
    sides = tuple(left.shape[:leading]), math.prod(left.shape[len(left.shape) - inner :])
    if not (leading == 0 and inner == 1 and len(right.shape) == 2):  # unlike a linear layer
        left = _reshape(left, (*sides[0], math.prod(left.shape[leading:-inner]), sides[1]))
        right = _reshape(right, (*sides[0], sides[1], math.prod(right.shape[leading + inner :])))
    product = _Node("MatMul", (left, right), (*left.shape[:-1], right.shape[-1]))
    return _reshape(product, shape)


def _translate_convolution(params, shape, x, kernel):
    layout = params["dimension_numbers"]
    if tuple(layout) != ((0, 3, 1, 2), (3, 2, 0, 1), (0, 3, 1, 2)) or {
        *params["lhs_dilation"],
        *params["rhs_dilation"],
        params["batch_group_count"],
    } != {1}:
        raise ValueError(f"a convolution with {layout} and these dilations is not translated to ONNX")
    groups = params["feature_group_count"]
    return _convolve(x, kernel, params["window_strides"], params["padding"], shape, groups)


def _translate_depthwise(params, shape, x, kernel):
    sides = kernel.shape[:2]
    padding = [(side // 2, side // 2) for side in sides]
    return _convolve(x, _reshape(kernel, (*sides, 1, shape[-1])), (1, 1), padding, shape, shape[-1])


_ELEMENTWISE = {"add": "Add", "sub": "Sub", "mul": "Mul", "div": "Div", "max": "Max"}
_TRANSLATIONS = {
    "transpose": lambda params, shape, x: _transpose(x, tuple(params["permutation"])),
    "slice": _translate_slice,
    "squeeze": _translate_squeeze,
    "concatenate": lambda params, shape, *parts: _Node("Concat", parts, shape, {"axis": params["dimension"]}),
    "reduce_sum": lambda params, shape, x: _Node(
        "ReduceSum", (x, _integers(params["axes"])), shape, {"keepdims": 0}
    ),
    "dot_general": _translate_dot,
    "conv_general_dilated": _translate_convolution,
    _KEPT_WHOLE: _translate_depthwise,
}


def _serialize(onnx, images: _Node, logits: _Node, name: str):
    """The nodes on which ``logits`` depends as an ONNX model, each constant once."""
    names = {images: "images"}
    nodes, weights, known = [], [], {}
    stack = [logits]
    while stack:
        node = stack[-1]
        waiting = [other for other in node.inputs if other not in names]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        if node in names:
            continue
        if node.value is not None:
            key = (node.value.tobytes(), node.shape, node.value.dtype)
            if key not in known:
                known[key] = f"constant{len(known)}"
                array = np.ascontiguousarray(node.value).reshape(node.shape)
                weights.append(onnx.numpy_helper.from_array(array, known[key]))
            names[node] = known[key]
            continue
        names[node] = "logits" if node is logits else f"{node.operator.lower()}{len(nodes)}"
        nodes.append(
            onnx.helper.make_node(
                node.operator,
                [names[other] for other in node.inputs],
                [names[node]],
                names[node],
                **node.attributes,
            )
        )
    inputs, outputs = (
        [onnx.helper.make_tensor_value_info(names[node], onnx.TensorProto.FLOAT, node.shape)]
        for node in (images, logits)
    )
    graph = onnx.helper.make_graph(nodes, name, inputs, outputs, weights)
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    made = onnx.helper.make_model(
        graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="shiftaddvit_jax"
    )
    onnx.checker.check_model(made)
    return made
