"""From modules to the TVM kernels that compute them: descriptions, and arrays by the kernels' names."""

from collections.abc import Mapping

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, Float, PyTree

from kernels_tvm.descriptions import HammingLinear, Head, Linear, Mlp, PatchEmbed, SoftmaxAttention
from shiftaddvit_jax.ops import PackedWeight, pack_weight, power_of_two
from shiftaddvit_jax.ops.activations import Activations
from shiftaddvit_jax.ops.custom_call import on_gpu, with_xla_gradient
from shiftaddvit_jax.ops.fused import fused_head
from shiftaddvit_jax.ops.implementation import Implementation, float32_only, uses_tvm
from shiftaddvit_jax.ops.packing import block_weight, check_packed, packed_bits
from shiftaddvit_jax.ops.precision import Precision

Params = Mapping[str, PyTree]


def is_packed(params: Params) -> bool:
    """Whether there are packed weights among the parameters, see `shiftaddvit_jax.pack`."""
    return any(path[-1] in ("codes", "blocks") for path in flatten_dict(params))


def why_no_kernel(x: Array, kinds: tuple[str, ...], weight_bits: int, activations: Activations) -> str | None:
    """Why linear layers of these kinds have no kernel, None if they have one."""
    if x.dtype != jnp.float32:
        return f"its kernels compute in float32, not {x.dtype}"
    if set(kinds) & {"shift", "moe"}:
        if activations == "fixed_point":
            return "there is no kernel for fixed-point activations"
        if weight_bits > 5:
            return f"packed weights have at most 5 bits, not {weight_bits}"
    return None


def runs_on_kernels(
    module: nn.Module, x: Array, implementation: Implementation, train: bool, unsupported: str | None = None
) -> bool:
    """Whether a module leaves all that it does in inference to TVM kernels; if not, its own modules choose.

    ``None`` does for packed parameters. Kernels of whole branches are for CPUs; on a GPU each op has its own.

    Raises:
      ValueError: an unknown implementation, or TVM asked for where it can't run at all.
    """
    if on_gpu() or train or module.is_initializing() or unsupported or float32_only(x):
        return False
    prefer = is_packed(module.variables["params"])
    return uses_tvm(type(module).__name__, implementation, prefer=prefer, arrays=x)


def classify(
    norm: nn.LayerNorm,
    dense: nn.Dense,
    params: Params,
    x: Float[Array, "batch tokens channels"],
    precision: Precision,
) -> Float[Array, "batch classes"]:
    """``dense`` of the mean over the tokens of ``norm(x)`` by its kernel, with the gradient of the modules.

    ``params`` are those of both, ``"norm"`` and ``"dense"``.
    """
    norm_alone, dense_alone = norm.clone(parent=None), dense.clone(parent=None)
    projection = Linear("dense", x.shape[-1], dense.features, precision=precision)
    head = Head(projection, x.shape[1], norm.epsilon)

    def forward(x, params):
        return fused_head(head, head_arrays(head, params["norm"], params["dense"]), x)

    def reference(x, params):
        normalized = norm_alone.apply({"params": params["norm"]}, x)
        return dense_alone.apply({"params": params["dense"]}, jnp.mean(normalized, axis=1))

    return with_xla_gradient(forward, reference)(x, params)


def describe_linear(
    kind: str,
    params: Params,
    inputs: int,
    outputs: int,
    activations: Activations,
    implementation: Implementation,
    precision: Precision,
) -> Linear:
    """The kernel's description of a linear layer.

    Raises:
      ValueError: weights packed with 5 bits, for int8 activations.
    """
    bits = packed_bits(activations)
    shift = {"shift": params, "moe": params.get("shift")}.get(kind)
    if shift is not None and "codes" in shift:
        packed = PackedWeight(shift["codes"], shift["exponent"])
        check_packed(packed, activations)
        bits = packed.bits
    if kind == "dense":
        return Linear(kind, inputs, outputs, precision=precision)
    # What a shift layer has no use for is left alone: one kernel does for both.
    precision = precision if kind == "moe" else "float32"
    return Linear(kind, inputs, outputs, bits, activations, implementation == "tvm_shift", precision)


