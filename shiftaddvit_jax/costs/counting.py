"""What a model computes, read from its trace: every product with its shape, and bytes of weights.

Nothing here knows a model. The trace's names give a product's module, the named jit around it gives its
primitive (see `shiftaddvit_jax.ops`), and its operands and its shift layer give its number format.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax.extend.core import jaxprs_in_params
from jaxtyping import PyTree

from kernels_tvm.descriptions import HadamardDescription
from shiftaddvit_jax.models.inspect import on_xla
from shiftaddvit_jax.models.variables import example_inputs
from shiftaddvit_jax.nn import MoEDense, ShiftDense
from shiftaddvit_jax.nn.attention import BinarySoftmaxAttention
from shiftaddvit_jax.nn.linear import precision_of
from shiftaddvit_jax.nn.moe import EXPERTS, ShiftShare, layer_shift_share
from shiftaddvit_jax.ops.packing import packed_bits

PRIMITIVES = ("macs", "adds", "shifts", "popcounts")
# The primitive of the products inside a named jit, see `shiftaddvit_jax.ops`; elsewhere it is ``macs``.
_NAMED_JITS = {"_matadd": "adds", "_matshift": "shifts", "_code_product": "popcounts", "_hadamard": "adds"}

# Named jits that are one product each, though their trace has none.
_PRODUCT_JITS = ("_depthwise_conv", "_squared_distances", "_hadamard")

Path = tuple[str, ...]


@dataclass(frozen=True)
class Operations:
    """Numbers of operations, by primitive.

    Attributes:
      macs: multiply-accumulates.
      adds: accumulates of products with binary codes.
      shifts: shift-accumulates, of power-of-two weights.
      popcounts: XORs of two one-bit codes, each with the count of its bit.
    """

    macs: float = 0.0
    adds: float = 0.0
    shifts: float = 0.0
    popcounts: float = 0.0

    def __add__(self, other: "Operations") -> "Operations":
        pairs = zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)
        return Operations(*(one + more for one, more in pairs))


@dataclass(frozen=True)
class Product:
    """A matrix product [rows, inputs] x [inputs, outputs], or a convolution; the product is a 1 x 1 one.

    Attributes:
      module: the module's path, such as ``stage1/block1/attn/qkv``; empty for the model itself.
      primitive: one of `PRIMITIVES`.
      rows: tokens; images in a convolution.
      inputs: length of a sum, or channels that a kernel spans.
      outputs: columns, or kernels.
      groups: how many such products there are: images and heads, or groups of channels.
      image: height and width of a convolution's input; this and the next three are 1 x 1 in a matrix product.
      kernel: height and width of a kernel.
      grid: height and width of the output.
      stride: distance of two windows.
      input_bits: bits of a number on the left, or of the image.
      weight_bits: bits of a number on the right, or of a kernel; keys and values are on the right.
      output_bits: bits of a sum.
      is_float: whether the sums are of floating-point numbers.
      share: the share of the rows that are computed: less than 1 in an MoE layer.
      terms: powers of two in a weight; for each, a number is shifted and added.
    """

    module: str
    primitive: str
    rows: int
    inputs: int
    outputs: int
    groups: int = 1
    image: tuple[int, int] = (1, 1)
    kernel: tuple[int, int] = (1, 1)
    grid: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    input_bits: int = 32
    weight_bits: int = 32
    output_bits: int = 32
    is_float: bool = True
    share: float = 1.0
    terms: int = 1

    @property
    def count(self) -> float:
        """Operations of the primitive."""
        return self.output_size * self.inputs * math.prod(self.kernel) * self.terms

    @property
    def output_size(self) -> float:
        """How many numbers it makes."""
        return self.groups * self.rows * self.share * math.prod(self.grid) * self.outputs

    @property
    def output_bytes(self) -> float:
        """Bytes of what it makes."""
        return self.output_size * self.output_bits / 8

    @property
    def operations(self) -> Operations:
        """Its operations, by primitive."""
        return Operations(**{self.primitive: self.count})


def trace_products(function: Callable, *arguments: PyTree) -> list[Product]:
    """Every matrix product and convolution that ``function`` computes, in the order of its trace.

    It may call any Flax modules. The body of a scan counts as often as it runs; all branches of a
    `jax.lax.cond` count. Normalizations, softmax and all that is elementwise are no products.

    Args:
      function: a function of arrays, such as a model's ``apply``; its first scope is the model itself.
      arguments: its arguments; shapes (`jax.ShapeDtypeStruct`) suffice.
    """
    jaxpr, modules = _trace(function, *arguments)
    return _products(jaxpr, (), "macs", modules)


def count_products(
    model: nn.Module, variables: PyTree, shift_share: ShiftShare | None = None, batch: int = 1
) -> list[Product]:
    """The products of a forward pass of ``model`` in inference.

    Args:
      model: from `create_model` or `reparameterize`, or one of your own with ``image_size`` and a call
        ``(images, train)``.
      variables: its variables, packed or not; shapes suffice.
      shift_share: see `layer_shift_share`.
      batch: images.

    Raises:
      ValueError: an MoE layer without a share, a share outside 0 to 1, or a batch without images.
    """
    if batch < 1:
        raise ValueError(f"batch must be at least 1 image, got {batch}")
    jaxpr, modules = _trace_model(model, variables, batch)
    shares = _expert_shares(modules, shift_share)
    return [
        dataclasses.replace(product, share=_share_of(product.module, shares))
        for product in _products(jaxpr, (), "macs", modules)
    ]


def count_operations(
    model: nn.Module, variables: PyTree, shift_share: ShiftShare | None = None, batch: int = 1
) -> Operations:
    """Operations of a forward pass, by primitive; see `count_products`."""
    return sum_operations(count_products(model, variables, shift_share, batch))


def sum_operations(products: Iterable[Product]) -> Operations:
    """The operations of all ``products`` together."""
    return sum((product.operations for product in products), Operations())


def weight_bytes(model: nn.Module, variables: PyTree) -> dict[str, float]:
    """Bytes of each module's variables once packed, by the module's path.

    A weight of one power of two takes ``weight_bits``, or 4 bits with int8 activations; one of two powers
    takes 8, a dense weight the bits of its precision; all else keeps its size.
    """
    _, modules = _trace_model(model, variables, batch=1)
    sizes: dict[str, float] = {}
    leaves: dict[tuple[str, ...], Any] = flatten_dict(variables)
    for (_, *path, name), leaf in leaves.items():
        layer, bits = modules.get(tuple(path)), 8 * leaf.dtype.itemsize
        if isinstance(layer, ShiftDense) and jnp.issubdtype(leaf.dtype, jnp.floating):
            # In mode "ps", one of a weight's bits is its sign.
            packed = _packed_bits(layer)
            bits = {"kernel": packed, "exponent": packed - 1, "sign": 1}.get(name, bits)
        elif name == "kernel" and isinstance(layer, nn.Module):
            bits = {"int8": 8, "bfloat16": 16}.get(precision_of(layer) or "", bits)
        module = "/".join(path)
        sizes[module] = sizes.get(module, 0) + leaf.size * bits / 8
    return sizes


def _packed_bits(layer):
    """Bits of a shift layer's packed weight."""
    if layer.activations == "int8" or layer.weight_terms == 2:
        return packed_bits(layer.activations, layer.weight_terms)
    return layer.weight_bits


