"""Tensors of others that are nearly ours: under a prefix, without a head, for another grid, or with more."""

import logging
import re

import jax
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors.numpy import save_file

import shiftaddvit_jax as sav
from shiftaddvit_jax.checkpoints.layouts import LAYOUTS, export_parameter
from shiftaddvit_jax.models.variables import variable_shapes

CLASSES = 3
VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2}
PYRAMID = {"embed_dims": (8, 8, 8, 8), "depths": (1, 1, 1, 1), "num_heads": (1, 1, 1, 1)} | {
    "mlp_ratios": (1, 1, 1, 1)
}
HF_VIT = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}


def make(name, **changes):
    """A small model of the variant ``name``, and variables of random numbers."""
    size = changes.pop("image_size", 32)
    sizes = PYRAMID if name.startswith("pvt") else VIT
    model = sav.create_model(name, num_classes=CLASSES, image_size=size).clone(**sizes, **changes)
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f4"), variable_shapes(model))


def export(variables, source, kind):
    """The variables as ``source``'s tensors."""
    # Of transformers' two for `VisionTransformer`, ViT's comes before DeiT's.
    layout = next(it for it in LAYOUTS if it.source == source and it.model is kind)
    tensors = {}
    for name, value in flatten_dict(variables["params"], sep="/").items():
        tensors |= export_parameter(name, np.asarray(value), layout)
    return {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}


@pytest.fixture(scope="module")
def vit():
    """A DeiT, its variables, and they as timm's tensors."""
    model, variables = make("deit_tiny")
    return model, variables, export(variables, "timm or the authors", type(model))


@pytest.fixture
def load(tmp_path):
    """``load(model, tensors, ...)``: variables from a file of these tensors."""

    def write_and_load(model, tensors, **arguments):
        save_file(
            {name: np.ascontiguousarray(it) for name, it in tensors.items()}, tmp_path / "file.safetensors"
        )
        return sav.load_pretrained(model, tmp_path / "file.safetensors", **arguments)

    return write_and_load


@pytest.fixture
def refused(load):
    """``refused(message, model, tensors, ...)``: the error of one line that says ``message``."""

    def check(message, *arguments, **keywords):
        with pytest.raises(ValueError, match=message) as caught:
            load(*arguments, **keywords)
        assert str(caught.value).isprintable()

    return check


def assert_equal(found, expected):
    jax.tree.map(np.testing.assert_array_equal, found, expected)


def with_prefix(prefix, tensors):
    return {prefix + name: tensor for name, tensor in tensors.items()}


# Prefixes.


@pytest.mark.parametrize(
    "prefix",
    [
        "module.",
        "model.",
        "backbone.",
        "encoder.",
        "_orig_mod.",
        "module._orig_mod.",
        "student.backbone.",
        "vit.",
    ],
)
def test_a_prefix_of_all_names_is_left_out(vit, load, prefix):
    model, variables, tensors = vit
    assert_equal(load(model, with_prefix(prefix, tensors)), variables)


def test_a_prefix_may_leave_out_the_head(vit, load):
    model, variables, tensors = vit
    mixed = {name if name.startswith("head") else f"backbone.{name}": it for name, it in tensors.items()}
    assert_equal(load(model, mixed), variables)


def test_a_prefix_is_left_out_of_every_layout(load):
    for name, source in (("pvt_tiny", "transformers"), ("pvt_v2_b0", "timm"), ("pvt_v2_b0", "the authors")):
        model, variables = make(name)
        tensors = export(variables, source, type(model))
        assert_equal(load(model, with_prefix("module.", tensors)), variables)


def test_two_prefixes_that_fit_are_refused_until_one_is_named(vit, load, refused):
    model, variables, tensors = vit
    other = {name: 2 * tensor for name, tensor in tensors.items()}
    both = with_prefix("teacher.backbone.", other) | with_prefix("student.backbone.", tensors)
    refused(r"holds 2 models, student.backbone.\* and teacher.backbone.\*; name one: .*entry='", model, both)
    assert_equal(load(model, both, entry="student"), variables)
    assert_equal(load(model, both, entry="student.backbone"), variables)
    refused(r"holds 2 models, \* and ema.\*.*entry='ema'", model, tensors | with_prefix("ema.", tensors))


def test_a_tensor_with_and_without_the_prefix_is_refused(vit, refused):
    model, _, tensors = vit
    twice = with_prefix("module.", tensors) | {"head.bias": tensors["head.bias"]}
    refused(r"has head.bias with and without module.; keep one", model, twice)


def test_stages_of_other_models_are_no_prefix(vit, refused):
    model, _, tensors = vit
    refused("is no PVT, PVTv2, ViT or DeiT classifier", model, with_prefix("layers.0.", tensors))


# Heads.


