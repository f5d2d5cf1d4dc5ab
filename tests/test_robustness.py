"""Means over perturbed images against closed forms and NumPy; and ``shiftaddvit robustness``."""

import json
import sys
from dataclasses import replace

import jax
import numpy as np
import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax import classifier as classifiers
from shiftaddvit_jax.bench.synthetic import random_variables
from shiftaddvit_jax.checkpoints import Source
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.data import Examples, preprocess
from shiftaddvit_jax.data.images import UnreadableImage
from shiftaddvit_jax.models import Preprocessing, VisionTransformer
from shiftaddvit_jax.optional import MissingExtra
from shiftaddvit_jax.robustness import Design, Scorer, mean_scores, study

CLASSES = 10
PIXELS = Preprocessing(size=32, resize_to=32)
MODEL = VisionTransformer(
    "deit_tiny", 32, CLASSES, 16, 2, 1, False, ("msa",), ("dense",), ("dense",), layer_norm_eps=1e-6
)
VARIABLES = random_variables(MODEL)
RANDOM = np.random.default_rng(0)
IMAGES = RANDOM.integers(0, 256, (6, 32, 32, 3), np.uint8)
LABELS = RANDOM.integers(0, CLASSES, 6)
EXAMPLES = Examples(IMAGES, LABELS, np.asarray)
ROTATED = {"rotation": "uniform:-20:20"}


def classifier(seed=0, preprocessing=PIXELS, name="tiny"):
    random = np.random.default_rng(seed)
    variables = jax.tree.map(
        lambda leaf: leaf + np.float32(0.1) * random.standard_normal(leaf.shape, np.float32), VARIABLES
    )
    return sav.Classifier(Source(name, MODEL, variables, preprocessing, tuple(map(str, range(CLASSES)))))


APPLY = jax.jit(MODEL.apply)


def by_numpy(model, images=IMAGES, kept=slice(None)):
    """Accuracy and loss on the images that are kept."""
    inputs = np.stack([preprocess(image, model.preprocessing) for image in images])
    logits, labels = np.asarray(APPLY(model.variables, inputs), np.float64)[kept], LABELS[kept]
    likely = logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))
    return [np.mean(logits.argmax(-1) == labels), -likely[np.arange(len(labels)), labels].mean()]


# What is asked.


def test_points_decide_rule_and_randomization():
    asked = {points: Design(ROTATED, points=points) for points in ("digital_net", "lattice", "halton", "iid")}
    assert [each.rule for each in asked.values()] == ["cone", "cone", "student", "clt"]
    randomizations = [each.randomization for each in asked.values()]
    assert randomizations == ["lms_shift", "shift", "lms_permutation", None]


def test_a_shift_is_two_parameters():
    design = Design({"blur": "uniform:0:1", "shift": "uniform:-0.1:0.1"})
    assert [each.name for each in design.parameters] == ["shift_x", "shift_y", "blur"]


@pytest.mark.parametrize(
    ("perturbation", "periodic"),
    [
        ({"rotation": "uniform:-180:180"}, True),
        ({"hue": "uniform:0:720"}, True),
        ({"rotation": "uniform:-20:20"}, False),
        ({"rotation": "normal:0:360"}, False),
        ({"blur": "uniform:0:360"}, False),
    ],
)
def test_whole_turns_are_periodic(perturbation, periodic):
    (parameter,) = Design(perturbation).parameters
    assert parameter.is_periodic == periodic


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"perturbations": {}}, "there is nothing to perturb by; give one or more of rotation, scale"),
        ({"perturbations": {"rotate": "uniform:0:1"}}, "unknown perturbation 'rotate'; did you mean 'rotat"),
        ({"perturbations": {"rotation": "20"}}, "'20' is no distribution; write one as in uniform:-20:20"),
        (
            {"perturbations": {"scale": "uniform:0:1"}},
            "scale must be above 0, but uniform:0:1 reaches 0; try",
        ),
        ({"perturbations": {"blur": "normal:0:1"}}, "blur must be from 0, but normal:0:1 reaches -5"),
        ({"tolerance": 0.0}, "tolerance must be a number of points above 0, got 0"),
        ({"points": "sobol"}, "unknown points 'sobol'"),
        ({"points": "halton", "rule": "cone"}, "halton points have no rule 'cone'; theirs: student"),
        ({"points": "iid", "randomization": "shift"}, "no randomization 'shift'; theirs: none"),
        ({"points": "lattice", "alpha": 2}, "alpha must be 1, or more with digital_net or halton, got 2"),
        ({"most": 1000}, "must be a power of two, got 1000; take 512 or 1024"),
        ({"most": 128}, "most must be at least the 256 evaluations of a start, got 128"),
        ({"seed": -1}, "seed must be at least 0, got -1"),
    ],
)
def test_a_design_that_does_not_fit_is_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Design(**({"perturbations": ROTATED} | settings))


