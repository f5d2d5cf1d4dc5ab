"""Operations of the traced model by primitive, and bytes of its weights."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import PyTree

from shiftaddvit_jax.nn import ShiftDense


@dataclass(frozen=True)
class Operations:
    """Operations of matrix products and convolutions, an image.

    Attributes:
      multiplications: multiply-accumulates.
      shifts: shift-accumulates, of power-of-two weights.
      additions: accumulates of products with binary codes.
    """

    multiplications: float = 0.0
    shifts: float = 0.0
    additions: float = 0.0


# What the products inside a named jit are, see `shiftaddvit_jax.ops`; elsewhere they are multiplications.
_PRIMITIVES = {"_matadd": "additions", "_matshift": "shifts"}


def count_operations(
    model: nn.Module, variables: PyTree, shift_share: Mapping[str, float] | None = None
) -> Operations:
    """Operations of one image's forward pass, read off the traced model.

    Normalisations, softmax and activation functions are not counted.

    Args:
      model: from `create_model` or `reparameterize`.
      variables: its variables; shapes suffice.
      shift_share: for each MoE layer, by its name, the share of tokens on its shift expert (as `evaluate`
        measures it).

    Raises:
      ValueError: an MoE layer without a share.
    """
    images = jax.ShapeDtypeStruct((1, model.image_size, model.image_size, 3), jnp.float32)

    def forward(variables, images, key):
        # In training both experts compute every token, so that each one's operations show in the trace.
        return model.apply(variables, images, train=True, rngs={"dropout": key, "router": key})

    traced = jax.make_jaxpr(forward)(variables, images, jax.random.key(0))
    counts = dict.fromkeys(("multiplications", "shifts", "additions"), 0.0)
    for path, primitive, count in _products(traced.jaxpr, (), "multiplications"):
        counts[primitive] += count * _share(path, shift_share or {}, variables["params"])
    return Operations(**counts)


def _share(path, shift_share, params):
    """The share of a module's operations that one image needs: less than 1 inside a mixture."""
    for end in range(len(path), 1, -1):
        expert, layer = path[end - 1], path[: end - 1]
        if expert not in ("dense", "shift"):
            continue
        node = params
        for part in layer:
            node = node.get(part, {}) if isinstance(node, Mapping) else {}
        if "router" in node:
            name = "/".join(layer)
            if name not in shift_share:
                raise ValueError(f"shift_share lacks the MoE layer {name}; pass evaluate(...)['shift_share']")
            return shift_share[name] if expert == "shift" else 1 - shift_share[name]
    return 1.0


def _products(jaxpr, path, primitive):
    """Module path, primitive and number of operations of every product in ``jaxpr``, nested ones too."""
    for equation in jaxpr.eqns:
        # The outermost name is the model's class; jaxprs inside have names relative to their caller's.
        names = tuple(str(equation.source_info.name_stack).split("/"))
        here = path + tuple(name for name in names if name)
        operation = equation.primitive.name
        name = equation.params.get("name", "")
        outputs = equation.outvars[0].aval if equation.outvars else None
        if operation == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            inner = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            yield here[1:], primitive, outputs.size * inner
        elif operation == "conv_general_dilated":
            kernel = equation.invars[1].aval
            features = equation.params["dimension_numbers"].rhs_spec[0]
            yield here[1:], primitive, outputs.size * kernel.size // kernel.shape[features]
        elif name == "_depthwise_conv":
            taps = math.prod(equation.invars[1].aval.shape[:2])
            yield here[1:], primitive, outputs.size * taps
        else:
            inside = _PRIMITIVES.get(name, primitive)
            for nested in jax.core.jaxprs_in_params(equation.params):
                yield from _products(nested, here, inside)


def packed_weight_bytes(model: nn.Module, variables: PyTree) -> int:
    """Bytes of all weights once packed: ``weight_bits`` for a power-of-two weight, float32 for the others."""
    shift_layers = set()

    def note(next_call, arguments, keywords, context):
        if isinstance(context.module, ShiftDense) and context.method_name == "__call__":
            shift_layers.add(context.module.path)
        return next_call(*arguments, **keywords)

    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    with nn.intercept_methods(note):
        jax.eval_shape(lambda: model.init(jax.random.key(0), images))
    bits = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(variables):
        names = tuple(key.key for key in path)
        is_shift = names[1:-1] in shift_layers and names[-1] == "kernel"
        bits += leaf.size * (model.primitives.weight_bits if is_shift else 32)
    return -(-bits // 8)
