"""Two models on the same images, against NumPy; and ``shiftaddvit compare --data``."""

import json
import math

import jax
import numpy as np
import pytest
from PIL import Image

import shiftaddvit_jax as sav
from shiftaddvit_jax import classifier as classifiers
from shiftaddvit_jax import compare as comparison
from shiftaddvit_jax.bench.synthetic import random_variables
from shiftaddvit_jax.checkpoints import Source
from shiftaddvit_jax.checkpoints.source import stored_bytes
from shiftaddvit_jax.classifier import Answer
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.cli.compare import _print_comparison
from shiftaddvit_jax.compare import (
    Comparison,
    ImageDifference,
    LogitError,
    Size,
    Times,
    _layer_decibels,
    _measure_layers,
    _size,
    compare,
)
from shiftaddvit_jax.data import Examples, preprocess
from shiftaddvit_jax.data.images import UnreadableImage
from shiftaddvit_jax.models import Preprocessing, VisionTransformer
from shiftaddvit_jax.models.inspect import capture
from shiftaddvit_jax.pictures import plot_worst

COUNT = 70  # more than a batch
NAMES = ("ant", "bee", "wasp")
PIXELS = Preprocessing(size=32, resize_to=32)
MODEL = VisionTransformer(
    "deit_tiny", 32, 3, 16, 2, 2, False, ("msa",), ("dense",), ("dense",), layer_norm_eps=1e-6
)
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (COUNT, 32, 32, 3), np.uint8)
LABELS = RANDOM.integers(0, 3, COUNT)


def examples(count=COUNT):
    return Examples(IMAGES[:count], LABELS[:count], np.asarray)


def classifier(seed=0, preprocessing=PIXELS, names=NAMES, name="tiny"):
    random = np.random.default_rng(seed)
    variables = jax.tree.map(
        lambda leaf: leaf + np.float32(0.1) * random.standard_normal(leaf.shape, np.float32), VARIABLES
    )
    return sav.Classifier(Source(name, MODEL, variables, preprocessing, names))


def inputs(preprocessing=PIXELS, count=COUNT):
    return np.stack([preprocess(image, preprocessing) for image in IMAGES[:count]])


def logits(model, preprocessing=PIXELS):
    return np.asarray(jax.jit(model.model.apply)(model.variables, inputs(preprocessing)), np.float64)


VARIABLES = random_variables(MODEL)
FIRST, SECOND = classifier(1), classifier(2)


@pytest.fixture(scope="module")
def found():
    return compare(FIRST, SECOND, examples(), rounds=0)


def test_answers_are_those_of_the_logits(found):
    a, b = (logits(model).argmax(-1) for model in (FIRST, SECOND))
    assert found.images == COUNT
    assert found.top1 == pytest.approx((np.mean(a == LABELS), np.mean(b == LABELS)))
    assert found.agreement == pytest.approx(np.mean(a == b))
    assert 0 < found.agreement < 1


def test_the_error_is_that_of_the_logits(found):
    a, b = logits(FIRST), logits(SECOND)
    error = np.abs(b - a)
    decibels = 10 * np.log10(a.var(axis=0).sum() / np.square(error).mean(axis=0).sum())
    expected = (decibels, error.mean(), np.percentile(error, 99), error.max())
    assert found.logits == pytest.approx(expected, rel=1e-3)


def test_layers_are_compared_over_all_batches(found):
    def look(module, method, arguments, result):
        is_layer = method == "__call__" and "/".join(module.path) in ("block1", "block2", "norm")
        return result if is_layer else None

    a, b = (capture(MODEL, model.variables, inputs(), look) for model in (FIRST, SECOND))
    assert list(found.layers) == ["block1", "block2", "norm"]
    for name, decibels in found.layers.items():
        x, y = (np.asarray(seen[name][0], np.float64).reshape(-1, 16) for seen in (a, b))
        signal, noise = np.square(x - x.mean(0)).sum(), np.square(y - x).sum()
        assert decibels == pytest.approx(10 * np.log10(signal / noise), abs=1e-3)


