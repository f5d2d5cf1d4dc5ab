"""Nodes of an ONNX graph, made so that little is left to do at run time.

Constants are folded, shapes are static, and transpositions, slices and biases move to where runtimes fuse
them.
"""

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

# Stands for any number of images in shapes: a prime that divides no side of a model's arrays.
ANY_BATCH = 65537
CHANNELS_FIRST, CHANNELS_LAST = (0, 3, 1, 2), (0, 2, 3, 1)


@dataclass(eq=False)
class Node:
    """A node of the ONNX graph, or its ``"Input"``, or a ``"Constant"``.

    A constant whose operator is ``"Codes"`` is stored as integers, see `weights`. The node's shape may have
    ones, or lack leading axes, where the traced shape is broadcast.
    """

    operator: str
    inputs: tuple["Node", ...] = field(repr=False)  # a graph's would be exponentially long
    shape: tuple[int, ...]
    attributes: dict[str, Any] = field(default_factory=dict)
    value: np.ndarray | None = None


def constant(value: np.ndarray) -> Node:
    """A constant's node."""
    value = np.asarray(value)
    return Node("Constant", (), value.shape, value=value)


def integers(values: Any) -> Node:
    """A constant of int64, as ONNX has shapes and axes."""
    return constant(np.asarray(values, np.int64))


def reshape(node: Node, shape: tuple[int, ...]) -> Node:
    """The node in another shape."""
    if node.shape == shape:
        return node
    if node.value is not None:
        return constant(node.value.reshape(shape))
    if node.operator == "Reshape":
        return reshape(node.inputs[0], shape)
    if node.operator == "LayerNormalization" and shape == _tokens(node.shape):
        x, *rest = node.inputs
        return Node(node.operator, (reshape(x, shape), *rest), shape, node.attributes)
    if node.attributes.get("perm") == CHANNELS_LAST and shape == _tokens(node.shape):
        batch, tokens, channels = shape
        return transpose(reshape(node.inputs[0], (batch, channels, tokens)), (0, 2, 1))
    return Node("Reshape", (node, integers(shape)), shape)


def _tokens(grid: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of a grid's tokens, row after row."""
    return grid[0], math.prod(grid[1:-1]), grid[-1]


def transpose(node: Node, permutation: tuple[int, ...]) -> Node:
    """The node with its axes in another order."""
    if permutation == tuple(range(len(permutation))):
        return node
    if node.value is not None:
        return constant(node.value.transpose(permutation))
    if node.operator == "Transpose":
        inner = node.attributes["perm"]
        return transpose(node.inputs[0], tuple(inner[axis] for axis in permutation))
    shape = tuple(node.shape[axis] for axis in permutation)
    if (
        permutation == CHANNELS_FIRST
        and node.operator == "Reshape"
        and node.inputs[0].shape == _tokens(node.shape)
    ):
        return reshape(transpose(node.inputs[0], (0, 2, 1)), shape)
    return Node("Transpose", (node,), shape, {"perm": permutation})


def cut(node: Node, axis: int, start: int, stop: int) -> Node:
    """Part of one axis, sliced as early as possible: in the weights, if these make the axis."""
    if (start, stop) == (0, node.shape[axis]):
        return node
    if node.value is not None:
        part = node.value[(slice(None),) * axis + (slice(start, stop),)]
        return Node(node.operator, (), part.shape, value=part)
    shape = (*node.shape[:axis], stop - start, *node.shape[axis + 1 :])
    if node.operator == "Transpose":
        permutation = node.attributes["perm"]
        return transpose(cut(node.inputs[0], permutation[axis], start, stop), permutation)
    if node.operator == "Reshape" and node.inputs[0].shape == (
        *node.shape[:axis],
        math.prod(node.shape[axis:]),
    ):
        inside = math.prod(node.shape[axis + 1 :])
        return reshape(cut(node.inputs[0], axis, start * inside, stop * inside), shape)
    if node.operator in ("Add", "MatMul") and axis == len(node.shape) - 1:
        first, second = node.inputs
        whole = second.shape[-1:] == node.shape[-1:] and first.shape[:-1] == node.shape[:-1]
        if second.value is not None and whole:
            if node.operator == "Add":
                first = cut(expand(first, node.shape), axis, start, stop)
            second = cut(second, len(second.shape) - 1, start, stop)
            return Node(node.operator, (first, second), shape)
    inputs = (node, integers([start]), integers([stop]), integers([axis]))
    return Node("Slice", inputs, shape)


def squeeze(node: Node, axis: int) -> Node:
    """The node without an axis of one entry."""
    if node.operator == "Transpose":
        permutation = node.attributes["perm"]
        gone = permutation[axis]
        rest = tuple(p - (p > gone) for p in permutation if p != gone)
        return transpose(squeeze(node.inputs[0], gone), rest)
    return reshape(node, (*node.shape[:axis], *node.shape[axis + 1 :]))


def expand(node: Node, shape: tuple[int, ...]) -> Node:
    """The node broadcast to ``shape``."""
    if node.shape == shape:
        return node
    if node.value is not None and ANY_BATCH not in shape:
        return constant(np.broadcast_to(node.value, shape))
    return Node("Expand", (node, integers(shape)), shape)


def elementwise(operator: str, *inputs: Node) -> Node:
    """A node of an operator whose inputs are broadcast."""
    shape = np.broadcast_shapes(*(node.shape for node in inputs))
    if operator == "Add":
        node, other = inputs
        for x, bias in ((node, other), (other, node)):
            if bias.value is not None and bias.value.size == x.shape[-1]:
                return _add_bias(x, constant(bias.value.reshape(-1)), shape)
    return Node(operator, inputs, shape)


def _add_bias(x: Node, bias: Node, shape: tuple[int, ...]) -> Node:
    """``x`` plus one number a channel; if ``x`` is a convolution, the convolution adds them."""
    if x.attributes.get("perm") == CHANNELS_LAST and x.inputs[0].operator == "Conv":
        convolution = x.inputs[0]
        if len(convolution.inputs) == 2:
            inputs = (*convolution.inputs, bias)
            biased = Node("Conv", inputs, convolution.shape, convolution.attributes)
            return transpose(biased, CHANNELS_LAST)
    return Node("Add", (x, bias), shape)


def convolve(x: Node, kernel: Node, strides, padding, shape, groups=1) -> Node:
    """A convolution of [batch, height, width, channels] with a kernel [height, width, in / groups, out]."""
    weight = transpose(kernel, (3, 2, 0, 1))
    (top, bottom), (left, right) = padding
    attributes = {
        "kernel_shape": weight.shape[2:],
        "strides": tuple(strides),
        "pads": (top, left, bottom, right),
        "group": groups,
    }
    first = tuple(shape[axis] for axis in CHANNELS_FIRST)
    y = Node("Conv", (transpose(x, CHANNELS_FIRST), weight), first, attributes)
    return transpose(y, CHANNELS_LAST)
