"""The plan for inference: which parts of a model run as one TVM kernel each.

`in_one_kernel` marks a module's method that can run as one kernel; a function below describes that kernel.
This file decides everything else about kernels:

- ``x + attention(norm(x))`` of a block is one kernel, and so is ``x + mlp(norm(x))``;
- a patch embedding is one kernel, and so is a classifier's head with the mean of its tokens;
- the LayerNorm at the end of a stage is part of the kernel that reads the stage's output: `leave_to_reader`;
- a mixture of experts is one kernel if its whole branch is not.

Only CPUs have kernels for whole branches; on GPUs each op has its own. A model runs module by module in
training, with a number format that the kernels lack, and in a call that collects routing statistics or
intermediates.
"""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from flax import struct
from jaxtyping import Array, Float

from kernels_tvm.descriptions import (
    LANES,
    BinarySoftmaxDescription,
    Description,
    HammingLinearDescription,
    HeadDescription,
    LinearDescription,
    MlpDescription,
    PatchEmbedDescription,
    SoftmaxAttentionDescription,
)
from shiftaddvit_jax.nn.kernels import Params, describe_linear, is_packed, linear_arrays, norm_arrays
from shiftaddvit_jax.nn.position import resize_position_biases
from shiftaddvit_jax.ops.implementation import float32_only, uses_tvm, with_gradient
from shiftaddvit_jax.ops.implementation.custom_call import on_gpu
from shiftaddvit_jax.ops.implementation.fused import (
    fused_attention,
    fused_head,
    fused_linear,
    fused_mlp,
    fused_patch_embed,
)

MOST_SOFTMAX_TOKENS = 256  # at 197, the kernel takes half of XLA's time; more were not timed
WATCHED = ("routing", "intermediates")  # collections that show what happens inside


class Unnormalized(struct.PyTreeNode):
    """Tokens whose LayerNorm is left to the kernel that reads them.

    Attributes:
      x: the tokens, [..., channels].
      scale: the LayerNorm's scale, [channels].
      bias: the LayerNorm's bias, [channels].
      epsilon: the LayerNorm's epsilon.
    """

    x: Float[Array, "*batch channels"]
    scale: Float[Array, "channels"]
    bias: Float[Array, "channels"]
    epsilon: float = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the tokens."""
        return self.x.shape

    @property
    def dtype(self) -> jnp.dtype:
        """The dtype of the tokens."""
        return self.x.dtype


def normalized(x: Float[Array, "*batch channels"] | Unnormalized) -> Float[Array, "*batch channels"]:
    """``x``, after its LayerNorm if that was left to the reader."""
    if not isinstance(x, Unnormalized):
        return x
    norm = nn.LayerNorm(x.epsilon, dtype=x.dtype, parent=None)
    y: Any = norm.apply({"params": {"scale": x.scale, "bias": x.bias}}, x.x)
    return y


def leave_to_reader(
    module: nn.Module, norm: nn.LayerNorm, x: Float[Array, "*batch channels"], train: bool
) -> Float[Array, "*batch channels"] | Unnormalized:
    """The output ``norm(x)`` of ``module``; if that runs on kernels, ``x`` with the norm's parameters."""
    if x.shape[-1] % LANES or not _runs_on_kernels(module, x, train):
        return norm(x)  # kernels that begin with a LayerNorm read whole vectors
    params = norm.variables["params"]
    return Unnormalized(x, params["scale"], params["bias"], norm.epsilon)


PlannedKernel = tuple[Description, Callable[[Any, Params], Array]]


def in_one_kernel(describe: Callable[..., PlannedKernel | None]) -> Callable[[Callable], Callable]:
    """Mark a module's method ``(x, *arguments, train=False)`` to run as one kernel if ``describe`` has one.

    ``describe(module, params, x, *arguments)`` returns the kernel's description and a function (x, params)
    that calls the kernel, or None. The method itself is the reference: XLA runs it where the kernel can't
    run, and for gradients.
    """

    def decorate(method):
        @functools.wraps(method)
        def run(self, x, *arguments, train: bool = False):
            kernel = None
            if _runs_on_kernels(self, x, train):
                kernel = describe(self, self.variables["params"], x, *arguments)
            if kernel is None or kernel[0].why_not():
                return method(self, normalized(x), *arguments, train=train)
            alone = self.clone(parent=None, primitives=self.primitives.on_xla())

            def reference(x, params):
                return alone.apply({"params": params}, x, *arguments, method=method.__name__)

            run_kernel = with_gradient(self.primitives.implementation, kernel[1], reference)
            return run_kernel(x, self.variables["params"])

        return run

    return decorate


