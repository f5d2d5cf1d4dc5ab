"""From an image file to classes, against transformers' own pipelines on the same files."""

import json
import threading
from dataclasses import replace

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_images
from transformers.models.deit.image_processing_pil_deit import DeiTImageProcessorPil
from transformers.models.pvt.image_processing_pil_pvt import PvtImageProcessorPil
from transformers.models.vit.image_processing_pil_vit import ViTImageProcessorPil

import shiftaddvit_jax as sav
from shiftaddvit_jax.checkpoints import open_source
from shiftaddvit_jax.classifier import LARGE
from shiftaddvit_jax.models import Preprocessing

NAMES = {0: "daisy", 1: "dandelion", 2: "rose [red]", 3: "sunflower", 4: "tulip", 5: "weed"}
SIDE = 64
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}
TINY = {"hidden_size": 192, "num_attention_heads": 3, "intermediate_size": 768}


pytestmark = pytest.mark.usefixtures("classifiers_on_xla")


def of_transformers(config, model, processor, **settings):
    """A model of transformers with weights that matter, and its image processor."""
    torch.manual_seed(0)
    model = model(config(image_size=SIDE, num_labels=len(NAMES), id2label=NAMES, **settings)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.add_((0.3 if "classifier" in name else 0.05) * torch.randn(parameter.shape))
    return model, processor


PUBLISHED = {
    "pvt_v2_b0": lambda: of_transformers(
        transformers.PvtV2Config,
        transformers.PvtV2ForImageClassification,
        PvtImageProcessorPil(size={"height": SIDE, "width": SIDE}),
    ),
    "pvt_tiny": lambda: of_transformers(
        transformers.PvtConfig,
        transformers.PvtForImageClassification,
        PvtImageProcessorPil(size={"height": SIDE, "width": SIDE}),
    ),
    "vit_tiny": lambda: of_transformers(
        transformers.ViTConfig,
        transformers.ViTForImageClassification,
        ViTImageProcessorPil(size={"height": SIDE, "width": SIDE}),
        **TINY,
    ),
    "deit_tiny_distilled": lambda: of_transformers(
        transformers.DeiTConfig,
        transformers.DeiTForImageClassificationWithTeacher,
        DeiTImageProcessorPil(size={"height": 73, "width": 73}, crop_size={"height": SIDE, "width": SIDE}),
        **TINY,
    ),
}


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("photographs")
    for index, size in enumerate([(160, 107), (107, 160), (SIDE, SIDE)]):
        image = Image.fromarray(load_sample_images().images[index % 2])
        image.resize(size, Image.Resampling.LANCZOS).save(folder / f"{index}.jpg", quality=95)
    return sorted(folder.iterdir())


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request, tmp_path_factory):
    """A folder as transformers saves it, its model and its image processor."""
    folder = tmp_path_factory.mktemp(request.param)
    model, processor = PUBLISHED[request.param]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return request.param, folder, model, processor