def test_the_worst_images_are_those_whose_logits_differ_most(found):
    a, b = logits(FIRST), logits(SECOND)
    errors = np.sqrt(np.square(b - a).mean(-1))
    worst = np.argsort(-errors)[:12]
    assert [image.index for image in found.worst] == worst.tolist()
    assert [image.name for image in found.worst] == [str(index) for index in worst]
    image, index = found.worst[0], worst[0]
    assert image.label == NAMES[LABELS[index]]
    for answer, each in zip(image.answers, (a, b), strict=True):
        probabilities = np.exp(each[index]) / np.exp(each[index]).sum()
        assert answer.label == NAMES[probabilities.argmax()]
        assert answer.probability == pytest.approx(probabilities.max(), rel=1e-4)


def test_a_model_has_no_distance_from_itself():
    same = compare(FIRST, FIRST, examples(4), rounds=0)
    assert same.agreement == 1
    assert same.logits == (math.inf, 0, 0, 0)
    assert set(same.layers.values()) == {math.inf}


def test_each_model_gets_its_own_pixels():
    other = Preprocessing(size=32, resize_to=48, mean=(0.5,) * 3)
    found = compare(FIRST, classifier(1, other), examples(), layers=False, rounds=0)
    error = np.abs(logits(FIRST, other) - logits(FIRST))
    assert found.logits.mean == pytest.approx(error.mean(), rel=1e-3)
    assert found.layers == {}


def test_an_unreadable_image_is_left_out_of_both(caplog):
    def read(index):
        if index == 1:
            raise UnreadableImage("b.png is damaged")
        return IMAGES[index]

    some = Examples(range(4), LABELS[:4], read, [b"a.png", b"b.png", b"c.png", b"d.png"])
    found = compare(FIRST, SECOND, some, layers=False, rounds=0)
    errors = np.square(logits(SECOND) - logits(FIRST)).mean(-1)
    assert found.images == 3
    assert [image.index for image in found.worst] == sorted((0, 2, 3), key=lambda index: -errors[index])
    assert {image.name for image in found.worst} == {"a.png", "c.png", "d.png"}
    assert "b.png is damaged" in caplog.text
    with pytest.raises(ValueError, match="none of the images can be read"):
        compare(FIRST, SECOND, some.part([1]), layers=False, rounds=0)


def test_without_labels_there_is_no_top1():
    found = compare(FIRST, SECOND, examples(4), labelled=False, layers=False, rounds=0)
    assert found.top1 is None
    assert {image.label for image in found.worst} == {None}


@pytest.fixture(scope="module")
def shift_and_packed():
    model, variables = sav.reparameterize(MODEL, FIRST.variables, mlp="shift")
    return [
        sav.Classifier(Source("shift", model, weights, PIXELS, NAMES))
        for weights in (variables, sav.pack(model, variables))
    ]


def test_layers_of_packed_weights_are_those_that_were_packed(shift_and_packed):
    shift, packed = shift_and_packed
    variables = (shift.variables, packed.variables)
    moments = _measure_layers((shift, packed))(variables, (inputs(count=4),) * 2)
    found = _layer_decibels([moments])
    assert list(found) == ["block1", "block2", "norm"]
    assert min(found.values()) > 90


def test_parameters_are_counted_as_they_are_stored(shift_and_packed):
    shift, packed = map(_size, shift_and_packed)
    assert shift.parameters == packed.parameters == sum(leaf.size for leaf in jax.tree.leaves(VARIABLES))
    assert shift.parameter_bytes == 4 * shift.parameters
    assert packed.parameter_bytes < shift.parameter_bytes


