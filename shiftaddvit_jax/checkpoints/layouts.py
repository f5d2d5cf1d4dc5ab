"""How others name the tensors of these models: one table for each source and family.

A table maps our names to theirs, as in ``{"stage{S}/block{B}/attn/kv": ("...key", "...value")}``. {S} and {B}
count stages and blocks from 1, {s} and {b} from 0. If several of their modules are one of ours, our outputs
are theirs, one module after the other. Our ``kernel`` or ``scale`` is PyTorch's ``weight``, our ``bias`` its
``bias``; Flax's are named as ours.
"""

import re
from collections.abc import Mapping
from typing import NamedTuple

import flax.linen as nn
import numpy as np

from shiftaddvit_jax.models import PyramidVisionTransformer, PyramidVisionTransformerV2, VisionTransformer

Names = Mapping[str, str | tuple[str, ...]]

# PyTorch's names for Flax's.
_LEAVES = {"kernel": "weight", "scale": "weight", "bias": "bias"}


class Layout(NamedTuple):
    """One source's names for one family.

    Attributes:
      source: who uses these names, for messages.
      model: the family.
      marker: a tensor that only checkpoints of this layout have.
      names: the table.
      flax: whether their arrays are Flax's, as ours are, or PyTorch's.
    """

    source: str
    model: type[nn.Module]
    marker: str
    names: Names
    flax: bool = False

    def modules(self, module: str) -> tuple[str, ...]:
        """Their names for our module or lone parameter ``module``; none if the table lacks it."""
        for ours, theirs in self.names.items():
            pattern = re.escape(ours).replace(r"\{S\}", r"(?P<S>\d+)").replace(r"\{B\}", r"(?P<B>\d+)")
            found = re.fullmatch(pattern, module)
            if found:
                counts = {name: int(count) for name, count in found.groupdict().items()}
                counts |= {name.lower(): count - 1 for name, count in counts.items()}
                theirs = (theirs,) if isinstance(theirs, str) else theirs
                return tuple(name.format(**counts) for name in theirs)
        return ()

    def tensors(self, name: str) -> tuple[str, ...]:
        """Their names for our parameter ``name``, ``module/.../leaf``; none if the table lacks it."""
        module, _, leaf = name.rpartition("/")
        if leaf not in _LEAVES:
            return self.modules(name)
        suffix = f"/{leaf}" if self.flax else f".{_LEAVES[leaf]}"
        return tuple(f"{theirs}{suffix}" for theirs in self.modules(module))


def export_parameter(name: str, value: np.ndarray, layout: Layout) -> dict[str, np.ndarray]:
    """Our parameter as ``layout``'s tensors, by their names; none if the layout lacks it."""
    names = layout.tensors(name)
    leaf = name.rpartition("/")[2]
    if leaf == "kernel" and not layout.flax:
        if value.ndim == 3:  # depthwise [height, width, channels]
            value = value[:, :, None]
        value = np.transpose(value, (*range(value.ndim - 1, value.ndim - 3, -1), *range(value.ndim - 2)))
    elif leaf in ("pos_embed", "cls_token", "dist_token"):
        value = value.reshape(1, -1, value.shape[-1])
    axis = -1 if layout.flax else 0
    return dict(zip(names, np.split(value, len(names), axis), strict=True)) if names else {}


def import_parameter(
    name: str, shape: tuple[int, ...], tensors: list[np.ndarray], layout: Layout
) -> np.ndarray:
    """The inverse of `export_parameter`: our parameter of this shape from their ``tensors``, in order."""
    value = np.concatenate(tensors, axis=-1 if layout.flax else 0)
    if name.endswith("/kernel") and not layout.flax:
        value = np.transpose(value, (*range(2, value.ndim), 1, 0))
    return value.reshape(shape)


def within(ours: str, theirs: str, names: Names, separator: str = ".") -> Names:
    """``names`` inside our module ``ours`` and their module ``theirs``."""
    return {
        f"{ours}/{name}": tuple(
            f"{theirs}{separator}{other}" for other in ((others,) if isinstance(others, str) else others)
        )
        for name, others in names.items()
    }


