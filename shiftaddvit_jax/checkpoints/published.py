"""Weights by the names that `open_source` takes: others' that are published, and those in the package.

The package's own lie in ``shipped/``, a bundle a folder, whose name is the model's; ``README.md`` there is
the model card.
"""

from pathlib import Path

from shiftaddvit_jax.files import read_object
from shiftaddvit_jax.validation import check_choice

SHIPPED = Path(__file__).with_name("shipped")
# timm 1.0 (`timm.list_pretrained`), and on the Hugging Face Hub what transformers' documentation names.
PUBLISHED = {
    **{f"timm:{name}.in1k": name for name in ("pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2", "pvt_v2_b2_li")},
    **{f"timm:{name}.in1k": name for name in ("pvt_v2_b3", "pvt_v2_b4", "pvt_v2_b5")},
    "timm:vit_tiny_patch16_224.augreg_in21k_ft_in1k": "vit_tiny",
    "timm:vit_tiny_patch16_384.augreg_in21k_ft_in1k": "vit_tiny",
    "timm:vit_small_patch16_224.augreg_in21k_ft_in1k": "vit_small",
    "timm:vit_small_patch16_224.augreg_in1k": "vit_small",
    "timm:vit_small_patch16_384.augreg_in21k_ft_in1k": "vit_small",
    "timm:vit_base_patch16_224.augreg2_in21k_ft_in1k": "vit_base",
    "timm:vit_base_patch16_224.augreg_in21k_ft_in1k": "vit_base",
    "timm:vit_base_patch16_384.augreg_in21k_ft_in1k": "vit_base",
    "timm:deit_tiny_patch16_224.fb_in1k": "deit_tiny",
    "timm:deit_small_patch16_224.fb_in1k": "deit_small",
    "timm:deit_base_patch16_224.fb_in1k": "deit_base",
    "timm:deit_base_patch16_384.fb_in1k": "deit_base",
    "timm:deit_tiny_distilled_patch16_224.fb_in1k": "deit_tiny_distilled",
    "timm:deit_small_distilled_patch16_224.fb_in1k": "deit_small_distilled",
    "timm:deit_base_distilled_patch16_224.fb_in1k": "deit_base_distilled",
    "timm:deit_base_distilled_patch16_384.fb_in1k": "deit_base_distilled",
    "hf:OpenGVLab/pvt_v2_b0": "pvt_v2_b0",
    "hf:OpenGVLab/pvt_v2_b1": "pvt_v2_b1",
    "hf:OpenGVLab/pvt_v2_b2": "pvt_v2_b2",
    "hf:OpenGVLab/pvt_v2_b2_linear": "pvt_v2_b2_li",
    "hf:OpenGVLab/pvt_v2_b3": "pvt_v2_b3",
    "hf:OpenGVLab/pvt_v2_b4": "pvt_v2_b4",
    "hf:OpenGVLab/pvt_v2_b5": "pvt_v2_b5",
    "hf:Xrenya/pvt-tiny-224": "pvt_tiny",
    "hf:Xrenya/pvt-small-224": "pvt_small",
    "hf:Xrenya/pvt-medium-224": "pvt_medium",
    "hf:Xrenya/pvt-large-224": "pvt_large",
    "hf:google/vit-base-patch16-224": "vit_base",
    "hf:google/vit-base-patch16-384": "vit_base",
    "hf:facebook/deit-tiny-distilled-patch16-224": "deit_tiny_distilled",
    "hf:facebook/deit-small-distilled-patch16-224": "deit_small_distilled",
    "hf:facebook/deit-base-distilled-patch16-224": "deit_base_distilled",
}


def list_pretrained(variant: str | None = None) -> list[str]:
    """Names of weights that `open_source` takes, of one variant or of all; the package's own come first.

    The list is of this version; what is published later loads by its name too.

    Raises:
      ValueError: a variant without such weights.
    """
    variants = {
        name: read_object(SHIPPED / name / "config.json")["model"]["name"] for name in shipped_models()
    }
    variants |= PUBLISHED
    if variant is None:
        return list(variants)
    check_choice("variant", variant, dict.fromkeys(variants.values()))
    return [name for name, its_variant in variants.items() if its_variant == variant]


def shipped_models() -> list[str]:
    """Names of the models that come with the package."""
    return sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))
