"""Imported weights against the PyTorch models that they come from."""

import json
import logging
import re
import shutil
from itertools import chain

import jax
import numpy as np
import pytest
import torch
import transformers
from flax.traverse_util import flatten_dict
from safetensors.numpy import load_file, save_file

import shiftaddvit_jax as sav
from shiftaddvit_jax.checkpoints.layouts import LAYOUTS, export_parameter
from shiftaddvit_jax.models.variables import variable_shapes
from shiftaddvit_jax.nn import Block

CLASSES = 7
PYRAMID = {"embed_dims": (8, 16, 20, 32), "depths": (1, 2, 1, 1), "num_heads": (1, 2, 2, 4)} | {
    "mlp_ratios": (2, 2, 3, 2)
}
VIT = {"embed_dim": 32, "depth": 2, "num_heads": 2}


def pyramid_config(config, image_size, **settings):
    sizes = {
        "hidden_sizes": list(PYRAMID["embed_dims"]),
        "depths": list(PYRAMID["depths"]),
        "num_attention_heads": list(PYRAMID["num_heads"]),
        "mlp_ratios": list(PYRAMID["mlp_ratios"]),
    }
    return config(**sizes, image_size=image_size, num_labels=CLASSES, **settings)


def vit_config(config, image_size, width=32, depth=2, heads=2):
    return config(
        hidden_size=width,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        intermediate_size=4 * width,
        image_size=image_size,
        num_labels=CLASSES,
    )


def build(model):
    """The torch model with weights that no initialisation leaves at zero or too small to matter."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            scale = 0.3 if "classifier" in name else 0.05
            parameter.add_(scale * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def torch_blocks(model):
    base = model.base_model
    if isinstance(model, transformers.PvtV2ForImageClassification):
        return [block for layer in base.encoder.layers for block in layer.blocks]
    if isinstance(model, transformers.PvtForImageClassification):
        return list(chain(*base.encoder.block))
    return list(base.layers)


def run_torch(model, images, **options):
    """Logits and each block's tokens."""
    outputs = []

    def keep(module, inputs, output):
        outputs.append((output[0] if isinstance(output, tuple) else output).numpy())

    hooks = [block.register_forward_hook(keep) for block in torch_blocks(model)]
    with torch.no_grad():
        logits = model(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()), **options).logits.numpy()
    for hook in hooks:
        hook.remove()
    return logits, outputs


def _is_block_call(module, method):
    return isinstance(module, Block) and method == "__call__"


def run_jax(model, variables, images):
    @jax.jit
    def run(variables, images):
        return model.apply(variables, images, capture_intermediates=_is_block_call)

    logits, state = run(variables, images)
    flat = flatten_dict(state["intermediates"])
    in_order = sorted(flat, key=lambda path: [int(re.search(r"\d+", part)[0]) for part in path[:-1]])
    return np.asarray(logits), [np.asarray(flat[path][0]) for path in in_order]


def random_images(size, batch=1):
    return np.random.default_rng(size).normal(size=(batch, size, size, 3)).astype(np.float32)


def assert_same(model, variables, original, size, **options):
    images = random_images(size)
    expected, expected_tokens = run_torch(original, images, **options)
    logits, tokens = run_jax(model, variables, images)
    assert len(tokens) == len(expected_tokens)
    for found, wanted in zip(tokens, expected_tokens, strict=True):
        np.testing.assert_allclose(found, wanted, atol=1e-4)
    assert expected.std() > 0.1
    np.testing.assert_allclose(logits, expected, atol=1e-4)