def test_a_head_that_is_lacking_is_drawn_anew(vit, load, refused, caplog):
    model, variables, tensors = vit
    headless = {name: tensor for name, tensor in tensors.items() if not name.startswith("head")}
    found = load(model, headless)
    assert "has no head: head/bias, head/kernel drawn anew" in caplog.text
    assert float(np.std(found["params"].pop("head")["kernel"])) > 0
    assert_equal(found, {"params": {k: v for k, v in variables["params"].items() if k != "head"}})
    refused("2 tensors of .*: head.(bias|weight) is missing", model, headless, strict=True)


def test_a_head_of_another_name_is_told(vit, refused):
    model, _, tensors = vit
    other = {name.replace("head.", "fc."): tensor for name, tensor in tensors.items()}
    refused(r"head.bias is missing; head.weight is missing; fc.bias is unexpected", model, other)
    refused(
        r"1 tensors of .*: fc.weight is unexpected", model, {**tensors, "fc.weight": np.zeros((2, 2), "f4")}
    )


def test_half_a_head_is_told(vit, refused):
    model, _, tensors = vit
    refused("head.bias is missing", model, {k: v for k, v in tensors.items() if k != "head.bias"})
    refused(r"head.bias has shape \(1,\)", model, {**tensors, "head.bias": np.zeros(1, np.float32)})


BARE = {
    "vit_tiny": (transformers.ViTModel, transformers.ViTConfig, transformers.ViTForImageClassification),
    "deit_tiny_distilled": (
        transformers.DeiTModel,
        transformers.DeiTConfig,
        transformers.DeiTForImageClassificationWithTeacher,
    ),
    "pvt_tiny": (transformers.PvtModel, transformers.PvtConfig, transformers.PvtForImageClassification),
    "pvt_v2_b0": (
        transformers.PvtV2Model,
        transformers.PvtV2Config,
        transformers.PvtV2ForImageClassification,
    ),
}


@pytest.mark.parametrize("name", BARE)
def test_transformers_models_are_read_without_a_head_and_as_they_are_in_memory(tmp_path, name, caplog):
    model, _ = make(name)
    bare, config, whole = BARE[name]
    sizes = {
        "hidden_sizes": [8] * 4,
        "depths": [1] * 4,
        "num_attention_heads": [1] * 4,
        "mlp_ratios": [1] * 4,
    }
    config = config(**(sizes if name.startswith("pvt") else HF_VIT), image_size=32, num_labels=CLASSES)
    original = bare(config)
    original.save_pretrained(tmp_path / "bare")
    complete = whole(config)
    names = complete.base_model.state_dict().keys()
    complete.base_model.load_state_dict({k: v for k, v in original.state_dict().items() if k in names})
    complete.save_pretrained(tmp_path / "whole")
    found = sav.load_pretrained(model, tmp_path / "bare")["params"]
    torch.save(original.state_dict(), tmp_path / "state.pth")
    in_memory = sav.load_pretrained(model, tmp_path / "state.pth")["params"]
    assert_equal(in_memory, found)
    torch.save(complete.state_dict(), tmp_path / "state.pth")
    in_memory = sav.load_pretrained(model, tmp_path / "state.pth")
    assert_equal(in_memory, sav.load_pretrained(model, tmp_path / "whole"))
    expected = sav.load_pretrained(model, tmp_path / "whole")["params"]
    assert "has no head" in caplog.text
    assert_equal(*({k: v for k, v in params.items() if "head" not in k} for params in (found, expected)))


def test_a_pooler_beside_a_head_is_told(load, refused):
    model, variables = make("vit_tiny")
    tensors = export(variables, "transformers", type(model))
    assert_equal(load(model, tensors), variables)
    pooler = {"vit.pooler.dense.weight": np.zeros((16, 16), np.float32)}
    refused("vit.pooler.dense.weight is unexpected", model, tensors | pooler)


# Position embeddings.


def test_the_grid_of_position_embeddings_can_be_given(vit, load, refused):
    model, _, tensors = vit
    wide = np.random.default_rng(0).normal(size=(1, 1 + 2 * 8, 16)).astype(np.float32)
    found = load(model, tensors | {"pos_embed": wide}, trained_size=(32, 128))["params"]["pos_embed"]
    grid = torch.from_numpy(wide[:, 1:].reshape(1, 2, 8, 16)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(2, 2), mode="bicubic")
    np.testing.assert_array_equal(found[0], wide[0, 0])
    np.testing.assert_allclose(found[1:].T, expected.reshape(16, 4).numpy(), atol=1e-5)
    square = load(model, tensors | {"pos_embed": wide})["params"]["pos_embed"]
    assert not np.allclose(found, square, atol=0.1)
    message = (
        r"pos_embed of .* is for 17 tokens, and 32 x 64 pixels has 8 and 1 before them; check trained_size"
    )
    refused(message, model, tensors | {"pos_embed": wide}, trained_size=(32, 64))
    refused(r"trained_size must be \(height, width\)", model, tensors, trained_size=(32, 0))


