"""What happens inside a model: where tokens are sent, what they attend to, what weights become."""

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PyTree

from shiftaddvit_jax.models.inspect import Images, capture, module_variables, on_xla, watch_routers
from shiftaddvit_jax.models.variables import variable_shapes
from shiftaddvit_jax.nn.attention import (
    ROTATIONS,
    Attention,
    BinarySoftmaxAttention,
    EcoformerAttention,
    HammingKSHAttention,
    HammingLinearAttention,
    HammingQuadraticAttention,
    HashedAttention,
    SoftmaxAttention,
    SpatialReductionAttention,
    code_scale,
)
from shiftaddvit_jax.ops import PackedWeight, binarize, code_similarity, unpack_weight
from shiftaddvit_jax.pack import shift_layers


def routed_tokens(model: nn.Module, variables: PyTree, images: Images) -> dict[str, np.ndarray]:
    """Whether each token's most probable expert is the shift expert: bool [batch, tokens], by MoE layer.

    The last side * side tokens are a square grid, see `square_grid`.
    """
    return {
        name.removesuffix("/router"): np.asarray(chosen).reshape(len(images), -1)
        for name, (chosen,) in watch_routers(model)(variables, images).items()
    }


def attention_maps(model: nn.Module, variables: PyTree, images: Images) -> dict[str, np.ndarray]:
    """How much each token attends to each, float32 [batch, heads, tokens, others], by the attention's name.

    Rows sum to 1. The maps of ``msa``, ``sra``, ``linear_sra``, ``hamming_quadratic`` and ``binary_softmax``
    are softmax's weights. Those of ``hamming_linear`` and ``hamming_ksh`` are the weights of the values
    before the norm (1/2 for a token's own value, and q k^T / pi), those of ``ecoformer`` the weights of its
    sum; both are divided by their sum. ``linear`` and ``performer`` have no such weights and are left out.
    """
    modules = {}

    def look(module, method, arguments, result):
        if not isinstance(module, Attention) or method != _shown_method(module):
            return None
        modules["/".join(module.path)] = module.clone(parent=None)
        return (result,) if method == "weights" else tuple(result)

    seen = capture(on_xla(model), variables, images, look)
    maps = {}
    for name, parts in seen.items():
        weights = _attention_weights(modules[name], [array for call in parts for array in call])
        if weights is not None:
            maps[name] = np.asarray(weights / jnp.sum(weights, axis=-1, keepdims=True))
    return maps


def _shown_method(module):
    """The method whose result shows what tokens attend to: weights, shared codes, or queries and keys.

    Those of Hamming attention are as it binarizes them, rotated and normalised.
    """
    match module:
        case BinarySoftmaxAttention():
            return "weights"
        case HammingLinearAttention() | HammingQuadraticAttention():
            return "rotated"
        case HashedAttention():
            return "codes_and_values"
    return "heads"


def _attention_weights(module, parts):
    """Weights [batch, heads, tokens, others], at least 0, from the results of `_shown_method`."""
    if isinstance(module, BinarySoftmaxAttention):
        return parts[0]
    q, k = parts[0], parts[0] if isinstance(module, HashedAttention) else parts[1]
    own, stacked = jnp.eye(q.shape[-2]), max(1, ROTATIONS[module.primitives.rotation])
    match module:
        case SoftmaxAttention() | SpatialReductionAttention():
            return jax.nn.softmax(jnp.einsum("bhnd,bhmd->bhnm", q, k) * q.shape[-1] ** -0.5)
        case HammingQuadraticAttention():
            similarity = code_similarity(q, k, module.primitives.threshold, "xla")
            return jax.nn.softmax(similarity * code_scale(q, q.shape[-1] // stacked))
        case HammingLinearAttention():
            q, k = (binarize(x, module.primitives.threshold, (0, 1), "xla") for x in (q, k))
            return own / 2 + jnp.einsum("bhnd,bhmd->bhnm", q, k) / (math.pi * stacked)
        case HammingKSHAttention():
            return own / 2 + jnp.einsum("bhnd,bhmd->bhnm", q, k) / math.pi
        case EcoformerAttention():
            return jnp.einsum("bhnd,bhmd->bhnm", q, k) + own * (q.shape[-1] + 1)
    return None


def shift_weights(model: nn.Module, variables: PyTree) -> dict[str, tuple[np.ndarray | None, np.ndarray]]:
    """Each shift layer's weights [inputs, outputs] before and after rounding to powers of two, by its name.

    Packed variables keep only the powers, so that the weights before are None.
    """
    shapes = variable_shapes(model)
    weights = {}
    for path, layer in shift_layers(model).items():
        name = "/".join(path)
        params = module_variables(name, variables)["params"]
        after = layer.apply({"params": params}, method="weight")
        if isinstance(after, PackedWeight):
            after = unpack_weight(after, *module_variables(name, shapes)["params"]["kernel"].shape)
        before = np.asarray(params["kernel"]) if "kernel" in params else None
        weights[name] = (before, np.asarray(after))
    return weights