CASES = {
    "pvt_v2": (
        lambda size: transformers.PvtV2ForImageClassification(pyramid_config(transformers.PvtV2Config, size)),
        lambda size: sav.create_model("pvt_v2_b0", num_classes=CLASSES, layer_norm_eps=1e-6).clone(**PYRAMID),
    ),
    "pvt_v2_linear": (
        lambda size: transformers.PvtV2ForImageClassification(
            pyramid_config(transformers.PvtV2Config, size, linear_attention=True)
        ),
        lambda size: sav.create_model("pvt_v2_b2_li", num_classes=CLASSES, layer_norm_eps=1e-6).clone(
            **PYRAMID
        ),
    ),
    "pvt": (
        lambda size: transformers.PvtForImageClassification(pyramid_config(transformers.PvtConfig, size)),
        lambda size: sav.create_model(
            "pvt_tiny", num_classes=CLASSES, image_size=size, layer_norm_eps=1e-6
        ).clone(**PYRAMID),
    ),
    "vit": (
        lambda size: transformers.ViTForImageClassification(vit_config(transformers.ViTConfig, size)),
        lambda size: sav.create_model(
            "vit_tiny", num_classes=CLASSES, image_size=size, layer_norm_eps=1e-12
        ).clone(**VIT),
    ),
    "deit_without_teacher": (
        lambda size: transformers.DeiTForImageClassification(vit_config(transformers.DeiTConfig, size)),
        lambda size: sav.create_model(
            "deit_tiny_distilled", num_classes=CLASSES, image_size=size, layer_norm_eps=1e-12
        ).clone(**VIT),
    ),
    "deit_with_teacher": (
        lambda size: transformers.DeiTForImageClassificationWithTeacher(
            vit_config(transformers.DeiTConfig, size)
        ),
        lambda size: sav.create_model(
            "deit_tiny_distilled", num_classes=CLASSES, image_size=size, layer_norm_eps=1e-12
        ).clone(**VIT),
    ),
}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """``imported(case, size)``: the torch model, its folder, ours, and the variables from that folder."""
    made = {}

    def make(case, size=64):
        if (case, size) not in made:
            original, ours = CASES[case]
            folder = tmp_path_factory.mktemp(case)
            original, model = build(original(size)), ours(size)
            original.save_pretrained(folder)
            made[case, size] = original, folder, model, sav.load_pretrained(model, folder)
        return made[case, size]

    return make


@pytest.mark.parametrize("case", CASES)
def test_logits_and_tokens_are_those_of_transformers(imported, case):
    original, _, model, variables = imported(case)
    assert_same(model, variables, original, 64)