# What a perturbation costs.


def test_scores_are_those_of_the_logits(monkeypatch):
    monkeypatch.setattr(study, "BATCH", 4)  # so that the last batch is filled up
    other = replace(PIXELS, channels="bgr", mean=(0.5, 0.4, 0.3), rescale=1 / 128)
    models = [classifier(1), classifier(2, other)]
    scorer = Scorer(models, EXAMPLES, ["rotation"])
    assert scorer.images == 6
    expected = [by_numpy(model) for model in models]
    np.testing.assert_allclose(scorer(None), expected, rtol=1e-4)
    np.testing.assert_allclose(scorer(np.array([360.0])), expected, rtol=1e-4)


def test_all_images_are_perturbed_alike():
    quarter = Scorer([classifier(1)], EXAMPLES, ["rotation"])(np.array([90.0]))
    turned = np.rot90(IMAGES, axes=(1, 2))
    np.testing.assert_allclose(quarter, [by_numpy(classifier(1), turned)], rtol=1e-3)


def test_an_unreadable_image_is_left_out(caplog):
    def read(index):
        if index == 1:
            raise UnreadableImage("b.png is damaged")
        return IMAGES[index]

    scorer = Scorer([classifier(1)], Examples(range(6), LABELS, read), [])
    kept = [0, 2, 3, 4, 5]
    assert scorer.images == 5
    np.testing.assert_allclose(scorer(None), [by_numpy(classifier(1), kept=kept)], rtol=1e-4)
    assert "b.png is damaged" in caplog.text
    with pytest.raises(ValueError, match="none of the images can be read"):
        Scorer([classifier(1)], Examples(range(6), LABELS, read).part([1]), [])


def test_no_images_are_refused():
    with pytest.raises(ValueError, match="at least one image, got none"):
        Scorer([classifier(1)], Examples(IMAGES[:0], LABELS[:0], np.asarray), [])


def test_logits_that_are_no_numbers_are_refused():
    broken = classifier(name="broken")
    broken.variables = jax.tree.map(lambda leaf: leaf * np.float32(np.nan), broken.variables)
    with pytest.raises(ValueError, match="broken has logits that are not finite"):
        Scorer([broken], EXAMPLES, [])(None)


def test_noise_is_each_images_own_wherever_it_is_computed():
    images, amount = np.full((4, 8, 8, 3), 0.5, np.float32), {"noise": np.array(0.1, np.float32)}
    noisy = study.perturb(images, amount, np.arange(4))
    alone = study.perturb(images[:1], amount, np.array([2]))
    np.testing.assert_array_equal(noisy[2:3], alone)
    assert np.std(noisy) == pytest.approx(0.1, rel=0.1)
    assert np.abs(np.corrcoef(noisy.reshape(4, -1)) - np.eye(4)).max() < 0.3


# Means over perturbations.


class Known:
    """A scorer whose means are known: 0.6 + rotation^2 / 4000 + scale / 10, and 0.1 less; losses 1 and 2."""

    images, calls = 1, 0

    def __init__(self, models=1):
        self.models = models

    def __call__(self, values):
        self.calls += 1
        rotation, scale = (0, 1) if values is None else values
        first = 0.6 + rotation**2 / 4000 + scale / 10
        return np.array([[first, 1.0], [first - 0.1 - rotation / 1000, 2.0]])[: self.models]


BOTH = {"rotation": "uniform:-20:20", "scale": "lognormal:0:0.1"}
MEAN = 0.6 + 400 / 3 / 4000 + np.exp(0.1**2 / 2) / 10


@pytest.fixture
def qmcpy():
    return pytest.importorskip("qmcpy")


@pytest.mark.parametrize(
    ("points", "settings"),
    [
        ("digital_net", {}),
        ("digital_net", {"randomization": "nested"}),
        ("digital_net", {"alpha": 2}),
        ("digital_net", {"rule": "student"}),
        ("lattice", {}),
        ("lattice", {"rule": "student"}),
        ("halton", {}),
        ("halton", {"randomization": "permutation"}),
        ("iid", {}),
    ],
)
def test_means_are_within_the_tolerance(qmcpy, points, settings):
    scorer = Known()
    found = mean_scores(scorer, Design(BOTH, tolerance=0.2, points=points, **settings))
    (means,) = found.models
    assert found.difference is None
    assert means.accuracy.half_width <= 0.002
    assert means.accuracy.mean == pytest.approx(MEAN, abs=0.002)
    assert means.loss == pytest.approx((1, 0))
    assert len(found.values) == len(found.scores) == scorer.calls - 1 >= 256
    np.testing.assert_allclose(
        found.scores[:, 0, 0], 0.6 + found.values @ [0, 0.1] + found.values[:, 0] ** 2 / 4000
    )


