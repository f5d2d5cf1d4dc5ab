import numpy as np
import pytest
from PIL import Image

from shiftaddvit_jax.bench import Latency
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.pictures import (
    plot_confusions,
    plot_front,
    plot_history,
    plot_latency,
    plot_routing_history,
)
from shiftaddvit_jax.pictures.costs import pareto_front


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


def test_the_front_holds_what_no_other_point_betters():
    points = [(3, 0.9), (1, 0.5), (2, 0.4), (2, 0.7), (4, 0.9)]
    assert pareto_front(points) == [(1, 0.5), (2, 0.7), (3, 0.9)]


def test_latencies_are_compared_block_by_block_where_a_kernel_computes_one(tmp_path):
    apart = Latency(1.0, {"embed": 0.1, "block1/attn": 0.2, "block1/mlp": 0.3, "block2/mlp": 0.1}, 0.05, 1)
    whole = Latency(0.5, {"embed": 0.1, "block1": 0.2, "block2": 0.1}, 0.05, 1)
    figure = plot_latency({"dense": apart, "packed": whole}, tmp_path / "latency.svg")
    (panel,) = figure.axes
    labels = [label.get_text() for label in panel.get_yticklabels()]
    assert labels == ["embed", "blocks", "between modules", "call"]
    widths = [[bar.get_width() for bar in bars] for bars in panel.containers]
    np.testing.assert_allclose(widths, [[0.1, 0.6, 0.25, 0.05], [0.1, 0.3, 0.05, 0.05]])
    assert panel.get_legend().get_texts()[1].get_text() == "packed: 0.500 ms, -50.0 %"
    assert "(ms)" in panel.get_xlabel()


def test_shares_are_drawn_by_stage():
    history = [
        {"step": step, "shift_share/stage1/fc1": 0.01 * step, "shift_share/stage2/fc1": 0.5}
        for step in (10, 20)
    ]
    figure = plot_routing_history(history)
    assert [panel.get_title() for panel in figure.axes] == ["stage1", "stage2"]
    np.testing.assert_allclose(figure.axes[0].lines[0].get_ydata(), [10, 20])
    assert "%" in figure.get_supylabel()
    with pytest.raises(ValueError, match="has no MoE layers"):
        plot_routing_history([{"step": 1, "loss": 1.0}])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["nonsense", "runs", "--output", "a.png"],
            "unknown picture 'nonsense'; known: energy, latency,",
        ),
        (["routing", "runs", "--output", "a.gif"], "must end in .png or .svg"),
        (["routing", "runs", "--output", "nowhere/a.png"], "there is no such folder"),
        (["routing", "nothing", "--output", "a.png"], "no checkpoint at"),
    ],
)
def test_what_cannot_be_drawn_is_refused(arguments, message, capsys):
    assert main(["plot", *arguments]) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert message in error[0]


def test_a_front_of_errors_over_decades_shows_all_of_them(tmp_path):
    """On the picture, the least error that is not 0 stands above that of the dense model."""
    points = [(2.0, 0.02), (4.0, 3e-4), (80.0, 0.0)]
    front = [
        {"budget": cost, "cost": cost, "measured": error, "random": None, "greedy": error}
        for cost, error in points
    ]
    report = {
        "front": front,
        "uniform": {"shift": {"cost": 2.0, "measured": 0.02}, "dense": {"cost": 80.0, "measured": 0.0}},
        "budget": 10.0,
        "unit": "uJ",
        "loss": "error",
    }
    (axes,) = plot_front(report, tmp_path / "front.png").axes
    heights = axes.transData.transform([(cost, error) for cost, error in points])[:, 1]
    assert heights[1] - heights[2] > 0.2 * (heights[0] - heights[2])
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["search", "greedy", "budget"]