def _trace_model(model, variables, batch):
    if hasattr(model, "primitives"):
        model = on_xla(model)  # a trace says nothing of what a kernel computes

    def forward(variables, inputs, key):
        # In training both experts compute every token, so that the trace shows the operations of both.
        return model.apply(variables, *inputs, train=True, rngs={"dropout": key, "router": key})

    return _trace(forward, variables, example_inputs(model, batch), jax.random.key(0))


def _trace(function, *arguments):
    """The function's jaxpr, and every module that it calls by its path."""
    modules: dict[Path, nn.Module] = {}

    def note(call, arguments, keywords, context):
        modules.setdefault(context.module.path, context.module)
        return call(*arguments, **keywords)

    with nn.intercept_methods(note):
        return jax.make_jaxpr(function)(*arguments).jaxpr, modules


def _expert_shares(modules, shift_share):
    """The share of an MoE layer's tokens that each expert computes, by the expert's path."""
    shares = {}
    for path, layer in modules.items():
        if isinstance(layer, MoEDense):
            name = "/".join(path)
            share = layer_shift_share(shift_share, name)
            for expert, part in zip(EXPERTS, (1 - share, share), strict=True):
                shares[f"{name}/{expert}"] = min(1.0, layer.top_k * part)
    return shares


def _share_of(module, shares):
    """The share of a module's operations that a forward pass needs: less than 1 inside an MoE layer."""
    inside = (share for expert, share in shares.items() if f"{module}/".startswith(f"{expert}/"))
    return next(inside, 1.0)


def _products(jaxpr, names, primitive, modules):
    """The products of ``jaxpr`` and of the jaxprs nested in it."""
    found = []
    for equation in jaxpr.eqns:
        # Names of a nested jaxpr are relative to its caller's.
        here = names + tuple(filter(None, str(equation.source_info.name_stack).split("/")))
        name = equation.params.get("name", "")
        if shape := _shape(equation, name):
            path = _module_path(here, modules)
            product = Product("/".join(path), _NAMED_JITS.get(name, primitive), **shape)
            found.append(_in_number_format(product, modules.get(path)))
            continue
        inside = [
            product
            for nested in jaxprs_in_params(equation.params)
            for product in _products(nested, here, _NAMED_JITS.get(name, primitive), modules)
        ]
        found += inside * (equation.params["length"] if equation.primitive.name == "scan" else 1)
    return found