def test_position_embeddings_of_no_square_ask_for_their_size(vit, refused):
    model, _, tensors = vit
    other = np.zeros((1, 1 + 2 * 3, 16), np.float32)
    refused(r"pos_embed of .* is for 7 tokens.*trained_size=\(H, W\)", model, tensors | {"pos_embed": other})


def test_position_embeddings_without_the_class_token_are_told(vit, refused):
    model, _, tensors = vit
    message = "leave out the class token are of another architecture"
    refused(message, model, tensors | {"pos_embed": tensors["pos_embed"][:, 1:]})
    refused(message, model, tensors | {"pos_embed": tensors["pos_embed"][:, 1:]}, trained_size=(32, 32))


def test_the_grid_of_every_stage_of_pvt_follows_from_the_size(load, refused):
    model, variables = make("pvt_tiny", image_size=64)
    tensors = export(variables, "the authors", type(model))
    rng = np.random.default_rng(0)
    for stage in range(1, 5):
        pixels, first = 2 ** (stage + 1), int(stage == 4)
        shape = (1, first + (32 // pixels) * (128 // pixels), 8)
        tensors[f"pos_embed{stage}"] = rng.normal(size=shape).astype(np.float32)
    found = load(model, tensors, trained_size=(32, 128))["params"]
    grid = torch.from_numpy(tensors["pos_embed2"].reshape(1, 4, 16, 8)).permute(0, 3, 1, 2)
    expected = torch.nn.functional.interpolate(grid, size=(8, 8), mode="bilinear").reshape(8, 64)
    np.testing.assert_allclose(found["stage2"]["pos_embed"].T, expected.numpy(), atol=1e-6)
    # 32 x 128 pixels have as many tokens as 64 x 64, at every stage.
    square = load(model, tensors)["params"]["stage2"]["pos_embed"]
    np.testing.assert_array_equal(square, tensors["pos_embed2"][0])


# Other architectures.


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ("blocks.0.ls1.gamma", "LayerScale, as DeiT-III.*(blocks.0.ls1.gamma)"),
        ("blocks.1.gamma_1", "LayerScale"),
        ("fc_norm.weight", "a norm after pooling"),
        ("pre_logits.fc.weight", "a pre_logits layer"),
        ("reg_token", "register tokens"),
        ("register_tokens", "register tokens"),
        ("norm_pre.weight", "a norm before the blocks"),
        ("blocks.0.mlp.w12.weight", "a gated MLP, as SwiGLU"),
        ("blocks.0.mlp.fc1_g.weight", "a gated MLP, as SwiGLU"),
        ("rope.freqs", "rotary position embeddings"),
        ("blocks.0.attn.q_norm.weight", "normalized queries and keys"),
        ("blocks.0.attn.relative_position_bias_table", "relative positions"),
        ("attn_pool.q.weight", "pooling by attention"),
        ("patch_embed.backbone.conv1.weight", "a convolutional stem"),
    ],
)
def test_parts_that_the_architecture_lacks_are_named(vit, refused, extra, message):
    model, _, tensors = vit
    message = f"{message}.*not the architecture of deit_tiny"
    refused(message, model, with_prefix("module.", tensors | {extra: np.zeros(16, np.float32)}))


def test_a_model_of_another_kind_is_told_by_what_it_has(vit, refused):
    model, _, _ = vit
    tensors = {"blocks.0.attn.q_proj.weight": np.zeros(1, np.float32), "rope.freqs": np.zeros(1, np.float32)}
    refused("is no PVT, .*: it has rotary position embeddings", model, tensors)


@pytest.mark.parametrize(
    ("name", "what"), [("cls_token", "class token"), ("pos_embed", "position embeddings")]
)
def test_tokens_that_are_lacking_are_told(vit, refused, name, what):
    model, _, tensors = vit
    message = rf"has no {what} \({name}\): not the architecture of deit_tiny"
    refused(message, model, {key: tensor for key, tensor in tensors.items() if key != name})


def test_biases_that_are_lacking_are_told(vit, refused):
    model, _, tensors = vit
    without = {name: tensor for name, tensor in tensors.items() if not name.endswith("qkv.bias")}
    refused("has no biases of queries, keys and values .*qkv_bias=False", model, without)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_channels_are_told(vit, refused, channels):
    model, _, tensors = vit
    kernel = np.zeros((16, channels, 16, 16), np.float32)
    message = (
        rf"is for images of {channels} channels? \(patch_embed.proj.weight has shape .* but deit_tiny for 3"
    )
    refused(message, model, tensors | {"patch_embed.proj.weight": kernel})


