"""The picture at the top of the README: ``python docs/figures.py`` writes ``docs/images/``.

Its times are those of ``docs/benchmarks.md``, which has the command that measured them.
"""

from collections.abc import Callable
from pathlib import Path

from benchmark_tables import measured, ratios
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch

from shiftaddvit_jax.pictures.style import COLORS

IMAGES = Path(__file__).with_name("images")

BLUE, ORANGE, GREEN = COLORS[:3]
GREY, INK = "#8C8C8C", "#222222"
STYLE = {
    "font.size": 11.5,
    "axes.titlesize": 13,
    "axes.titleweight": "bold",
    "axes.titlepad": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "svg.hashsalt": "shiftaddvit_jax",
}

# What computes a product, by an example, and where in a block it is.
PRIMITIVES = (
    ("multiply", BLUE, "0.27 · x", "a mixture's dense expert; patch embeddings, head"),
    (
        "shift",
        ORANGE,
        r"0.27 ≈ 2$^{-2}$,  so  x >> 2",
        "MatShift: linear layers, a mixture's shift expert",
    ),
    ("add", GREEN, r"codes + $-$ +,  so  x$_1$ $-$ x$_2$ + x$_3$", "MatAdd: the products among Q, K and V"),
)

# PVTv2-B0 with mixtures, one image, on its kernels; the others: how many times as long, in the same rounds.
_FOUND = measured("pvt_v2_b0_moe_amx")
_RATIOS = ratios(_FOUND)
OURS_MS = round(_FOUND["rows"][0]["median_ms"], 1)
NOTES = (
    "msa: multi-head self-attention; sra: the same with spatial reduction, PVTv2's own\n"
    "224 x 224 pixels, int8 (OpenVINO in bfloat16), random weights; "
    "two shared cores of an Intel Xeon with AMX"
)
TIMES = (
    ("ShiftAddViT\nTVM kernels", 1.0, ORANGE),
    ("dense, sra\nOpenVINO", _RATIOS["OpenVINO sra, default"], GREY),
    ("dense, sra\nONNX Runtime", _RATIOS["ONNX Runtime sra"], GREY),
    ("dense, msa\nOpenVINO", _RATIOS["OpenVINO msa, default"], BLUE),
    ("dense, msa\nONNX Runtime", _RATIOS["ONNX Runtime msa"], BLUE),
)


def draw_primitives(axes: Axes) -> None:
    """Three ways to compute a product, one a row."""
    axes.set(xlim=(0, 1), ylim=(0, 3))
    axes.set_axis_off()
    axes.set_title("Multiplications become shifts and additions", loc="left")
    for row, (name, color, example, where) in enumerate(PRIMITIVES):
        bottom = 2.06 - row
        box = FancyBboxPatch(
            (0.015, bottom),
            0.97,
            0.8,
            boxstyle="round,pad=0,rounding_size=0.04",
            facecolor=f"{color}22",
            edgecolor=color,
            linewidth=1.5,
            mutation_aspect=3,
        )
        axes.add_patch(box)
        axes.text(0.05, bottom + 0.56, name, weight="bold", va="center")
        axes.text(0.95, bottom + 0.56, example, va="center", ha="right", fontsize=13)
        axes.text(0.05, bottom + 0.22, where, va="center", fontsize=10.5)


def draw_times(axes: Axes) -> None:
    """Times of one image, beside other runtimes."""
    names, times, colors = zip(*TIMES, strict=True)
    bars = axes.barh(names, times, color=colors, height=0.66)
    labels = [f"{OURS_MS} ms", *(f"{time:.1f} times as long" for time in times[1:])]
    for bar, label in zip(bars, labels, strict=True):
        inside = bar.get_width() > max(times) / 2
        axes.annotate(
            label,
            (bar.get_width(), bar.get_y() + bar.get_height() / 2),
            xytext=(-6 if inside else 6, 0),
            textcoords="offset points",
            va="center",
            ha="right" if inside else "left",
            color="white" if inside else INK,
        )
    axes.invert_yaxis()
    axes.set_title("PVTv2-B0, time of one image", loc="left")
    axes.set_xlabel(f"times ShiftAddViT's {OURS_MS} ms")
    axes.tick_params(left=False)
    axes.spines[["top", "right", "left"]].set_visible(False)


def draw_overview() -> Figure:
    """What ShiftAddViT computes, and how fast that is."""
    figure = Figure(figsize=(10, 4.5), facecolor="white")
    draw_primitives(figure.add_axes((0.01, 0.15, 0.475, 0.75)))
    draw_times(figure.add_axes((0.64, 0.235, 0.335, 0.665)))
    figure.text(0.018, 0.03, NOTES, fontsize=10, linespacing=1.4)
    return figure


def write(draw: Callable[[], Figure], name: str) -> None:
    """Write what ``draw`` returns to ``docs/images/``; the same source gives the same bytes."""
    path = IMAGES / f"{name}.svg"
    with rc_context(STYLE):
        draw().savefig(path, metadata={"Date": None})
    print(f"written to {path}")


if __name__ == "__main__":
    write(draw_overview, "overview")