def test_models_take_turns_and_a_round_has_a_ratio(monkeypatch):
    turns = iter([[2.0] * 3, [1.0] * 3, [20.0] * 3, [4.0] * 3, [2.0] * 3, [1.2] * 3])
    monkeypatch.setattr(comparison, "time_runs", lambda run, seconds: next(turns))
    found = compare(FIRST, SECOND, examples(4), layers=False, rounds=3)
    assert found.times == Times((2.0, 1.2), 0.5)


@pytest.mark.parametrize(
    ("second", "message"),
    [
        (classifier(names=("ant", "bee", "fly")), "class 'wasp' gone and class 'fly' new"),
        (classifier(names=("wasp", "bee", "ant")), "the same classes in another order"),
        (classifier(names=("ant", "bee")), "3 and 2 classes"),
    ],
)
def test_other_classes_are_refused(second, message):
    with pytest.raises(ValueError, match=message):
        compare(FIRST, second, examples(2))


def test_unnamed_classes_are_the_other_model_s():
    found = compare(classifier(1, names=("0", "1", "2")), SECOND, examples(4), layers=False, rounds=0)
    assert {answer.label for image in found.worst for answer in image.answers} <= set(NAMES)


def test_what_cannot_be_compared_is_refused():
    broken = classifier(name="broken")
    broken.variables = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), broken.variables)
    with pytest.raises(ValueError, match="second model, broken, has logits that are not finite for 0"):
        compare(FIRST, broken, examples(4), layers=False, rounds=0)
    with pytest.raises(ValueError, match="at least one image, got none"):
        compare(FIRST, SECOND, examples(0))
    with pytest.raises(ValueError, match="rounds must be at least 0, got -1"):
        compare(FIRST, SECOND, examples(2), rounds=-1)


def example_comparison():
    answers = (Answer("$x_1$", 0.75, 0), Answer("bee", 0.5, 1))
    image = ImageDifference(3, f"{'folder/' * 12}image.png", 0.1, answers, "wasp")
    sizes = (Size(12345678, 49382712, None), Size(12345678, 9382712, 10382712))
    errors = LogitError(40.81, 0.0123, 0.0456, 0.0789)
    layers = {"block1": math.inf, "block2": 31.44, "norm": -math.inf}
    return Comparison(599, (0.9967, 0.995), 0.9983, errors, layers, (image,), sizes, Times((10, 4.5), 0.44))


def test_tables_fit_100_columns_and_cut_no_number(capsys):
    _print_comparison(example_comparison(), ["runs/dense", "hf:org/name"])
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 100
    for text in (
        "A: runs/dense",
        "99.67%",
        "99.83%",
        "40.8",
        "0.0789",
        "12,345,678",
        "0.440",
        "exact",
        "31.4",
    ):
        assert text in printed


def test_the_picture_says_both_answers_and_marks_where_they_differ(tmp_path):
    image = example_comparison().worst[0]
    agreed = image._replace(answers=(image.answers[1],) * 2, label=None)
    figure = plot_worst(list(IMAGES[:2]), [image, agreed], tmp_path / "worst.png")
    apart, same = figure.axes
    assert apart.get_xlabel() == "A: \\$x_1\\$ 75%\nB: bee 50% ≠ A\nis: wasp"
    assert same.get_xlabel() == "A: bee 50%\nB: bee 50%"
    assert apart.xaxis.label.get_color() != same.xaxis.label.get_color()
    assert apart.get_title().endswith("image.png")
    assert np.asarray(Image.open(tmp_path / "worst.png")).std() > 10


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    folder = tmp_path_factory.mktemp("compare")
    model = sav.create_model("pvt_v2_nano", num_classes=3, attention="msa")
    variables = random_variables(model)
    sav.save_model(folder / "dense", model, variables, {"class_names": NAMES})
    sav.save_model(
        folder / "shift", *sav.reparameterize(model, variables, mlp="shift"), {"class_names": NAMES}
    )
    for index, image in enumerate(IMAGES[:6]):
        file = folder / "data" / NAMES[index % 3] / f"{index}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(file)
    return folder