def _runs_on_kernels(module: nn.Module, x: Array | Unnormalized, train: bool) -> bool:
    """Whether a module runs on kernels where it has them: on a CPU, in float32 inference that nobody watches.

    With ``implementation=None`` it does only if its parameters are packed.

    Raises:
      ValueError: an unknown implementation, or TVM asked for where it can't run at all.
    """
    watched = any(module.is_mutable_collection(name) for name in WATCHED)
    tokens = x.x if isinstance(x, Unnormalized) else x
    if on_gpu() or train or watched or module.is_initializing() or float32_only(tokens):
        return False
    packed = is_packed(module.variables["params"])
    return uses_tvm(type(module).__name__, module.primitives.implementation, prefer=packed, arrays=x)


def _describe_layer(kind, params, path, inputs, outputs, primitives):
    """The description of the layer at ``path`` in a block."""
    module, name = path.split("/")
    kind, primitives = primitives.of_layer(path, kind)
    return describe_linear(kind, params[module][name], inputs, outputs, primitives)


def attention_sum(
    block: nn.Module, params: Params, x: Float[Array, "batch tokens channels"], grid: tuple[int, int]
) -> PlannedKernel | None:
    """The kernel of a block's ``x + attention(norm1(x))``."""
    _, tokens, channels = x.shape
    primitives, epsilon = block.primitives, block.norm1.epsilon
    has_kernel = {
        "msa": tokens <= MOST_SOFTMAX_TOKENS,
        "hamming_linear": primitives.threshold != "tensor",
        "hamming_quadratic": primitives.threshold != "tensor",
        "binary_softmax": primitives.attention_precision == "float32",
    }
    rotates = block.attention != "msa" and primitives.rotation != "none"
    if rotates or not has_kernel.get(block.attention, False):
        return None
    qkv, proj = (
        _describe_layer(block.projections, params, f"attn/{name}", channels, outputs, primitives)
        for name, outputs in (("qkv", 3 * channels), ("proj", channels))
    )
    shared = qkv, proj, block.num_heads, tokens, epsilon
    by_sample = primitives.threshold == "sample"
    attention = {
        "msa": lambda: SoftmaxAttentionDescription(*shared),
        "hamming_linear": lambda: HammingLinearDescription(*shared, by_sample),
        "hamming_quadratic": lambda: BinarySoftmaxDescription(*shared, by_sample),
        "binary_softmax": lambda: BinarySoftmaxDescription(*shared, sample_threshold=False, grid=grid),
    }[block.attention]()

    def run(x, params):
        layers = params["attn"]
        arrays = norm_arrays(params["norm1"])
        arrays |= linear_arrays(qkv, layers["qkv"], primitives.weight_bits, "qkv_")
        if "dconv" in layers:
            arrays["value_kernel"] = layers["dconv"]
        if "position_bias" in layers:
            table = resize_position_biases(layers["position_bias"], block.trained_grid or grid, grid)
            # The kernel reads the biases of a query's keys one after the other: by key minus query.
            arrays["position_bias"] = jnp.concatenate([table[-4::-1], table[-3:]]).T
        arrays |= linear_arrays(proj, layers["proj"], primitives.weight_bits, "proj_")
        return fused_attention(attention, arrays, x)

    return attention, run