def dense_tokens(original, images, **options):
    """What the torch model has for each stage, [batch, rows, columns, channels]."""
    pixels = torch.from_numpy(images.transpose(0, 3, 1, 2).copy())
    with torch.no_grad():
        outputs = original.base_model(pixels, output_hidden_states=True, **options)
    if isinstance(original, transformers.PvtV2ForImageClassification):
        return [tokens.numpy().transpose(0, 2, 3, 1) for tokens in outputs.hidden_states]
    if isinstance(original, transformers.PvtForImageClassification):
        last_blocks = np.cumsum(PYRAMID["depths"])[:3] - 1
        stages = [outputs.hidden_states[index] for index in last_blocks]
        flat, sides = [*stages, outputs.last_hidden_state[:, 1:]], (4, 8, 16, 32)
    else:
        before = 1 if isinstance(original, transformers.ViTForImageClassification) else 2
        flat, sides = [outputs.last_hidden_state[:, before:]], (16,)
    rows, columns = images.shape[1:3]
    return [
        tokens.numpy().reshape(len(images), rows // side, columns // side, -1)
        for tokens, side in zip(flat, sides, strict=True)
    ]


@pytest.mark.parametrize(
    ("case", "size", "options"),
    [
        ("pvt_v2", (64, 43), {}),
        ("pvt_v2_linear", (64, 64), {}),
        ("pvt", (64, 64), {}),
        ("vit", (64, 96), {"interpolate_pos_encoding": True}),
        ("deit_with_teacher", (64, 64), {}),
    ],
)
def test_features_are_those_of_transformers(imported, case, size, options):
    original, _, model, variables = imported(case)
    images = np.random.default_rng(0).normal(size=(2, *size, 3)).astype(np.float32)
    expected = dense_tokens(original, images, **options)
    found = jax.jit(lambda variables, images: sav.features(model, variables, images))(variables, images)
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("case", ["vit", "deit_with_teacher"])
def test_position_embeddings_are_interpolated_as_in_transformers(imported, case):
    original, folder, model, variables = imported(case)
    assert_same(model, variables, original, 96, interpolate_pos_encoding=True)
    larger = CASES[case][1](96)
    resized = sav.load_pretrained(larger, folder)
    at_once = jax.jit(larger.apply)(resized, random_images(96))
    np.testing.assert_allclose(
        at_once, jax.jit(model.apply)(variables, random_images(96)), rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize(("case", "size"), [("pvt_v2", 75), ("pvt_v2_linear", 96)])
def test_pvt_v2_takes_other_sizes(imported, case, size):
    original, _, model, variables = imported(case)
    assert_same(model, variables, original, size)


def test_pvt_takes_position_embeddings_of_another_size(imported):
    _, folder, _, _ = imported("pvt")
    variables = sav.load_pretrained(CASES["pvt"][1](96), folder)
    original = load_file(folder / "model.safetensors")["pvt.encoder.patch_embeddings.3.position_embeddings"]
    grid = torch.from_numpy(original[:, 1:].reshape(1, 2, 2, 32).transpose(0, 3, 1, 2))
    expected = torch.nn.functional.interpolate(grid, size=(3, 3), mode="bilinear")
    found = np.asarray(variables["params"]["stage4"]["pos_embed"])
    np.testing.assert_array_equal(found[0], original[0, 0])
    np.testing.assert_allclose(found[1:].T, expected.numpy().reshape(32, 9), atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "original", "epsilon"),
    [
        (
            "pvt_v2_b0",
            lambda: transformers.PvtV2ForImageClassification(_full(transformers.PvtV2Config)),
            1e-6,
        ),
        ("pvt_tiny", lambda: transformers.PvtForImageClassification(_full(transformers.PvtConfig)), 1e-6),
        (
            "vit_tiny",
            lambda: transformers.ViTForImageClassification(
                vit_config(transformers.ViTConfig, 224, width=192, depth=12, heads=3)
            ),
            1e-12,
        ),
        (
            "deit_tiny_distilled",
            lambda: transformers.DeiTForImageClassificationWithTeacher(
                vit_config(transformers.DeiTConfig, 224, width=192, depth=12, heads=3)
            ),
            1e-12,
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_whole_variants_at_224(tmp_path, name, original, epsilon):
    original = build(original())
    original.save_pretrained(tmp_path)
    model = sav.create_model(name, num_classes=CLASSES, layer_norm_eps=epsilon)
    assert_same(model, sav.load_pretrained(model, tmp_path), original, 224)


def _full(config):
    return config(num_labels=CLASSES)


# What timm's and the authors' files call the tensors of transformers, as patterns to apply in turn.
BLOCK = [
    (r"layer_norm_1|layernorm_before", "norm1"),
    (r"layer_norm_2|layernorm_after", "norm2"),
    (r"mlp\.dense(\d)", r"mlp.fc\1"),
    (r"intermediate\.dense", "mlp.fc1"),
    (r"attention\.output\.dense|attention\.proj", "attn.proj"),
    (r"output\.dense", "mlp.fc2"),
    (r"attention\.(self|attention)\.(query|key|value)", r"attn.\2"),
    (r"attention\.(query|key|value)", r"attn.\1"),
    (r"attention\.(self\.)?(spatial_reduction|sequence_reduction)", "attn.sr"),
    (r"attention\.(self\.)?layer_norm", "attn.norm"),
]


def one_up(pattern):
    return lambda found: pattern.format(int(found[1]) + 1, *found.groups()[1:])


RENAMINGS = {
    ("pvt_v2", "the authors"): [
        (r"pvt_v2\.encoder\.layers\.(\d)\.patch_embedding\.proj", one_up("patch_embed{}.proj")),
        (r"pvt_v2\.encoder\.layers\.(\d)\.patch_embedding\.layer_norm", one_up("patch_embed{}.norm")),
        (r"pvt_v2\.encoder\.layers\.(\d)\.layer_norm", one_up("norm{}")),
        (r"pvt_v2\.encoder\.layers\.(\d)\.blocks", one_up("block{}")),
    ],
    ("pvt_v2", "timm"): [
        (r"pvt_v2\.encoder\.layers\.0\.patch_embedding\.proj", "patch_embed.proj"),
        (r"pvt_v2\.encoder\.layers\.0\.patch_embedding\.layer_norm", "patch_embed.norm"),
        (r"pvt_v2\.encoder\.layers\.(\d)\.patch_embedding\.proj", r"stages.\1.downsample.proj"),
        (r"pvt_v2\.encoder\.layers\.(\d)\.patch_embedding\.layer_norm", r"stages.\1.downsample.norm"),
        (r"pvt_v2\.encoder\.layers\.(\d)\.layer_norm", r"stages.\1.norm"),
        (r"pvt_v2\.encoder\.layers\.(\d)\.blocks", r"stages.\1.blocks"),
        (r"dwconv\.dwconv", "dwconv"),
    ],
    ("pvt", "the authors"): [
        (r"pvt\.encoder\.patch_embeddings\.(\d)\.projection", one_up("patch_embed{}.proj")),
        (r"pvt\.encoder\.patch_embeddings\.(\d)\.layer_norm", one_up("patch_embed{}.norm")),
        (r"pvt\.encoder\.patch_embeddings\.(\d)\.position_embeddings", one_up("pos_embed{}")),
        (r"pvt\.encoder\.patch_embeddings\.3\.cls_token", "cls_token"),
        (r"pvt\.encoder\.block\.(\d)", one_up("block{}")),
        (r"pvt\.encoder\.layer_norm", "norm"),
    ],
    ("deit_with_teacher", "timm or the authors"): [
        (r"deit\.embeddings\.cls_token", "cls_token"),
        (r"deit\.embeddings\.distillation_token", "dist_token"),
        (r"deit\.embeddings\.position_embeddings", "pos_embed"),
        (r"deit\.embeddings\.patch_embeddings\.projection", "patch_embed.proj"),
        (r"deit\.encoder\.layer", "blocks"),
        (r"deit\.layernorm", "norm"),
        (r"cls_classifier", "head"),
        (r"distillation_classifier", "head_dist"),
    ],
}


def rename(tensors, patterns, fused):
    """``tensors`` of transformers under other names; ``fused`` says which of q, k and v share a layer."""
    renamed = {}
    for key, tensor in tensors.items():
        for pattern, new in [*patterns, *BLOCK, (r"^classifier", "head")]:
            key = re.sub(pattern, new, key)
        renamed[key] = tensor
    for key in [key for key in renamed if ".attn.query." in key]:
        parts = {part: renamed.pop(key.replace("query", part)) for part in ("query", "key", "value")}
        for name, members in fused.items():
            renamed[key.replace("query", name)] = np.concatenate([parts[member] for member in members])
    return renamed


@pytest.mark.parametrize("source", RENAMINGS, ids="-".join)
@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".bin"])
def test_names_of_timm_and_the_authors(imported, tmp_path, source, suffix):
    case, maker = source
    _, folder, model, variables = imported(case)
    pyramid = {"q": ("query",), "kv": ("key", "value")}
    fused = pyramid if case.startswith("pvt") else {"qkv": ("query", "key", "value")}
    tensors = rename(load_file(folder / "model.safetensors"), RENAMINGS[source], fused)
    file = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(tensors, file)
    else:
        state = {key: torch.from_numpy(tensor) for key, tensor in tensors.items()}
        torch.save({"model": state} if suffix == ".pth" else state, file)
    loaded = sav.load_pretrained(model, file)
    jax.tree.map(np.testing.assert_array_equal, loaded, variables)

    (layout,) = [it for it in LAYOUTS if it.source == maker and isinstance(model, it.model)]
    exported = {}
    for name, value in flatten_dict(variables["params"], sep="/").items():
        exported |= export_parameter(name, np.asarray(value), layout)
    assert exported.keys() == tensors.keys()
    for key, tensor in tensors.items():
        np.testing.assert_array_equal(exported[key], tensor)


@pytest.mark.parametrize("case", [case for case in CASES if case != "deit_without_teacher"])
def test_save_safetensors_writes_what_transformers_wrote(imported, tmp_path, case):
    original, folder, model, variables = imported(case)
    sav.save_safetensors(model, variables, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    again = type(original).from_pretrained(tmp_path)
    for name, tensor in original.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name


@pytest.mark.parametrize("case", ["pvt_v2", "vit"])
def test_a_shift_model_has_its_logits_in_transformers(imported, tmp_path, case):
    original, folder, dense, variables = imported(case)
    # With the dense model's weights, none is a power of two before it is rounded.
    stages = len(dense.attention)
    model = dense.clone(mlp=("shift",) * stages, projections=("shift",) + ("dense",) * (stages - 1))
    sav.save_safetensors(model, variables, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    images = random_images(64)
    expected = jax.jit(model.apply)(variables, images)
    found, _ = run_torch(type(original).from_pretrained(tmp_path).eval(), images)
    np.testing.assert_allclose(found, expected, atol=1e-4)
    unrounded, _ = run_torch(original, images)
    assert np.abs(unrounded - expected).max() > 1e-2


@pytest.mark.parametrize(
    ("kinds", "message"),
    [
        ({"mlp": "moe"}, r"no mixtures of experts \(moe\), as this deit_tiny has; only dense and shift"),
        ({"attention": "hamming_linear"}, "no attention hamming_linear, as this deit_tiny has"),
        ({"mlp": "shift", "activations": "int8"}, "no int8 activations, as this deit_tiny has"),
    ],
    ids=str,
)
def test_save_safetensors_refuses_what_transformers_has_not(tmp_path, kinds, message):
    model = sav.create_model("deit_tiny", num_classes=3, image_size=32, **kinds).clone(**VIT)
    with pytest.raises(ValueError, match=message):
        sav.save_safetensors(model, variable_shapes(model), tmp_path / "model.safetensors")
    assert not list(tmp_path.iterdir())


def test_save_safetensors_refuses_packed_variables(imported, tmp_path):
    _, _, model, variables = imported("vit")
    with pytest.raises(ValueError, match="are packed; write those that they were packed from"):
        sav.save_safetensors(model, sav.pack(model, variables), tmp_path / "model.safetensors")


@pytest.mark.parametrize("case", ["pvt_v2", "pvt", "deit_with_teacher", "deit_without_teacher"])
def test_a_model_without_a_head_leaves_the_heads_of_weights_alone(imported, tmp_path, case, caplog):
    _, folder, model, variables = imported(case)
    headless, expected = sav.replace_head(model, variables, 0)
    with caplog.at_level(logging.WARNING):
        loaded = sav.load_pretrained(headless, folder, strict=True)
        jax.tree.map(np.testing.assert_array_equal, loaded, expected)
        assert not caplog.text
        # And the other way round.
        sav.save_safetensors(headless, expected, tmp_path / "model.safetensors")
        again = sav.load_pretrained(model, tmp_path / "model.safetensors")
    assert "has no head: head/bias, head/kernel" in caplog.text
    jax.tree.map(np.testing.assert_array_equal, sav.replace_head(model, again, 0)[1], expected)
    assert again["params"]["head"]["kernel"].shape[-1] == CLASSES


def test_another_number_of_classes_draws_the_head_anew(imported, caplog):
    _, folder, model, variables = imported("vit")
    fewer = model.clone(num_classes=3)
    with caplog.at_level(logging.WARNING):
        loaded = sav.load_pretrained(fewer, folder)
    assert "another number of classes: head/bias, head/kernel drawn anew" in caplog.text
    assert loaded["params"]["head"]["kernel"].shape == (32, 3)
    assert float(np.std(loaded["params"]["head"]["kernel"])) > 0
    for name in variables["params"].keys() - {"head"}:
        jax.tree.map(np.testing.assert_array_equal, loaded["params"][name], variables["params"][name])
    with pytest.raises(ValueError, match=r"classifier.weight has shape \(7, 32\) instead of \(3, 32\)"):
        sav.load_pretrained(fewer, folder, strict=True)


def test_tensors_that_do_not_fit_are_named(imported, tmp_path):
    _, folder, model, _ = imported("pvt_v2")
    tensors = load_file(folder / "model.safetensors")
    key = "pvt_v2.encoder.layers.1.blocks.1.attention.key.weight"
    for change, message in {
        "missing": f"{key} is missing",
        "unexpected": "pvt_v2.extra is unexpected",
        "misshapen": re.escape(f"{key} has shape (16, 8) instead of (16, 16)"),
    }.items():
        changed = dict(tensors)
        if change == "missing":
            del changed[key]
        elif change == "unexpected":
            changed["pvt_v2.extra"] = np.zeros(1, np.float32)
        else:
            changed[key] = np.ascontiguousarray(changed[key][:, :8])
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(ValueError, match=f"1 tensors of .* do not fit: {message}"):
            sav.load_pretrained(model, tmp_path)


def test_one_token_too_few_or_too_many_is_told(imported):
    _, folder, vit, _ = imported("vit")
    _, distilled_folder, distilled, _ = imported("deit_with_teacher")
    with pytest.raises(ValueError, match=r"no distillation token, but .* create_model\('deit_tiny', ...\)"):
        sav.load_pretrained(distilled, folder)
    with pytest.raises(ValueError, match=r"a distillation token, but .*\('deit_tiny_distilled', ...\)"):
        sav.load_pretrained(vit, distilled_folder)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"layer_norm_eps": 1e-6}, r"layer_norm_eps is 1e-06, and the model has 1e-12; create_model"),
        ({"hidden_act": "relu"}, "hidden_act is 'relu', and this architecture has 'gelu'"),
        ({"num_attention_heads": 4}, "num_attention_heads is 4, and the model has 2"),
        ({"qkv_bias": False}, "qkv_bias is False, and this architecture has True"),
    ],
)
def test_a_config_that_contradicts_the_model_is_refused_by_its_field(imported, tmp_path, fields, message):
    _, folder, model, _ = imported("vit")
    shutil.copytree(folder, tmp_path / "vit")
    config = json.loads((folder / "config.json").read_text())
    (tmp_path / "vit" / "config.json").write_text(json.dumps(config | fields))
    with pytest.raises(ValueError, match=message):
        sav.load_pretrained(model, tmp_path / "vit")