_TRANSFORMERS_VIT_BLOCK = {
    "norm1": "layernorm_before",
    "attn/qkv": tuple(f"attention.attention.{part}" for part in ("query", "key", "value")),
    "attn/proj": "attention.output.dense",
    "norm2": "layernorm_after",
    "mlp/fc1": "intermediate.dense",
    "mlp/fc2": "output.dense",
}
# What they have been called since transformers 5 until `save_pretrained` gives them their old names.
_TRANSFORMERS_VIT_BLOCK_5 = {
    "norm1": "layernorm_before",
    "attn/qkv": tuple(f"attention.{part}_proj" for part in "qkv"),
    "attn/proj": "attention.o_proj",
    "norm2": "layernorm_after",
    "mlp/fc1": "mlp.fc1",
    "mlp/fc2": "mlp.fc2",
}


def _transformers_vit(source: str, prefix: str, blocks: str, block: Names, **heads: str) -> Layout:
    names = {
        "cls_token": f"{prefix}.embeddings.cls_token",
        "pos_embed": f"{prefix}.embeddings.position_embeddings",
        "patch_embed": f"{prefix}.embeddings.patch_embeddings.projection",
        **within("block{B}", f"{prefix}.{blocks}.{{b}}", block),
        "norm": f"{prefix}.layernorm",
        **heads,
    }
    query = block["attn/qkv"][0]
    return Layout(source, VisionTransformer, f"{prefix}.{blocks}.0.{query}.weight", names)


_DEIT_HEADS = {
    "dist_token": "deit.embeddings.distillation_token",
    "head": "cls_classifier",
    "head_dist": "distillation_classifier",
}

_TRANSFORMERS_PVT_BLOCK = {
    "norm1": "layer_norm_1",
    "attn/q": "attention.self.query",
    "attn/kv": ("attention.self.key", "attention.self.value"),
    "attn/qkv": ("attention.self.query", "attention.self.key", "attention.self.value"),
    "attn/sr": "attention.self.sequence_reduction",
    "attn/norm": "attention.self.layer_norm",
    "attn/proj": "attention.output.dense",
    "norm2": "layer_norm_2",
    "mlp/fc1": "mlp.dense1",
    "mlp/fc2": "mlp.dense2",
}
_TRANSFORMERS_PVT = {
    **within(
        "stage{S}",
        "pvt.encoder.patch_embeddings.{s}",
        {
            "patch_embed/proj": "projection",
            "patch_embed/norm": "layer_norm",
            "pos_embed": "position_embeddings",
            "cls_token": "cls_token",
        },
    ),
    **within("stage{S}/block{B}", "pvt.encoder.block.{s}.{b}", _TRANSFORMERS_PVT_BLOCK),
    "norm": "pvt.encoder.layer_norm",
    "head": "classifier",
}

_TRANSFORMERS_PVT_V2_BLOCK = {
    "norm1": "layer_norm_1",
    "attn/q": "attention.query",
    "attn/kv": ("attention.key", "attention.value"),
    "attn/qkv": ("attention.query", "attention.key", "attention.value"),
    "attn/sr": "attention.spatial_reduction",
    "attn/norm": "attention.layer_norm",
    "attn/proj": "attention.proj",
    "norm2": "layer_norm_2",
    "mlp/fc1": "mlp.dense1",
    "mlp/dwconv": "mlp.dwconv.dwconv",
    "mlp/fc2": "mlp.dense2",
}
_TRANSFORMERS_PVT_V2 = {
    **within(
        "stage{S}",
        "pvt_v2.encoder.layers.{s}",
        {
            "patch_embed/proj": "patch_embedding.proj",
            "patch_embed/norm": "patch_embedding.layer_norm",
            "norm": "layer_norm",
        },
    ),
    **within("stage{S}/block{B}", "pvt_v2.encoder.layers.{s}.blocks.{b}", _TRANSFORMERS_PVT_V2_BLOCK),
    "head": "classifier",
}

# The authors of PVT and of DeiT, and timm after them, have these names in common.
_BLOCK = {
    name: name.replace("/", ".")
    for name in ("norm1", "attn/q", "attn/kv", "attn/qkv", "attn/sr", "attn/norm", "attn/proj", "norm2")
} | {"mlp/fc1": "mlp.fc1", "mlp/fc2": "mlp.fc2"}