def test_a_folder_of_transformers_answers_as_their_pipeline_does(published, photographs):
    name, folder, model, processor = published
    pixels = processor([Image.open(file) for file in photographs], return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        expected = model(pixels).logits.numpy()
    classifier = sav.from_pretrained(folder)
    assert classifier.model.variant == name
    found = classifier.logits(np.stack([classifier.preprocess(file) for file in photographs]))
    np.testing.assert_allclose(found, expected, atol=1e-3)
    best = [NAMES[index] for index in np.argsort(-expected[0])[:5]]
    assert [answer.label for answer in classifier(photographs[0])] == best
    assert classifier.source.notes == ()


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    """Of a checkpoint that says what pixels and classes it has."""
    model = sav.create_model("pvt_v2_nano", num_classes=3, attention="hamming_linear", mlp="shift")
    pixels = {
        "size": 32,
        "resize_to": 40,
        "resize": "exact",
        "interpolation": "bilinear",
        "crop_rounding": "down",
        "channels": "bgr",
        "rescale": 1 / 255,
        "mean": (0.5,) * 3,
        "deviation": (0.25,) * 3,
    }
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    about = {"class_names": ["cat", "dog", "bird"], "preprocessing": pixels}
    sav.save_model(folder, model, sav.init_variables(model, jax.random.key(0)), about)
    return sav.from_pretrained(folder, max_batch=4)


def test_a_checkpoint_has_its_own_pixels_and_classes(classifier):
    assert classifier.preprocessing == Preprocessing(
        32, 40, "exact", "bilinear", "down", "bgr", 1 / 255, (0.5,) * 3, (0.25,) * 3
    )
    assert classifier.class_names == ("cat", "dog", "bird")


def test_every_form_of_an_image_gets_the_same_answer(classifier, photographs):
    file = photographs[0]
    image = Image.open(file)
    expected = classifier(str(file))
    with file.open("rb") as opened:
        for form in (file, file.read_bytes(), opened, image, np.asarray(image), jax.numpy.asarray(image)):
            assert classifier(form) == expected
    assert [answer.index for answer in expected] == np.argsort(-classifier.probabilities([file])[0]).tolist()
    assert sum(answer.probability for answer in expected) == pytest.approx(1, abs=1e-6)


def test_several_images_get_the_answers_of_each(classifier, photographs):
    each = [classifier(file, top_k=2) for file in photographs]
    for several in (photographs, tuple(photographs)):
        for found, expected in zip(classifier(several, top_k=2), each, strict=True):
            assert [answer.label for answer in found] == [answer.label for answer in expected]
            np.testing.assert_allclose(found[0].probability, expected[0].probability, rtol=1e-5)
    assert list(classifier(photographs[0].parent, top_k=2)) == photographs
    pixels = np.stack([np.asarray(Image.open(photographs[2]))] * 2)
    assert classifier(pixels)[0] == classifier(pixels)[1]


def test_batches_are_padded_to_powers_of_two(classifier):
    inputs = np.random.default_rng(0).normal(size=(7, 32, 32, 3)).astype(np.float32)
    classifier.warm_up()
    compiled = classifier._program.func._cache_size()
    rows = np.concatenate([classifier.logits(inputs[index : index + 1]) for index in range(7)])
    np.testing.assert_allclose(classifier.logits(inputs), rows, atol=1e-5)
    for count in range(1, 8):
        assert classifier.logits(inputs[:count]).shape == (count, 3)
    assert classifier._program.func._cache_size() == compiled == 3
    assert classifier.logits(inputs[:0]).shape == (0, 3)


def test_a_program_takes_large_variables_and_the_rest_are_its_constants(classifier):
    (taken,) = classifier._program.args
    sizes = [leaf.nbytes for leaf in jax.tree.leaves(classifier.variables)]
    assert min(leaf.nbytes for leaf in taken) >= LARGE > min(sizes)
    assert len(taken) == sum(size >= LARGE for size in sizes)


def test_another_model_has_the_same_pixels_and_classes(classifier):
    inputs = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    known = replace(classifier.source, about={**classifier.source.about, "top1": 0.9}, program="a program")
    variables = sav.pack(classifier.model, classifier.variables)
    found = sav.Classifier(known).with_model(classifier.model, variables)
    assert (found.preprocessing, found.class_names) == (classifier.preprocessing, classifier.class_names)
    assert found.source.about == classifier.source.about
    np.testing.assert_allclose(found.logits(inputs), classifier.logits(inputs), atol=1e-5)


def test_threads_share_a_classifier(classifier, photographs):
    expected, found = classifier(photographs[1]), [None] * 6

    def ask(index):
        found[index] = classifier(photographs[1])

    threads = [threading.Thread(target=ask, args=(index,)) for index in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [expected] * 6


def test_a_bad_image_is_an_error_in_a_list_and_a_row_in_a_stream(classifier, photographs, tmp_path):
    bad = tmp_path / "bad.jpg"
    bad.write_bytes(b"no image")
    with pytest.raises(ValueError, match=r"bad\.jpg cannot be read as an image"):
        classifier([photographs[0], bad])
    ((prepared, probabilities),) = classifier.stream([photographs[0], bad, photographs[1]])
    assert [one.error is None for one in prepared] == [True, False, True]
    assert np.isnan(probabilities).all(axis=1).tolist() == [False, True, False]


@pytest.mark.parametrize(
    ("image", "message"),
    [
        (np.zeros((8, 8, 3), np.float32), "uint8"),
        (np.zeros((8, 8), np.uint8), "uint8"),
        ("nothing.png", "no image file at nothing.png"),
    ],
)
def test_what_is_no_image_is_refused(classifier, image, message):
    with pytest.raises(ValueError, match=message):
        classifier(image)


def test_an_empty_folder_is_refused(classifier, tmp_path):
    with pytest.raises(ValueError, match="has no image files"):
        classifier(tmp_path)


# What lies beside the weights.


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vit")
    model, processor = PUBLISHED["vit_tiny"]()
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture
def changed(vit, tmp_path):
    """A function that makes a copy of the folder, with other fields in its configs."""

    def make(name="config.json", remove=(), **fields):
        folder = tmp_path / "changed"
        folder.mkdir(exist_ok=True)
        for file in vit.iterdir():
            if file.name not in remove and not (folder / file.name).exists():
                (folder / file.name).write_bytes(file.read_bytes())
        if fields:
            config = json.loads((folder / name).read_text())
            (folder / name).write_text(json.dumps(config | fields))
        return folder

    return make


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"id2label": {"0": "a", "1": "b"}}, "names 2 classes, and .* has a head for 6"),
        ({"id2label": {"0": "a", "2": "b"}}, "id2label must name the classes from 0 to 1"),
        (
            {"image_size": 128},
            "position embeddings for 128 x 128 pixels, and the preprocessing makes 64 x 64",
        ),
        ({"hidden_act": "quick_gelu"}, "hidden_act is 'quick_gelu', and this architecture has 'gelu'"),
        ({"num_attention_heads": 12}, "num_attention_heads is 12, and .* vit_tiny, has 3"),
        ({"num_hidden_layers": 11}, "num_hidden_layers is 11"),
        ({"model_type": "swin"}, "model_type 'swin' is none of vit, deit, pvt, pvt_v2"),
    ],
)
def test_a_config_that_contradicts_is_refused_by_its_field(changed, fields, message):
    with pytest.raises(ValueError, match=message):
        open_source(changed(**fields))