def test_models_share_perturbations_so_their_difference_has_its_own_bound(qmcpy):
    found = mean_scores(Known(2), Design(BOTH, points="iid", tolerance=0.3))
    assert found.difference.accuracy.mean == pytest.approx(0.1, abs=0.003)
    assert found.difference.accuracy.half_width < 2 * found.models[0].accuracy.half_width
    assert found.difference.loss == pytest.approx((-1, 0))
    np.testing.assert_allclose(found.unperturbed, [[0.7, 1], [0.6, 2]])


def test_a_seed_is_its_perturbations(qmcpy):
    first, again, other = (mean_scores(Known(), Design(BOTH, seed=seed)).values for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)


@pytest.mark.parametrize("points", ["digital_net", "lattice"])
def test_points_are_those_whose_kernel_is_fast(qmcpy, points):
    found = mean_scores(Known(), Design(BOTH, points=points))
    units = np.asarray(found.sequence.points(len(found.values)), np.float64)
    if points == "lattice":
        units = 1 - 2 * np.abs(units - 0.5)
    distributions = [study.as_scipy(parameter.distribution) for parameter in found.design.parameters]
    theirs = [each.cdf(column) for each, column in zip(distributions, found.values.T, strict=True)]
    np.testing.assert_allclose(units.T, theirs, atol=1e-6)


def test_a_tolerance_that_is_not_met_is_said(qmcpy):
    with pytest.raises(
        ValueError, match=r"after 256 evaluations accuracy is known to .* points, not to 0.01; al"
    ):
        mean_scores(Known(), Design(BOTH, tolerance=0.01, points="iid", most=256))


def test_without_qmcpy_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "qmcpy", None)
    with pytest.raises(MissingExtra, match=r"needs qmcpy: pip install .*\[qmc\]"):
        mean_scores(Known(), Design(BOTH))


# The command.


@pytest.fixture
def opened(monkeypatch):
    """Both small models in the place of what is opened."""
    models = iter((classifier(1), classifier(2)))
    monkeypatch.setattr(classifiers, "from_pretrained", lambda source, model: next(models))


COMMAND = ["robustness", "runs/shift", "--compare", "runs/dense", "--data", "digits", "--count", "3"]
PERTURBED = ["--rotation", "uniform:-20:20", "--noise", "uniform:0:0.1", "--tolerance", "20"]


def test_the_command_prints_means_and_shares_and_draws(qmcpy, opened, capsys, tmp_path):
    picture = tmp_path / "robustness.png"
    assert main([*COMMAND, *PERTURBED, "--output", str(picture)]) == 0
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if str(picture) not in line) <= 100
    for text in (
        "A: runs/shift",
        "B: runs/dense",
        "A - B",
        "3 images",
        "256 perturbations",
        "rotation",
        "noise",
    ):
        assert text in printed
    assert picture.stat().st_size > 10_000


def test_json_has_what_was_found(qmcpy, opened, capsys):
    assert main([*COMMAND, *PERTURBED, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["images"], found["evaluations"], found["rule"]) == (3, 256, "cone")
    assert found["parameters"] == ["rotation", "noise"]
    first, second = found["models"]
    assert first["source"] == "runs/shift"
    difference = first["accuracy"]["mean"] - second["accuracy"]["mean"]
    assert found["difference"]["accuracy"]["mean"] == pytest.approx(difference)
    assert len(first["sobol"]["total"]) == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "there is nothing to perturb by"),
        (["--rotation", "20"], "'20' is no distribution; write one as in uniform:-20:20"),
        (["--rotation", "uniform:-20:20", "--most", "1000"], "must be a power of two, got 1000"),
        (["--rotation", "uniform:-20:20", "--count", "0"], "--count must be at least 1, got 0"),
        (["--rotation", "uniform:-20:20", "--output", "a.gif"], "must end in .png or .svg"),
        (["--rotation", "uniform:-20:20"], "no file or folder runs/shift"),
    ],
)
def test_a_wrong_request_is_one_line(qmcpy, arguments, message, capsys):
    assert main([*COMMAND, *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line


def test_a_tolerance_out_of_reach_is_one_line(qmcpy, opened, capsys):
    options = ["--rotation", "uniform:-180:180", "--points", "iid", "--most", "256", "--tolerance", "0.001"]
    assert main([*COMMAND, *options]) == 2
    assert "not to 0.001; allow more evaluations" in capsys.readouterr().err.splitlines()[-1]