def mlp_sum(
    block: nn.Module, params: Params, x: Float[Array, "batch tokens channels"], grid: tuple[int, int]
) -> PlannedKernel:
    """The kernel of a block's ``x + mlp(norm2(x))``."""
    _, tokens, channels = x.shape
    primitives, hidden = block.primitives, int(channels * block.mlp_ratio)
    fc1, fc2 = (
        _describe_layer(block.mlp, params, f"mlp/{name}", inputs, outputs, primitives)
        for name, inputs, outputs in (("fc1", channels, hidden), ("fc2", hidden, channels))
    )
    sides = (grid[0], grid[1]) if block.depthwise else None
    mlp = MlpDescription(fc1, fc2, block.norm2.epsilon, tokens, sides, block.relu)

    def run(x, params):
        layers = params["mlp"]
        arrays = norm_arrays(params["norm2"])
        arrays |= linear_arrays(fc1, layers["fc1"], primitives.weight_bits, "fc1_")
        arrays |= linear_arrays(fc2, layers["fc2"], primitives.weight_bits, "fc2_")
        if sides:
            conv = layers["dwconv"]
            arrays |= {"conv_kernel": conv["kernel"].reshape(9, -1), "conv_bias": conv["bias"]}
        return fused_mlp(mlp, arrays, x)

    return mlp, run


def patch_embedding(
    embed: nn.Module, params: Params, x: Float[Array, "batch height width channels"] | Unnormalized
) -> PlannedKernel:
    """The kernel of a patch embedding, with the LayerNorm of ``x`` if that was left to the reader."""
    _, height, width, channels = x.shape
    layer, norm = embed.proj, embed.norm
    patch, stride = layer.kernel_size[0], layer.strides[0]
    projection = LinearDescription(
        "dense", patch**2 * channels, layer.features, precision=embed.primitives.precision
    )
    input_epsilon = x.epsilon if isinstance(x, Unnormalized) else None
    epsilon = norm.epsilon if norm else None
    description = PatchEmbedDescription(
        projection, height, width, channels, patch, stride, epsilon, input_epsilon
    )

    def run(x, params):
        # Without a norm, the parameters are the layer's own.
        of_layer, of_norm = (params["proj"], norm_arrays(params["norm"])) if norm else (params, {})
        arrays = linear_arrays(projection, of_layer, embed.primitives.weight_bits, "projection_") | of_norm
        if isinstance(x, Unnormalized):
            arrays |= {"input_norm_scale": x.scale, "input_norm_bias": x.bias}
            x = x.x
        return fused_patch_embed(description, arrays, x)

    return description, run


def mean_head(
    head: nn.Module, params: Params, x: Float[Array, "batch rows columns channels"] | Unnormalized
) -> PlannedKernel | None:
    """The kernel of a head: LayerNorm, mean and linear layer; None if the LayerNorm was not left to it."""
    if not isinstance(x, Unnormalized):
        return None
    batch, rows, columns, channels = x.shape
    projection = LinearDescription("dense", channels, head.features, precision=head.primitives.precision)
    description = HeadDescription(projection, rows * columns, x.epsilon)

    def run(x, params):
        arrays = {"norm_scale": x.scale, "norm_bias": x.bias}
        arrays |= linear_arrays(projection, params, head.primitives.weight_bits, "projection_")
        return fused_head(description, arrays, x.x.reshape(batch, rows * columns, channels))

    return description, run


def mixture_kernel(
    layer: nn.Module, tokens: Float[Array, "tokens inputs"]
) -> Callable[[Float[Array, "tokens inputs"], Params], Float[Array, "tokens outputs"]] | None:
    """A function (tokens, params) that calls a mixture of experts as one kernel, on CPUs and GPUs; or None.

    Raises:
      ValueError: TVM asked for where it can't run.
    """
    params, primitives = layer.variables["params"], layer.primitives
    linear = describe_linear("moe", params, tokens.shape[-1], layer.features, primitives)
    reason = float32_only(tokens) or linear.why_not()
    if layer.top_k != 1:
        reason = f"the kernel chooses one expert a token, not {layer.top_k}"
    arrays = tokens, params
    if not uses_tvm("a mixture of experts", layer.implementation, reason, is_packed(params), arrays):
        return None
    alone = layer.clone(parent=None, implementation="xla")

    def kernel(tokens, params):
        return fused_linear(linear, linear_arrays(linear, params, layer.weight_bits), tokens)

    def reference(tokens, params):
        return alone.apply({"params": params}, tokens)

    return with_gradient(layer.implementation, kernel, reference)