def test_what_cannot_be_read_is_told_in_one_line(imported, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    _, folder, model, _ = imported("vit")
    whole = (folder / "model.safetensors").read_bytes()
    (tmp_path / "short.safetensors").write_bytes(whole[:5000])
    save_file({"weight": np.zeros(2, np.float32)}, tmp_path / "other.safetensors")
    (tmp_path / "text.pth").write_text("weights")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({"model": print}, tmp_path / "code.pth")
    (tmp_path / "empty").mkdir()
    for name, message in {
        tmp_path / "short.safetensors": "not a whole safetensors file",
        tmp_path / "other.safetensors": "no PVT, PVTv2, ViT or DeiT classifier",
        tmp_path / "text.pth": "neither a whole PyTorch file, nor safetensors, nor .npz",
        tmp_path / "code.pth": "holds an object of builtins.print, and nothing but tensors is unpickled",
        tmp_path / "list.pth": "not hold a dictionary of tensors",
        tmp_path / "empty": "has neither model.safetensors nor pytorch_model.bin",
        tmp_path / "absent": "no file or folder",
        "hf:nobody/nothing": "cannot download nobody/nothing",
        "timm:nothing": "cannot download timm/nothing",
        "hf:not a name!": "cannot download not a name!",
    }.items():
        with pytest.raises(ValueError, match=message) as caught:
            sav.load_pretrained(model, name)
        assert "\n" not in str(caught.value)


def test_the_wrong_model_is_told(imported):
    _, folder, model, _ = imported("vit")
    with pytest.raises(ValueError, match=r"holds a VisionTransformer .* but pvt_tiny is a"):
        sav.load_pretrained(sav.create_model("pvt_tiny"), folder)
    with pytest.raises(ValueError, match=r"load them into create_model\('vit_tiny'\), then reparameterize"):
        sav.load_pretrained(model.clone(attention=("hamming_linear",)), folder)
