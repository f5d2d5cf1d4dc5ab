"""Which architecture weights are for: what the names and shapes of tensors say that these models lack."""

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import flax.linen as nn
import numpy as np

from shiftaddvit_jax.checkpoints.layouts import Layout
from shiftaddvit_jax.checkpoints.weights import printable
from shiftaddvit_jax.models import VisionTransformer

# Parts of names, and what only they mean. The first that is found is told.
_FEATURES = {
    r"\.ls\d\.gamma$|\.gamma_\d$|\.lambda_?\d$|layer_scale": "LayerScale, as DeiT-III, CaiT, BEiT and DINOv2",
    r"(^|\.)fc_norm\.": "a norm after pooling, as timm's global_pool='avg'",
    r"(^|[./])pre_logits[./]": "a pre_logits layer before the head, as the first ViTs for ImageNet-21k",
    r"(^|\.)(reg_token|register_tokens?)s?$": "register tokens, as DINOv2 with registers",
    r"(^|\.)(norm_pre|ln_pre|pre_layrnorm)\.": "a norm before the blocks, as CLIP",
    r"\.mlp\.(fc1_[gx]|w[123]|w12|norm|weights_(in|out))\.|\.swiglu": "a gated MLP, as SwiGLU",
    r"(^|\.)(rope|rotary\w*)\.|(^|\.)freqs(_cis)?$|\.inv_freq$": "rotary position embeddings",
    r"\.attn\.[qk]_norm\.|\.attention\.[qk]_norm\.": "normalized queries and keys",
    r"relative_position|rel_pos": "relative positions, as BEiT and Swin",
    r"\.attn\.(q_proj|k_proj|v_proj)\.": "separate projections of queries, keys and values, as EVA",
    r"\.attn\.[qv]_bias$": "biases of queries and values alone, as BEiT",
    r"(^|\.)detection_tokens$": "detection tokens, as YOLOS",
    r"(^|\.)attn_pool\.|(^|/)MAPHead_\d": "pooling by attention, as SigLIP",
    r"(^|\.)patch_embed\.(backbone|proj\.\d)|(^|/)conv_root/": "a convolutional stem, as hybrid ViTs",
    r"/encoderblock(_0/MlpBlock_0)?/|^((params|img)/)*pos_embedding$": "the parts of big_vision's ViTs",
}


def foreign_feature(names: Iterable[str]) -> str | None:
    """What models of another architecture have, with a tensor that says so; ``None`` if nothing is known."""
    names = list(names)
    for pattern, what in _FEATURES.items():
        for name in names:
            if re.search(pattern, name):
                return f"{what} ({printable(name)})"
    return None


def check_architecture(
    tensors: Mapping[str, np.ndarray],
    expected: Mapping[str, tuple[int, ...]],
    model: nn.Module,
    layout: Layout,
    file: Path,
) -> None:
    """Raise a ``ValueError`` of what sets the architecture that ``tensors`` are for apart from ``model``'s.

    Args:
      tensors: by ``layout``'s names.
      expected: the shapes of the tensors that ``model`` needs.
      model: from `create_model`.
      layout: whose names they are.
      file: where they come from.
    """
    foreign = foreign_feature(name for name in tensors if name not in expected)
    if foreign:
        raise ValueError(
            f"{file} has {foreign}: not the architecture of {model.variant}, which has none; load weights "
            "without it"
        )
    biases = [
        name for name in expected if re.search(r"(qkv|query|key|q_proj|attn\.q|attn\.kv)[./]bias$", name)
    ]
    if biases and not any(name in tensors for name in biases):
        raise ValueError(
            f"{file} has no biases of queries, keys and values ({biases[0]}), as timm's qkv_bias=False: not "
            f"the architecture of {model.variant}; load weights with them"
        )
    if isinstance(model, VisionTransformer):
        _check_distillation(tensors, model, layout, file)
        for module, what in (("cls_token", "class token"), ("pos_embed", "position embeddings")):
            (name,) = layout.tensors(module)
            if name not in tensors:
                raise ValueError(
                    f"{file} has no {what} ({name}): not the architecture of {model.variant}; load weights "
                    "with it"
                )
    _check_patches(tensors, model, layout, expected, file)


def _check_distillation(tensors, model, layout, file):
    distilled = any(name in tensors for name in layout.tensors("dist_token"))
    if distilled == model.distilled:
        return
    size = model.variant.split("_")[1]
    if model.distilled:
        found, other = "no distillation token, but {} has one", f"deit_{size}"
    else:
        found, other = "a distillation token, but {} has none", f"deit_{size}_distilled"
    raise ValueError(f"{file} has {found.format(model.variant)}; create_model({other!r}, ...) instead")


def _check_patches(tensors, model, layout, expected, file):
    module = "patch_embed" if isinstance(model, VisionTransformer) else "stage1/patch_embed/proj"
    (name,) = layout.tensors(f"{module}/kernel")
    if name not in tensors or tensors[name].ndim != 4:
        return
    # [height, width, channels, features] or [features, channels, height, width]
    channels, sides = (2, slice(2)) if layout.flax else (1, slice(2, 4))
    found, wanted = tensors[name].shape, expected[name]
    if found[channels] != wanted[channels]:
        count = f"{found[channels]} channel{'s' if found[channels] != 1 else ''}"
        raise ValueError(
            f"{file} is for images of {count} ({name} has shape {found}), but {model.variant} for "
            f"{wanted[channels]}; load weights for RGB images"
        )
    if found[sides] != wanted[sides]:
        patch, ours = (" x ".join(map(str, shape[sides])) for shape in (found, wanted))
        raise ValueError(
            f"{file} has patches of {patch} pixels ({name} has shape {found}), but {model.variant} of "
            f"{ours}; load weights for those"
        )