_AUTHORS_PVT = {
    "stage{S}/patch_embed/proj": "patch_embed{S}.proj",
    "stage{S}/patch_embed/norm": "patch_embed{S}.norm",
    "stage{S}/pos_embed": "pos_embed{S}",
    "stage{S}/cls_token": "cls_token",
    **within("stage{S}/block{B}", "block{S}.{b}", _BLOCK),
    "norm": "norm",
    "head": "head",
}
_AUTHORS_PVT_V2 = {
    "stage{S}/patch_embed/proj": "patch_embed{S}.proj",
    "stage{S}/patch_embed/norm": "patch_embed{S}.norm",
    **within("stage{S}/block{B}", "block{S}.{b}", _BLOCK | {"mlp/dwconv": "mlp.dwconv.dwconv"}),
    "stage{S}/norm": "norm{S}",
    "head": "head",
}
_TIMM_PVT_V2 = {
    "stage1/patch_embed/proj": "patch_embed.proj",
    "stage1/patch_embed/norm": "patch_embed.norm",
    "stage{S}/patch_embed/proj": "stages.{s}.downsample.proj",
    "stage{S}/patch_embed/norm": "stages.{s}.downsample.norm",
    **within("stage{S}/block{B}", "stages.{s}.blocks.{b}", _BLOCK | {"mlp/dwconv": "mlp.dwconv"}),
    "stage{S}/norm": "stages.{s}.norm",
    "head": "head",
}
_TIMM_VIT = {
    "cls_token": "cls_token",
    "dist_token": "dist_token",
    "pos_embed": "pos_embed",
    "patch_embed": "patch_embed.proj",
    **within("block{B}", "blocks.{b}", _BLOCK),
    "norm": "norm",
    "head": "head",
    "head_dist": "head_dist",
}

# The first JAX code of ViT (https://github.com/google-research/vision_transformer), whose modules of a block
# share one count.
_GOOGLE_VIT_BLOCK = {
    "norm1": "LayerNorm_0",
    "attn/qkv": tuple(f"MultiHeadDotProductAttention_1/{part}" for part in ("query", "key", "value")),
    "attn/proj": "MultiHeadDotProductAttention_1/out",
    "norm2": "LayerNorm_2",
    "mlp/fc1": "MlpBlock_3/Dense_0",
    "mlp/fc2": "MlpBlock_3/Dense_1",
}
_GOOGLE_VIT = {
    "cls_token": "cls",
    "pos_embed": "Transformer/posembed_input/pos_embedding",
    "patch_embed": "embedding",
    **within("block{B}", "Transformer/encoderblock_{b}", _GOOGLE_VIT_BLOCK, "/"),
    "norm": "Transformer/encoder_norm",
    "head": "head",
}

TRANSFORMERS = (
    _transformers_vit("transformers", "vit", "encoder.layer", _TRANSFORMERS_VIT_BLOCK, head="classifier"),
    _transformers_vit("transformers", "deit", "encoder.layer", _TRANSFORMERS_VIT_BLOCK, **_DEIT_HEADS),
    Layout(
        "transformers",
        PyramidVisionTransformer,
        "pvt.encoder.patch_embeddings.0.projection.weight",
        _TRANSFORMERS_PVT,
    ),
    Layout(
        "transformers",
        PyramidVisionTransformerV2,
        "pvt_v2.encoder.layers.0.patch_embedding.proj.weight",
        _TRANSFORMERS_PVT_V2,
    ),
)
# What `torch.save(model.state_dict())` writes.
_IN_MEMORY = "transformers 5, in memory"
TRANSFORMERS_IN_MEMORY = (
    _transformers_vit(_IN_MEMORY, "vit", "layers", _TRANSFORMERS_VIT_BLOCK_5, head="classifier"),
    _transformers_vit(_IN_MEMORY, "deit", "layers", _TRANSFORMERS_VIT_BLOCK_5, **_DEIT_HEADS),
)
LAYOUTS = (
    *TRANSFORMERS,
    *TRANSFORMERS_IN_MEMORY,
    Layout("timm or the authors", VisionTransformer, "blocks.0.attn.qkv.weight", _TIMM_VIT),
    Layout("timm", PyramidVisionTransformerV2, "stages.0.blocks.0.attn.kv.weight", _TIMM_PVT_V2),
    Layout("the authors", PyramidVisionTransformer, "pos_embed1", _AUTHORS_PVT),
    Layout("the authors", PyramidVisionTransformerV2, "block1.0.mlp.dwconv.dwconv.weight", _AUTHORS_PVT_V2),
    Layout(
        "Google", VisionTransformer, "Transformer/encoderblock_0/LayerNorm_0/scale", _GOOGLE_VIT, flax=True
    ),
)