def test_stored_bytes_are_those_of_the_files(checkpoints):
    files = [file for file in (checkpoints / "dense").rglob("*") if file.is_file()]
    source = sav.open_source(checkpoints / "dense")
    assert stored_bytes(source) == sum(len(file.read_bytes()) for file in files)
    assert stored_bytes(FIRST.source) is None


def run(capsys, checkpoints, *arguments):
    """What `compare` prints of both checkpoints, and its notes."""
    sources = [str(checkpoints / name) for name in ("dense", "shift")]
    assert main(["compare", *sources, "--no-times", *map(str, arguments)]) == 0
    return capsys.readouterr()


def test_json_has_what_python_finds(checkpoints, capsys):
    data = ["--data", "folder", "--path", checkpoints / "data", "--no-layers"]
    found = json.loads(run(capsys, checkpoints, *data, "--json").out)
    model, variables, _ = sav.load_model(checkpoints / "dense")
    best = np.asarray(jax.jit(model.apply)(variables, inputs(count=6))).argmax(-1)
    assert found["images"] == 6
    assert found["models"][0]["top1"] == pytest.approx(np.mean(best == np.arange(6) % 3))
    assert found["models"][1]["source"] == str(checkpoints / "shift")
    assert found["time_ratio"] is None
    assert 10 < found["logits"]["decibels"] < 100
    answers = {image["name"]: image["answers"][0]["index"] for image in found["worst"]}
    assert answers == {f"{NAMES[index % 3]}/{index}.png": best[index] for index in range(6)}


@pytest.fixture
def opened(monkeypatch):
    """Both small models in the place of what is opened; the names of models that were asked for."""
    asked, models = [], iter((FIRST, SECOND))

    def from_pretrained(source, model):
        asked.append(model)
        return next(models)

    monkeypatch.setattr(classifiers, "from_pretrained", from_pretrained)
    return asked


def test_a_folder_without_labels_and_a_part_of_it(opened, checkpoints, capsys, tmp_path):
    picture = tmp_path / "worst.png"
    data = ["--data", checkpoints / "data", "--count", 4, "--no-layers", "--worst", picture]
    printed = run(capsys, checkpoints, *data).out
    assert "4 images " in printed
    assert "top-1" not in printed
    assert picture.stat().st_size > 1000


def test_labels_of_other_classes_are_left_out_and_said(opened, checkpoints, capsys):
    said = run(capsys, checkpoints, "--data", "digits", "--count", 4, "--no-layers")
    assert "note: no top-1: the models' classes (ant, bee, wasp) are not the data's (0, 1, 2, 3," in said.err
    assert "top-1" not in said.out


def test_a_model_is_named_where_nothing_else_tells_it(opened, checkpoints, capsys):
    options = ["--data", "digits", "--count", "4", "--no-layers", "--no-times", "--model", "pvt_v2_b0"]
    assert main(["compare", str(checkpoints / "dense"), "weights.pth", *options]) == 0
    assert opened == [None, "pvt_v2_b0"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["a", "--data", "digits"], "--data compares two models, got 1: a; name two"),
        (["a", "b", "c", "--data", "digits"], "--data compares two models, got 3: a, b, c"),
        (["a", "b", "--no-times", "--count", "0"], "--count, --no-times: only with --data"),
        (["a", "b", "--data", "digits", "--count", "0"], "--count must be at least 1, got 0"),
        (["a", "b", "--data", "digits", "--worst", "a.gif"], "must end in .png or .svg"),
        (["a", "b", "--data", "digits"], "no file or folder a"),
    ],
)
def test_a_wrong_request_is_one_line(arguments, message, capsys):
    assert main(["compare", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_images_that_are_nowhere_are_one_line(checkpoints, capsys):
    sources = [str(checkpoints / name) for name in ("dense", "shift")]
    assert main(["compare", *sources, "--data", "nowhere"]) == 2
    assert "--data must be a folder or one of digits" in capsys.readouterr().err
