"""A model's file."""

import functools
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from shiftaddvit_jax.checkpoints.to_onnx.nodes import (
    ANY_BATCH,
    CHANNELS_LAST,
    Node,
    constant,
    integers,
    transpose,
)
from shiftaddvit_jax.checkpoints.to_onnx.trace import trace
from shiftaddvit_jax.checkpoints.to_onnx.translations import translate
from shiftaddvit_jax.checkpoints.to_onnx.weights import look_up
from shiftaddvit_jax.files import whole_file
from shiftaddvit_jax.models.gnt import Samples
from shiftaddvit_jax.models.inspect import on_xla, run
from shiftaddvit_jax.models.variables import example_batch
from shiftaddvit_jax.nn import MoEDense
from shiftaddvit_jax.optional import require

OPSET, IR_VERSION = 20, 9  # the first with Gelu, and the format that came with it


def save_onnx(model: nn.Module, variables: PyTree, path: str | Path, *, batch: int | None = None) -> None:
    """Write a model with its variables as an ONNX file, whole or not at all.

    The file's input is ``images``, float32 [batch, 3, image_size, image_size], channels first as in other
    runtimes; its output is ``logits``, float32 [batch, num_classes], or without a head what it would get.
    Of a model that renders views, the inputs are the fields of `Samples`, and the output ``colours``, float32
    [batch, 3]. With ``batch=None`` the file takes any number of images or rays. It computes what the model
    does on XLA, with any kind of attention and linear layer.

    The weights of shift layers are integers in the file: codes of at most 5 bits (8 if ``weight_bits`` is
    above 5, or a weight has two terms) and a table of each code's value, where Gather looks it up; or numbers
    of 8 bits with a power of two for each output. That is exact in every runtime, and ONNX Runtime and
    OpenVINO do it once, when they load the file. All else is float32.

    What the kernels of this package save, the file does not: a runtime multiplies by the powers of two and by
    the binary codes, and both experts of a mixture compute all tokens, of which the router's choice keeps
    one.

    Args:
      model: any of `create_model`, in float32.
      variables: its variables, packed or not.
      path: where the file goes.
      batch: number of images or rays in the input, None for any; a runtime may be faster with one number.

    Raises:
      ValueError: a model in another dtype, any number of images with the threshold "tensor", an operation
      that is not translated, onnx not installed, or a path
        that cannot be written.
    """
    require("peers", "writing ONNX", "onnx")
    import onnx

    _check_settings(model, batch)
    shapes = example_batch(model, ANY_BATCH if batch is None else batch)
    # With JAX arrays, the trace has the same equations as the traces to look for.
    variables = jax.tree.map(jnp.asarray, variables)
    with nn.intercept_methods(_compute_all):
        graph = trace(functools.partial(run, on_xla(model), variables), shapes)
    if isinstance(shapes, Samples):
        fields = shapes._asdict().items()
        inputs = {name: Node("Input", (), shape.shape, {"dtype": shape.dtype}) for name, shape in fields}
        name, output = "colours", translate(graph, list(inputs.values()))
    else:
        count, *sides, channels = shapes.shape
        images = Node("Input", (), (count, channels, *sides), {"dtype": shapes.dtype})
        inputs, name = {"images": images}, "logits"
        output = translate(graph, [transpose(images, CHANNELS_LAST)])
    try:
        with whole_file(path) as temporary:
            onnx.save_model(_serialize(onnx, inputs, name, output, model.variant), str(temporary))
    except OSError as error:
        raise ValueError(f"{path} cannot be written: {error.strerror}") from None


def _check_settings(model, batch):
    settings = model.primitives
    chosen = any(choice == "dense_int8" for _, choice in settings.layers)
    if settings.precision != "float32" or chosen or settings.dtype not in (None, jnp.float32):
        raise ValueError(
            "an ONNX file computes in float32, and this model does not; create the model without dtype and "
            "precision, its variables stay the same"
        )
    binarized = {"hamming_linear", "hamming_quadratic"} & {*model.attention}
    if batch is None and binarized and settings.threshold == "tensor":
        raise ValueError("the threshold 'tensor' is a mean over all images of a batch; say how many: batch=1")


def _compute_all(call, arguments, keywords, context):
    """Both experts compute all tokens: ONNX has no dispatch."""
    if isinstance(context.module, MoEDense) and context.method_name == "compute_chosen":
        return context.module.compute_all(*arguments, **keywords)
    return call(*arguments, **keywords)


def _serialize(onnx, inputs: dict[str, Node], output_name: str, output: Node, title: str):
    """The nodes on which ``output`` depends as an ONNX model, each constant once."""
    names = {node: name for name, node in inputs.items()}
    nodes, weights, known = [], [], {}
    inputs_of = functools.cache(functools.partial(_stored_inputs, next(iter(names))))
    stack = [output]
    while stack:
        node = stack[-1]
        waiting = [other for other in inputs_of(node) if other not in names]
        if waiting:
            stack += waiting
            continue
        stack.pop()
        if node in names:
            continue
        if node.operator == "Codes":
            names[node] = names[inputs_of(node)[0]]
            continue
        if node.value is not None:
            key = (node.value.tobytes(), node.shape, node.value.dtype)
            if key not in known:
                known[key] = f"constant{len(known)}"
                array = np.ascontiguousarray(node.value).reshape(node.shape)
                weights.append(onnx.numpy_helper.from_array(array, known[key]))
            names[node] = known[key]
            continue
        names[node] = output_name if node is output else f"{node.operator.lower()}{len(nodes)}"
        nodes.append(
            onnx.helper.make_node(
                node.operator,
                [names[other] for other in inputs_of(node)],
                [names[node]],
                names[node],
                **{key: _attribute(onnx, value) for key, value in node.attributes.items()},
            )
        )
    kind = onnx.helper.np_dtype_to_tensor_dtype
    described = [
        onnx.helper.make_tensor_value_info(name, kind(node.attributes["dtype"]), _sides(node))
        for name, node in inputs.items()
    ]
    made = onnx.helper.make_tensor_value_info(output_name, onnx.TensorProto.FLOAT, _sides(output))
    graph = onnx.helper.make_graph(nodes, title, described, [made], weights)
    opsets = [onnx.helper.make_opsetid("", OPSET)]
    made = onnx.helper.make_model(
        graph, opset_imports=opsets, ir_version=IR_VERSION, producer_name="shiftaddvit_jax"
    )
    onnx.checker.check_model(made)
    return made


def _stored_inputs(first, node):
    """A node's inputs in the file, where codes are integers and shapes leave the number of images open."""
    if node.operator == "Codes":
        return (look_up(node.value),)
    if node.operator == "Reshape":
        x, shape = node.inputs
        return x, constant(np.where(shape.value % ANY_BATCH, shape.value, -1))
    if node.operator == "Expand" and node.shape[0] == ANY_BATCH:
        batch = Node("Shape", (first,), (1,), {"start": 0, "end": 1})
        sides = Node("Concat", (batch, integers(node.shape[1:])), (len(node.shape),), {"axis": 0})
        return node.inputs[0], sides
    return node.inputs


def _sides(node):
    return ["batch" if side == ANY_BATCH else side for side in node.shape]


def _attribute(onnx, value):
    return onnx.helper.np_dtype_to_tensor_dtype(value) if isinstance(value, np.dtype) else value
