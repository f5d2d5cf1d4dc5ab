"""The models that come with the package: their names, sizes, cards, and what they answer."""

from pathlib import Path

import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax.checkpoints.published import SHIPPED, shipped_models
from shiftaddvit_jax.checkpoints.source import open_source
from shiftaddvit_jax.data import load_dataset
from shiftaddvit_jax.train import evaluate

DATA = Path("/usr/share/datasets/fashion-mnist")  # of Debian's dataset-fashion-mnist
ANKLE_BOOT = Path(__file__).parents[2] / "docs" / "images" / "ankle_boot.png"  # the first test image
MOE = "fashion_mnist_nano_moe"


def test_shipped_models_are_listed_first():
    assert sav.list_pretrained()[:3] == shipped_models()
    assert sav.list_pretrained("pvt_v2_nano") == shipped_models()
    assert MOE in shipped_models()


@pytest.mark.parametrize("name", shipped_models())
def test_a_shipped_model_is_small_and_has_a_card(name):
    assert sum(file.stat().st_size for file in (SHIPPED / name).iterdir()) < 2_000_000
    card = (SHIPPED / name / "README.md").read_text()
    for part in ("**Data**", "**Recipe**", "**Accuracy**", "**Licence**", "MIT licence"):
        assert part in card


def test_a_folder_comes_before_a_shipped_model_of_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    classifier = open_source(MOE)
    sav.save_model(
        MOE, classifier.model, classifier.variables, {"class_names": ["a"] * 10} | _pixels(classifier)
    )
    assert open_source(MOE).class_names == ("a",) * 10


def _pixels(source):
    return {"preprocessing": source.about["preprocessing"]}


def test_a_shipped_model_knows_an_ankle_boot():
    classifier = sav.from_pretrained(MOE)
    (best, *_) = classifier(ANKLE_BOOT, top_k=1)
    assert best.label == "Ankle boot"


@pytest.mark.slow
@pytest.mark.skipif(not DATA.is_dir(), reason="dataset-fashion-mnist is not installed")
def test_a_shipped_model_is_as_accurate_as_its_description_says():
    source = open_source(MOE)
    test = load_dataset("idx", str(DATA)).test
    found = evaluate(source.model, source.variables, test, preprocessing=source.preprocessing)
    assert found["images"] == 10_000
    assert found["top1"] == pytest.approx(source.about["top1"], abs=5e-4)
