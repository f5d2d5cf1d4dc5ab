import numpy as np
from PIL import Image

from shiftaddvit_jax.analysis import plot_confusions, plot_history


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def test_confusions_show_the_mistakes(tmp_path):
    right = np.diag([5, 6, 7])
    wrong = right + np.array([[0, 3, 0], [0, 0, 0], [1, 0, 0]])
    figure = plot_confusions({"good": right, "bad": wrong}, ("a", "b", "c"), tmp_path / "confusion.png")
    good, bad = figure.axes[:2]
    assert good.get_title() == "good: 100.00% right, 0 of 18 wrong"
    assert bad.get_title() == "bad: 81.82% right, 4 of 22 wrong"
    np.testing.assert_array_equal(bad.images[0].get_array(), [[0, 3, 0], [0, 0, 0], [1, 0, 0]])
    assert pixels(tmp_path / "confusion.png").std() > 10


def test_histories_are_drawn_with_units(tmp_path):
    history = [{"step": step, "task_loss": 1 / step, "accuracy": 1 - 1 / step} for step in (1, 2, 3)]
    figure = plot_history({"dense": history}, tmp_path / "training.png")
    loss, accuracy = figure.axes
    np.testing.assert_allclose(accuracy.lines[0].get_ydata(), [0, 50, 200 / 3])
    assert "nats" in loss.get_ylabel()
    assert "%" in accuracy.get_ylabel()
    assert pixels(tmp_path / "training.png").std() > 10