def _module_path(names, modules) -> Path:
    """The path of the innermost module among the names of a scope.

    Other names are those of the model's class, which comes first, of methods (``attn.qkv``) and of functions.
    """
    path = ()
    for name in names[1:]:
        inner = (*path, name.split(".")[0])
        path = inner if inner in modules else path
    return path


def _shape(equation, name) -> dict[str, Any] | None:
    """The fields of `Product` that an equation's operands determine; None if it is no product."""
    operation = name if name in _PRODUCT_JITS else equation.primitive.name
    if operation not in ("dot_general", "conv_general_dilated", *_PRODUCT_JITS):
        return None
    if operation == "_hadamard":
        return _hadamard_shape(equation.invars[0].aval, equation.outvars[0].aval)
    (left, right), output = (variable.aval for variable in equation.invars[:2]), equation.outvars[0].aval
    bits = [8 * array.dtype.itemsize for array in (left, right, output)]
    formats = dict(zip(("input_bits", "weight_bits", "output_bits"), bits, strict=True))
    formats["is_float"] = jnp.issubdtype(output.dtype, jnp.floating)
    if operation == "dot_general":
        (contracted, _), (batched, _) = equation.params["dimension_numbers"]
        inputs, groups = (math.prod(left.shape[axis] for axis in axes) for axes in (contracted, batched))
        rows, outputs = (array.size // (inputs * groups) for array in (left, right))
        return {"rows": rows, "inputs": inputs, "outputs": outputs, "groups": groups, **formats}
    if operation == "conv_general_dilated":
        specs = equation.params["dimension_numbers"]
        image, kernel, grid = (
            _sides(array.shape[axis] for axis in spec[2:])
            for array, spec in zip((left, right, output), specs, strict=True)
        )
        groups = equation.params["feature_group_count"]
        return {
            "rows": left.shape[specs.lhs_spec[0]],
            "inputs": right.shape[specs.rhs_spec[1]],
            "outputs": right.shape[specs.rhs_spec[0]] // groups,
            "groups": groups,
            "stride": _sides(equation.params["window_strides"]),
            **dict(zip(("image", "kernel", "grid"), (image, kernel, grid), strict=True)),
            **formats,
        }
    if operation == "_squared_distances":
        *groups, rows, inputs = left.shape
        return {
            "rows": rows,
            "inputs": inputs,
            "outputs": right.shape[-2],
            "groups": math.prod(groups),
            **formats,
        }
    *batch, height, width, channels = left.shape
    return {
        "rows": math.prod(batch),
        "inputs": 1,
        "outputs": 1,
        "groups": channels,
        "image": (height, width),
        "kernel": right.shape[:2],
        "grid": (height, width),
        **formats,
    }


def _hadamard_shape(x, output) -> dict[str, Any]:
    """Of each row a product with codes, as long as the additions that make a number of the fast transform."""
    *rows, size = x.shape
    description = HadamardDescription(size)
    outer = description.order // 2 if description.order > 1 else 0
    return {
        "rows": 1,
        "inputs": description.power.bit_length() - 1 + outer,
        "outputs": size,
        "groups": math.prod(rows),
        "weight_bits": 8 * x.dtype.itemsize,
        "output_bits": 8 * output.dtype.itemsize,
    }


def _sides(sizes) -> tuple[int, int]:
    """Any number of spatial axes as two."""
    *first, last = sizes
    return math.prod(first), last


def _in_number_format(product, layer):
    """``product`` with the bits of its codes, which XLA holds as ordinary numbers."""
    if product.primitive == "adds":
        return dataclasses.replace(product, input_bits=1)
    if product.primitive == "popcounts":
        return dataclasses.replace(product, input_bits=1, weight_bits=1)
    if product.primitive == "shifts" and isinstance(layer, ShiftDense):
        is_int8, is_fixed = layer.activations == "int8", layer.activations == "fixed_point"
        return dataclasses.replace(
            product,
            input_bits=8 if is_int8 else product.input_bits,
            weight_bits=_packed_bits(layer),
            terms=layer.weight_terms,
            is_float=product.is_float and not (is_int8 or is_fixed),
        )
    if isinstance(layer, BinarySoftmaxAttention) and layer.primitives.attention_precision != "float32":
        return dataclasses.replace(product, input_bits=8, weight_bits=8, is_float=False)
    return product
