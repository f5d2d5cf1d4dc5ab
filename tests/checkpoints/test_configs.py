"""What configs say of published models, and that the table of published weights agrees with it."""

import re

import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax.checkpoints.configs import describe_timm, describe_transformers, imagenet_classes
from shiftaddvit_jax.checkpoints.published import PUBLISHED

# Fields of the configs on the Hub, where they are not the defaults of transformers.
B1 = {"model_type": "pvt_v2", "hidden_sizes": [64, 128, 320, 512]}
TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}


@pytest.mark.parametrize(
    ("config", "variant", "epsilon"),
    [
        ({"model_type": "pvt_v2"}, "pvt_v2_b0", 1e-6),
        (B1, "pvt_v2_b1", 1e-6),
        (B1 | {"depths": [3, 4, 6, 3]}, "pvt_v2_b2", 1e-6),
        (B1 | {"depths": [3, 4, 6, 3], "linear_attention": True, "sr_ratios": [1] * 4}, "pvt_v2_b2_li", 1e-6),
        (B1 | {"depths": [3, 6, 40, 3], "mlp_ratios": [4, 4, 4, 4]}, "pvt_v2_b5", 1e-6),
        ({"model_type": "pvt"}, "pvt_tiny", 1e-6),
        ({"model_type": "pvt", "depths": [3, 4, 18, 3], "layer_norm_eps": 1e-5}, "pvt_medium", 1e-5),
        ({"model_type": "vit", "patch_size": [16, 16]}, "vit_base", 1e-12),
        ({"model_type": "vit", **TINY}, "vit_tiny", 1e-12),
        ({"model_type": "deit", **TINY}, "deit_tiny_distilled", 1e-12),
    ],
)
def test_the_variant_is_the_one_whose_sizes_the_config_has(config, variant, epsilon):
    described = describe_transformers(config, "config.json")
    assert described.arguments == {"name": variant, "layer_norm_eps": epsilon}
    assert described.image_size == (224, 224)
    sav.create_model(**described.arguments)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"strides": [2, 2, 2, 2]}, "strides is 2 2 2 2, and this architecture has 4 2 2 2 there"),
        (
            {"num_attention_heads": [1, 1, 1, 1]},
            "num_attention_heads is 1 1 1 1, and .*, has 1 2 5 8",
        ),
        ({"depths": [2, 2, 2, 3]}, "depths is 2 2 2 3"),
        ({"num_channels": 1}, "num_channels is 1"),
        ({"image_size": "large"}, "image_size must be one or two whole numbers"),
    ],
)
def test_what_is_not_ours_is_refused_by_its_field(fields, message):
    with pytest.raises(ValueError, match=message):
        describe_transformers({"model_type": "pvt_v2", **fields}, "config.json")


def test_positions_may_be_of_an_image_that_is_no_square():
    config = {"model_type": "vit", "image_size": [128, 512]}
    assert describe_transformers(config, "config.json").image_size == (128, 512)


def test_imagenet_has_a_thousand_different_names():
    names = imagenet_classes()
    assert len(set(names)) == len(names) == 1000
    assert names[0].startswith("tench")
    assert names[999].startswith("toilet tissue")
    assert (names[134], names[517]) == ("crane (bird)", "crane (machine)")


@pytest.mark.parametrize("name", [name for name in PUBLISHED if name.startswith("timm:")])
def test_timms_published_weights_are_of_the_variants_in_the_table(name):
    architecture = re.fullmatch(r"timm:(\w+)\.\w+", name)[1]
    described = describe_timm({"architecture": architecture, "num_classes": 1000}, "config.json")
    assert described.arguments == {"name": PUBLISHED[name]}
    assert described.class_names == imagenet_classes()


def test_published_weights_are_listed_by_variant():
    assert sav.list_pretrained("pvt_tiny") == ["hf:Xrenya/pvt-tiny-224"]
    assert set(PUBLISHED.values()) <= set(sav.list_models())
    with pytest.raises(ValueError, match="unknown variant 'pvt_v2_b'; did you mean"):
        sav.list_pretrained("pvt_v2_b")