def test_other_patches_are_told(vit, refused):
    model, _, tensors = vit
    kernel = np.zeros((16, 3, 32, 32), np.float32)
    message = r"has patches of 32 x 32 pixels .*, but deit_tiny of 16 x 16"
    refused(message, model, tensors | {"patch_embed.proj.weight": kernel})


def test_integers_for_weights_are_told_and_their_scales_are_not_guessed(vit, refused):
    model, _, tensors = vit
    for name in ("blocks.0.attn.qkv.weight", "pos_embed"):
        message = rf"{re.escape(name)} of .* has dtype int8; expected floating point"
        refused(message, model, tensors | {name: tensors[name].astype(np.int8)})
    refused("bn.num_batches_tracked is unexpected", model, tensors | {"bn.num_batches_tracked": np.int64(1)})


# Google's .npz.


def google(variables, prefix=""):
    """``variables`` as the first JAX code of ViT saved them, by NumPy alone."""
    params = jax.tree.map(np.asarray, variables["params"])
    heads, width = VIT["num_heads"], VIT["embed_dim"]
    arrays = {
        "cls": params["cls_token"].reshape(1, 1, width),
        "Transformer/posembed_input/pos_embedding": params["pos_embed"][None],
    }
    for name, module in (
        ("embedding", "patch_embed"),
        ("Transformer/encoder_norm", "norm"),
        ("head", "head"),
    ):
        arrays |= {f"{name}/{leaf}": value for leaf, value in params[module].items()}
    for index in range(VIT["depth"]):
        block, here = params[f"block{index + 1}"], f"Transformer/encoderblock_{index}"
        qkv = {leaf: np.split(value, 3, axis=-1) for leaf, value in block["attn"]["qkv"].items()}
        for part, name in enumerate(("query", "key", "value")):
            attention = f"{here}/MultiHeadDotProductAttention_1/{name}"
            arrays[f"{attention}/kernel"] = qkv["kernel"][part].reshape(width, heads, -1)
            arrays[f"{attention}/bias"] = qkv["bias"][part].reshape(heads, -1)
        out = block["attn"]["proj"]
        arrays[f"{here}/MultiHeadDotProductAttention_1/out/kernel"] = out["kernel"].reshape(heads, -1, width)
        arrays[f"{here}/MultiHeadDotProductAttention_1/out/bias"] = out["bias"]
        for name, module in (("LayerNorm_0", block["norm1"]), ("LayerNorm_2", block["norm2"])):
            arrays |= {f"{here}/{name}/{leaf}": value for leaf, value in module.items()}
        for number in (0, 1):
            layer = block["mlp"][f"fc{number + 1}"]
            arrays |= {f"{here}/MlpBlock_3/Dense_{number}/{leaf}": value for leaf, value in layer.items()}
    return {prefix + name: array for name, array in arrays.items()}


@pytest.fixture
def load_npz(tmp_path):
    def write_and_load(model, arrays, **arguments):
        np.savez(tmp_path / "vit.npz", **arrays)
        return sav.load_pretrained(model, tmp_path / "vit.npz", **arguments)

    return write_and_load


@pytest.mark.parametrize("prefix", ["", "opt/target/"])
def test_googles_arrays_are_read(load_npz, prefix):
    model, variables = make("vit_tiny")
    assert_equal(load_npz(model, google(variables, prefix)), variables)


def test_googles_arrays_are_treated_as_others_are(load_npz, caplog):
    model, variables = make("vit_tiny")
    arrays = google(variables)
    larger, _ = make("vit_tiny", image_size=48)
    found = load_npz(larger.clone(num_classes=5), arrays)["params"]
    assert found["pos_embed"].shape == (10, 16)
    assert found["head"]["kernel"].shape == (16, 5)
    assert "another number of classes: head/bias, head/kernel drawn anew" in caplog.text
    for change, message in (
        ({"pre_logits/kernel": np.zeros((16, 16), np.float32)}, r"pre_logits layer .*\(pre_logits/kernel\)"),
        ({"embedding/kernel": np.zeros((32, 32, 3, 16), np.float32)}, "patches of 32 x 32 pixels"),
        ({"cls": np.zeros((1, 1, 16), "V2")}, "cls of .* has dtype [|]V2"),
    ):
        with pytest.raises(ValueError, match=message):
            load_npz(model, arrays | change)
    with pytest.raises(ValueError, match=r"has 2 heads .* but vit_tiny has 4"):
        load_npz(model.clone(num_heads=4), arrays)
    with pytest.raises(ValueError, match="no distillation token, but"):
        load_npz(make("deit_tiny_distilled")[0], arrays)


def test_what_is_left_out_of_names_is_logged(vit, load, caplog):
    model, _, tensors = vit
    with caplog.at_level(logging.INFO):
        load(model, with_prefix("module.", tensors))
    assert "took module. from the names of its tensors" in caplog.text