def linear_arrays(
    linear: Linear, params: Params, weight_bits: int, prefix: str = ""
) -> dict[str, Float[Array, "..."]]:
    """A layer's parameters by the kernel's names; weights that are not packed are packed here."""
    arrays = {}
    if linear.kind == "moe":
        arrays |= {f"router_{name}": value for name, value in params["router"].items()}
    if linear.kind != "shift":
        dense = params["dense"] if linear.kind == "moe" else params
        arrays |= {"blocks": dense_blocks(linear, dense), "bias": _bias(dense, linear)}
    if linear.kind != "dense":
        shift = params["shift"] if linear.kind == "moe" else params
        packed = (
            PackedWeight(shift["codes"], shift["exponent"])
            if "codes" in shift
            else pack_weight(power_of_two(shift["kernel"], weight_bits), linear.bits)
        )
        arrays |= {"codes": packed.codes, "exponent": packed.exponent, "shift_bias": _bias(shift, linear)}
    return {prefix + name: array for name, array in arrays.items()}


def dense_blocks(linear: Linear, params: Params) -> Array:
    """The weights of a dense layer as the kernel takes them, those of bfloat16 as their bits."""
    if "blocks" in params:
        blocks = params["blocks"]
    else:
        blocks = block_weight(params["kernel"].reshape(linear.inputs, linear.outputs))
    if linear.precision == "float32":
        return blocks
    return jax.lax.bitcast_convert_type(blocks.astype(jnp.bfloat16), jnp.uint16)


def _bias(params, linear):
    return params["bias"] if "bias" in params else jnp.zeros(linear.outputs, jnp.float32)


def describe_mlp(
    kind: str,
    params: Params,
    channels: int,
    hidden: int,
    tokens: int,
    grid: tuple[int, int] | None,
    relu: bool,
    epsilon: float,
    activations: Activations,
    implementation: Implementation,
    precision: Precision,
) -> Mlp:
    """The kernel's description of a block's MLP with its LayerNorm; ``params`` are the MLP's."""
    fc1 = describe_linear(kind, params["fc1"], channels, hidden, activations, implementation, precision)
    fc2 = describe_linear(kind, params["fc2"], hidden, channels, activations, implementation, precision)
    return Mlp(fc1, fc2, epsilon, tokens, grid, relu)


def mlp_arrays(mlp: Mlp, norm: Params, params: Params, weight_bits: int) -> dict[str, Array]:
    """The parameters of an MLP and of its LayerNorm by the kernel's names."""
    arrays = {"norm_scale": norm["scale"], "norm_bias": norm["bias"]}
    arrays |= linear_arrays(mlp.fc1, params["fc1"], weight_bits, "fc1_")
    arrays |= linear_arrays(mlp.fc2, params["fc2"], weight_bits, "fc2_")
    if mlp.grid:
        conv = params["dwconv"]
        arrays |= {"conv_kernel": conv["kernel"].reshape(9, -1), "conv_bias": conv["bias"]}
    return arrays


def attention_arrays(
    attention: HammingLinear | SoftmaxAttention, norm: Params, params: Params, weight_bits: int
) -> dict[str, Array]:
    """The parameters of an attention and of its LayerNorm by the kernel's names."""
    return {
        "norm_scale": norm["scale"],
        "norm_bias": norm["bias"],
        **({"value_kernel": params["dconv"]} if "dconv" in params else {}),
        **linear_arrays(attention.qkv, params["qkv"], weight_bits, "qkv_"),
        **linear_arrays(attention.proj, params["proj"], weight_bits, "proj_"),
    }


def head_arrays(head: Head, norm: Params, dense: Params) -> dict[str, Array]:
    """The parameters of a classifier's head by the kernel's names."""
    return {
        "norm_scale": norm["scale"],
        "norm_bias": norm["bias"],
        **linear_arrays(head.projection, dense, 5, "projection_"),
    }


def patch_embed_arrays(
    embed: PatchEmbed, conv: Params, norm: Params, ahead: Params | None = None
) -> dict[str, Array]:
    """The parameters of a patch embedding, and of the LayerNorm ahead of it if any, by the kernel's names."""
    return {
        **({"ahead_scale": ahead["scale"], "ahead_bias": ahead["bias"]} if ahead else {}),
        "projection_blocks": dense_blocks(embed.projection, conv),
        "projection_bias": conv["bias"],
        "norm_scale": norm["scale"],
        "norm_bias": norm["bias"],
    }