def test_an_argument_that_the_config_contradicts_is_refused(vit):
    with pytest.raises(ValueError, match="says model vit_tiny, not deit_tiny"):
        open_source(vit, model="deit_tiny")
    with pytest.raises(ValueError, match=r"says layer_norm_eps 1e-12, not 1e-06"):
        open_source(vit, layer_norm_eps=1e-6)


def test_what_no_file_says_comes_from_tables_and_is_noted(changed):
    folder = changed(remove=("config.json", "preprocessor_config.json"))
    with pytest.raises(ValueError, match=r"no config\.json beside .*; give its name"):
        open_source(folder)
    source = open_source(folder, model="vit_tiny", image_size=SIDE)
    assert source.preprocessing.mean == (0.5,) * 3  # augreg's
    assert source.class_names == tuple("012345")
    assert [note.split(":")[0] for note in source.notes] == [
        "no config.json beside the weights",
        "nothing beside the weights says what pixels they expect",
        "nothing names the classes",
    ]


def test_labels_that_nobody_gave_are_numbers(changed):
    source = open_source(changed(id2label={str(index): f"LABEL_{index}" for index in range(6)}))
    assert source.class_names == tuple("012345")


def test_another_size_is_one_argument(vit):
    source = open_source(vit, image_size=96)
    assert (source.model.image_size, source.preprocessing.size) == (96, 96)


def test_another_number_of_classes_draws_the_head_anew(vit):
    source = open_source(vit, num_classes=2)
    assert source.variables["params"]["head"]["bias"].shape == (2,)
    assert source.class_names == ("0", "1")


TIMM = {
    "architecture": "vit_tiny_patch16_64",
    "num_classes": 6,
    "global_pool": "token",
    "label_names": [f"n{index}" for index in range(6)],
    "label_descriptions": {f"n{index}": name for index, name in NAMES.items()},
    "pretrained_cfg": {"input_size": [3, 64, 64], "crop_pct": 0.9, "mean": [0.5] * 3, "std": [0.5] * 3},
}


def timm_folder(vit, folder, **fields):
    """The weights under timm's names, with timm's config."""
    from safetensors.numpy import load_file, save_file

    ours = load_file(vit / "model.safetensors")
    renamed = {}
    for name, tensor in ours.items():
        for old, new in {
            "vit.embeddings.cls_token": "cls_token",
            "vit.embeddings.position_embeddings": "pos_embed",
            "vit.embeddings.patch_embeddings.projection": "patch_embed.proj",
            "vit.encoder.layer": "blocks",
            "attention.output.dense": "attn.proj",
            "layernorm_before": "norm1",
            "layernorm_after": "norm2",
            "intermediate.dense": "mlp.fc1",
            "output.dense": "mlp.fc2",
            "vit.layernorm": "norm",
            "classifier": "head",
        }.items():
            name = name.replace(old, new)
        renamed[name] = tensor
    for block in range(12):
        for leaf in ("weight", "bias"):
            parts = [
                renamed.pop(f"blocks.{block}.attention.attention.{part}.{leaf}")
                for part in ("query", "key", "value")
            ]
            renamed[f"blocks.{block}.attn.qkv.{leaf}"] = np.concatenate(parts)
    folder.mkdir(exist_ok=True)
    save_file(renamed, folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(TIMM | fields))
    return folder


def test_a_folder_of_timm_has_its_names_and_pixels(vit, tmp_path):
    source = open_source(timm_folder(vit, tmp_path / "timm"))
    assert source.model.variant == "vit_tiny"
    assert source.class_names == tuple(NAMES.values())
    assert source.preprocessing == Preprocessing(64, 71, mean=(0.5,) * 3, deviation=(0.5,) * 3)
    assert source.notes == ()


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"architecture": "deit3_small_patch16_224"},
            "architecture 'deit3_small_patch16_224' is none of these",
        ),
        ({"global_pool": "avg"}, "global_pool is 'avg', and vit_tiny has 'token'"),
        ({"model_args": {"qkv_bias": False}}, "model_args has qkv_bias False, and vit_tiny has True"),
        ({"model_args": {"rope": True}}, "model_args has rope True"),
        ({"label_names": ["a"]}, "label_names has 1 names, and num_classes is 6"),
    ],
)
def test_timms_config_is_taken_or_refused_by_its_field(vit, tmp_path, fields, message):
    with pytest.raises(ValueError, match=message):
        open_source(timm_folder(vit, tmp_path / "timm", **fields))
