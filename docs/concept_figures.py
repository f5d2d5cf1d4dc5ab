"""The pictures of ``docs/concepts.md``: ``python docs/concept_figures.py`` writes them to ``docs/images/``.

Figures in them are computed here, and printed. `tests/test_docs.py` holds the page's tables to them, and
`tests/nn/test_moe.py` routers that are trained on the balancing loss alone.
"""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
from benchmark_tables import measured
from figures import BLUE, GREEN, GREY, INK, ORANGE, write
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyBboxPatch, Rectangle

from shiftaddvit_jax.costs import Operations, sum_operations, trace_products
from shiftaddvit_jax.nn import MoEDense, latency_aware_loss, make_attention, routing_loss
from shiftaddvit_jax.nn.moe import aimed_shift_share
from shiftaddvit_jax.ops import binarize, power_of_two, two_power_numbers, two_powers_of_two

WIDTH = 6.4  # inches: letters stay legible on a phone
SMALL = 10

GRID, HEAD_DIM = (56, 56), 32  # of PVTv2-B0's first block
ATTENTIONS = ("msa", "sra", "linear", "hamming_quadratic", "hamming_linear")
WEIGHT_SHAPE = 768, 768
TRAINED_RATIOS, SEEDS = (1.0, 1.5, 2.0, 3.0, 4.0), 3
# What `shiftaddvit measure-latency pvt_v2_b0 --attention hamming_linear --mlp moe --activations int8` wrote.
MEASURED = "latencies_pvt_v2_b0_amx"


def attention_operations() -> dict[str, Operations]:
    """Operations among Q, K and V in the first block of PVTv2-B0, of one image at 224 x 224."""
    tokens = jax.ShapeDtypeStruct((1, math.prod(GRID), HEAD_DIM), jnp.float32)
    counted = {}
    for kind in ATTENTIONS:
        layer = make_attention(kind, num_heads=1, sr_ratio=8)
        call = partial(layer.apply, grid=GRID)
        variables = jax.eval_shape(partial(layer.init, grid=GRID), jax.random.key(0), tokens)
        products = trace_products(call, variables, tokens)
        counted[kind] = sum_operations(each for each in products if not each.module)
    return counted


def measured_ratios() -> list[float]:
    """How many times as long PVTv2-B0's dense experts take as its shift experts, layer by layer."""
    latencies = [layer["latencies"] for layer in measured(MEASURED)["layers"]]
    return [dense / shift for dense, shift in latencies]


def draw_matrix(axes: Axes, left: float, middle: float, cells: np.ndarray, color: str, name: str) -> float:
    """A matrix, shaded by ``cells`` in [0, 1], and its name below; returns where it ends."""
    rows, columns = cells.shape
    for (row, column), shade in np.ndenumerate(cells):
        corner = left + column, middle + rows / 2 - row - 1
        alpha = 0.12 + 0.88 * shade
        axes.add_patch(Rectangle(corner, 1, 1, facecolor=(color, alpha), edgecolor="white", linewidth=0.8))
    axes.text(left + columns / 2, middle - rows / 2 - 0.35, name, ha="center", va="top", fontsize=SMALL)
    return left + columns


def draw_attention() -> Figure:
    """The products of three kinds of attention, for 8 tokens and 3 numbers a head."""
    figure = Figure(figsize=(WIDTH, 5.6), facecolor="white")
    axes = figure.add_axes((0.01, 0.01, 0.98, 0.98))
    axes.set(xlim=(0, 46), ylim=(0, 40.2), aspect="equal")
    axes.set_axis_off()
    random = np.random.default_rng(0)
    tokens, head_dim = 8, 3
    values = random.uniform(0.2, 0.9, (tokens, head_dim))
    numbers = random.uniform(0.2, 0.9, (2, tokens, head_dim))
    codes = (numbers > numbers.mean((1, 2), keepdims=True)).astype(float)
    scores = np.exp(5 * numbers[0] @ numbers[1].T)
    weights = scores / scores.max(1, keepdims=True)
    rows = (
        ("softmax", BLUE, "2 N² d multiplications, N² exponentials", numbers, weights),
        ("linear-angular", BLUE, "2 N d² multiplications", numbers, None),
        ("codes in Hamming space", GREEN, "2 N d² additions", codes, None),
    )
    for at, (title, color, cost, (queries, keys), between) in enumerate(rows):
        top, middle = 39.6 - 13.4 * at, 32.4 - 13.4 * at
        axes.text(0.4, top, title, weight="bold", va="top")
        axes.text(45.6, top, cost, va="top", ha="right", color=INK)

        def sign(x, text, middle=middle):
            axes.text(x, middle, text, ha="center", va="center", fontsize=12)

        if between is None:
            end = draw_matrix(axes, 2, middle, queries, color, "Q, N x d")
            sign(end + 2, "· (")
            end = draw_matrix(axes, end + 3.6, middle, keys.T, color, "Kᵀ, d x N")
            sign(end + 1, "·")
            end = draw_matrix(axes, end + 2, middle, values, GREY, "V, N x d")
            sign(end + 2, ")  =")
            end = draw_matrix(axes, end + 4, middle, queries, color, "Q")
            sign(end + 1, "·")
            summed = keys.T @ values
            draw_matrix(axes, end + 2, middle, summed / summed.max(), GREY, "d x d")
        else:
            sign(3, "softmax (")
            end = draw_matrix(axes, 6.6, middle, queries, color, "Q, N x d")
            sign(end + 1, "·")
            end = draw_matrix(axes, end + 2, middle, keys.T, color, "Kᵀ, d x N")
            sign(end + 1.8, ") ·")
            end = draw_matrix(axes, end + 3.2, middle, values, GREY, "V, N x d")
            sign(end + 1.2, "=")
            end = draw_matrix(axes, end + 2.4, middle, between, color, "N x N")
            sign(end + 1, "·")
            draw_matrix(axes, end + 2, middle, values, GREY, "V")
    return figure


def agreement(angles: np.ndarray, pairs: int = 4000) -> np.ndarray:
    """The share of equal codes of ``pairs`` random pairs of vectors at each angle, [angles, pairs]."""
    random = np.random.default_rng(0)
    first, other = random.standard_normal((2, pairs, HEAD_DIM))
    first /= np.linalg.norm(first, axis=-1, keepdims=True)
    other -= np.sum(other * first, axis=-1, keepdims=True) * first
    other /= np.linalg.norm(other, axis=-1, keepdims=True)
    second = np.cos(angles)[:, None, None] * first + np.sin(angles)[:, None, None] * other
    codes = [
        np.asarray(binarize(jnp.float32(each), "zero", implementation="xla")) for each in (first, second)
    ]
    return np.mean(codes[0] == codes[1], axis=-1)


def draw_angles() -> Figure:
    """Similarity by angle: the angular kernel, its linear part, and codes."""
    figure = Figure(figsize=(WIDTH, 3.6), facecolor="white", layout="constrained")
    axes = figure.subplots()
    angles = np.linspace(0, np.pi, 37)
    degrees = np.degrees(angles)
    shares = agreement(angles)
    mean, deviation = shares.mean(1), shares.std(1)
    axes.fill_between(degrees, mean - deviation, mean + deviation, color=GREEN, alpha=0.25, linewidth=0)
    label = f"share of equal codes, {HEAD_DIM} bits:\nmean and standard deviation"
    axes.plot(degrees, mean, "o", color=GREEN, markersize=4, label=label)
    axes.plot(degrees, 1 - angles / np.pi, color=BLUE, linewidth=2, label=r"angular kernel, 1 $-$ θ / π")
    linear = 1 / 2 + np.cos(angles) / np.pi
    axes.plot(degrees, linear, "--", color=ORANGE, linewidth=2, label="its linear part, 1/2 + cos(θ) / π")
    axes.set(xlim=(0, 180), ylim=(0, 1), xticks=range(0, 181, 30))
    axes.set_xlabel("angle θ between a query and a key, degrees")
    axes.set_ylabel("similarity")
    axes.legend(frameon=False, fontsize=SMALL)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def rounding_errors() -> list[tuple[str, int, float]]:
    """Rows (grid, levels, signal to noise in decibels) of Gaussian weights rounded to each grid.

    Each output has a scale: of integers that of its largest weight, of powers the power of two next to it.
    """
    weight = np.random.default_rng(0).normal(size=WEIGHT_SHAPE).astype(np.float32)
    largest = np.abs(weight).max(0)

    def decibels(rounded):
        return float(10 * np.log10(np.mean(weight**2) / np.mean((np.asarray(rounded) - weight) ** 2)))

    found = []
    for bits in range(3, 9):
        scale = largest / (2 ** (bits - 1) - 1)
        found.append(("integers", 2**bits - 1, decibels(np.round(weight / scale) * scale)))
    for bits in range(3, 6):
        scale = 2.0 ** np.round(np.log2(largest))
        rounded = power_of_two(jnp.asarray(weight / scale), bits) * scale
        found.append(("one power", 2**bits - 1, decibels(rounded)))
    levels = 2 * len(two_power_numbers()) - 1  # 0 has one sign
    found.append(("two powers", levels, decibels(two_powers_of_two(jnp.asarray(weight)))))
    return found


def worth_in_bits(errors: list[tuple[str, int, float]], grid: str) -> float:
    """Bits of the integers that have as small an error as the finest grid of a kind."""
    integers = [(np.log2(levels + 1), decibels) for kind, levels, decibels in errors if kind == "integers"]
    bits, decibels = zip(*integers, strict=True)
    return float(np.interp(max(each for kind, _, each in errors if kind == grid), decibels, bits))


def draw_grids() -> Figure:
    """The levels of three grids, and their errors by the number of levels."""
    figure = Figure(figsize=(WIDTH, 5.4), facecolor="white", layout="constrained")
    lines, errors = figure.subplots(2, 1, height_ratios=(1, 1.7))
    grids = (
        ("integers, 8 bits", np.arange(128), GREY),
        ("two powers", two_power_numbers(), GREEN),
        ("one power", np.append(0, 2.0 ** np.arange(-14, 1)), ORANGE),
    )
    for row, (_, levels, color) in enumerate(grids):
        lines.vlines(levels / levels.max(), row - 0.32, row + 0.32, color=color, linewidth=1.2)
    lines.set(xlim=(-0.005, 1.005), yticks=range(len(grids)), yticklabels=[name for name, *_ in grids])
    lines.set_xlabel("magnitudes of a weight, as shares of the largest")
    lines.tick_params(left=False)
    lines.spines[["top", "right", "left"]].set_visible(False)

    found = rounding_errors()
    styles = {"integers": ("o-", GREY), "one power": ("s-", ORANGE), "two powers": ("D", GREEN)}
    for kind, (style, color) in styles.items():
        points = [(np.log2(levels), decibels) for grid, levels, decibels in found if grid == kind]
        errors.plot(*zip(*points, strict=True), style, color=color, markersize=7, linewidth=2)
    offsets = {
        "integers": ((-12, 10), "right"),
        "one power": ((8, -4), "left"),
        "two powers": ((10, -4), "left"),
    }
    for kind, (offset, side) in offsets.items():
        _, levels, decibels = next(each for each in reversed(found) if each[0] == kind)
        text = f"{kind}, {levels} levels:\n{decibels:.1f} dB"
        at = np.log2(levels), decibels
        errors.annotate(text, at, xytext=offset, textcoords="offset points", ha=side, va="center")
    errors.set(xlim=(2.6, 8.2), ylim=(0, 50))
    errors.set_xlabel("information in a weight, log2(levels), bits")
    errors.set_ylabel("signal to noise, dB")
    errors.spines[["top", "right"]].set_visible(False)
    return figure


def trained_share(ratio: float, seed: int) -> float:
    """Tokens on the shift expert after a router was trained on the balancing loss alone, a share.

    Args:
      ratio: how many times as fast as the dense expert the shift expert is.
      seed: of the router and the tokens, which are Gaussian.
    """
    inputs, tokens, steps = 16, 512, 300
    layer, optimizer = MoEDense(1), optax.adam(optax.cosine_decay_schedule(0.05, steps))
    keys = jax.random.split(jax.random.key(seed), 3)
    params = layer.init(keys[0], jnp.zeros((1, inputs)))["params"]

    def loss(router, key):
        x = jax.random.normal(key, (tokens, inputs))
        variables, streams = {"params": params | {"router": router}}, {"router": key}
        _, state = layer.apply(variables, x, train=True, rngs=streams, mutable=["routing"])
        return routing_loss(state["routing"], (ratio, 1.0))

    def step(carry, key):
        router, state = carry
        updates, state = optimizer.update(jax.grad(loss)(router, key), state)
        return (optax.apply_updates(router, updates), state), None

    start = params["router"], optimizer.init(params["router"])
    (router, _), _ = jax.jit(lambda: jax.lax.scan(step, start, jax.random.split(keys[1], steps)))()
    fresh = jax.random.normal(keys[2], (40 * tokens, inputs))
    return float(jnp.mean(jnp.argmax(fresh @ router["kernel"] + router["bias"], axis=-1)))


def trained_shares() -> dict[float, list[float]]:
    """`trained_share` for each ratio and seed."""
    return {ratio: [trained_share(ratio, seed) for seed in range(SEEDS)] for ratio in TRAINED_RATIOS}


def draw_latencies() -> Figure:
    """The balancing loss by the share of tokens, and the share at which it is 0 by the experts' latencies."""
    figure = Figure(figsize=(WIDTH, 3.5), facecolor="white", layout="constrained")
    losses, aims = figure.subplots(1, 2)
    shares = np.linspace(0, 1, 101)
    ratios = {"1 : 1": (1.0, GREY), "6 : 4": (1.5, ORANGE), "3 : 1": (3.0, BLUE)}
    for name, (ratio, color) in ratios.items():
        tokens = jnp.float32(np.stack([1 - shares, shares], axis=-1))
        loss = jax.vmap(latency_aware_loss, (0, 0, None))(tokens, tokens, (ratio, 1.0))
        losses.plot(100 * shares, loss, color=color, linewidth=2, label=name)
    losses.set(xlim=(0, 100), ylim=(0, 4.2), xlabel="tokens on the shift expert, %", ylabel="loss")
    losses.legend(title="latencies,\ndense : shift", frameon=False, fontsize=SMALL, title_fontsize=SMALL)

    ratios = np.linspace(0.5, 4.5, 200)
    least, most = min(measured_ratios()), max(measured_ratios())
    aims.axvspan(least, most, color=GREEN, alpha=0.18, linewidth=0)
    aims.text((least + most) / 2, 41, "PVTv2-B0,\none Xeon", ha="center", va="bottom", fontsize=SMALL)
    aims.plot(ratios, 100 * ratios / (1 + ratios), color=BLUE, linewidth=2)
    for ratio, found in trained_shares().items():
        aims.plot([ratio] * len(found), 100 * np.array(found), "o", color=ORANGE, markersize=5, zorder=3)
    aims.set(xlim=(0.5, 4.5), ylim=(30, 85), xticks=(1, 2, 3, 4))
    aims.set_xlabel("latency, dense / shift")
    aims.set_ylabel("tokens on the shift expert, %")
    for axes in (losses, aims):
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def draw_box(axes: Axes, left: float, bottom: float, width: float, height: float, color: str) -> None:
    """A rounded box, filled lightly."""
    axes.add_patch(
        FancyBboxPatch(
            (left, bottom),
            width,
            height,
            boxstyle="round,pad=0,rounding_size=0.06",
            facecolor=f"{color}22",
            edgecolor=color,
            linewidth=1.5,
        )
    )


def draw_arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    """An arrow from ``start`` to ``end``."""
    axes.annotate("", end, start, arrowprops={"arrowstyle": "-|>", "color": INK, "shrinkA": 0, "shrinkB": 0})


def draw_kernel() -> Figure:
    """How a Flax module's call becomes machine code."""
    traced = (
        ("a Flax module is called", "nn/block.py", "x + attention(norm(x)), its weights packed"),
        ("the plan describes a kernel", "nn/plan.py", "what is computed: layers, heads, tokens, format"),
        (
            "arrays in the kernel's order",
            "ops/implementation/fused.py",
            "packed codes, exponents; vectors as one array",
        ),
        (
            "a custom call joins the program",
            "ops/implementation/custom_call.py",
            "jax.ffi.ffi_call(name, shapes)(*arrays)",
        ),
        ("each call: XLA runs the program", "", "the kernel reads and writes XLA's arrays, on all cores"),
    )
    made = (
        (
            "in the cache?",
            "kernels_tvm/store.py",
            "by description, CPU,\nthreads, versions and\nsource of the kernels",
        ),
        ("if not: loops in TIR", "kernels_tvm/cpu/", "emitted from the\ndescription"),
        ("TVM compiles them", "kernels_tvm/cpu/build.py", "by LLVM; the library\nis kept on disk"),
        ("a function by name", "jax_tvm_ffi", "registered with XLA,\nonce a process"),
    )
    figure = Figure(figsize=(WIDTH, 6.9), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, 6.9))
    axes.set_axis_off()
    top, between, left, right, width = 6.42, 0.36, 0.1, 4.2, 3.6
    axes.text(0.12, 6.68, "while JAX traces, once a shape", weight="bold", va="center")
    axes.text(right + 0.02, 6.68, "once a machine", weight="bold", va="center")
    low, high = 0.98, 1.315
    for boxes, x, wide, height in ((traced, left, width, low), (made, right, 2.08, high)):
        for at, (title, file, text) in enumerate(boxes):
            bottom = top - height - at * (height + between)
            color = ORANGE if boxes is made else BLUE if file else GREY
            draw_box(axes, x, bottom, wide, height, color)
            y = bottom + height
            axes.text(x + 0.12, y - 0.2, title, weight="bold", va="center", fontsize=SMALL + 0.5)
            mono = {"family": "monospace", "color": "#555555"}
            axes.text(x + 0.12, y - 0.48, file, va="center", fontsize=SMALL - 1, **mono)
            axes.text(
                x + 0.12, y - (0.66 if file else 0.5), text, va="top", fontsize=SMALL - 1, linespacing=1.3
            )
            if at:
                middle = x + wide / 2
                draw_arrow(axes, (middle, y + between), (middle, y))
    # The custom call asks for its function, which XLA's program will call.
    asks, answer = top - 3 * (low + between) - low / 2, top - high / 2
    edge, channel = left + width, (left + width + right) / 2
    axes.plot((edge, channel, channel), (asks, asks, answer), color=INK, linewidth=1)
    draw_arrow(axes, (channel, answer), (right, answer))
    draw_arrow(axes, (right, 0.58), (edge, 0.58))
    return figure


def draw_stages() -> Figure:
    """Which primitive computes what, before and after each stage."""
    columns = ("dense", "stage 1", "stage 2")
    rows = (
        ("products among\nQ, K and V", ("multiply", "add", "add")),
        ("linear layers of\nthe attention", ("multiply", "multiply", "shift or mixture")),
        ("linear layers of\nthe MLP", ("multiply", "multiply", "shift or mixture")),
        ("patches, norms,\nhead", ("multiply", "multiply", "multiply")),
    )
    colors = {"multiply": BLUE, "add": GREEN, "shift or mixture": ORANGE}
    figure = Figure(figsize=(WIDTH, 3.9), facecolor="white")
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, WIDTH), ylim=(0, 3.9))
    axes.set_axis_off()
    left, width, gap = 1.42, 1.42, 0.24
    for at, name in enumerate(columns):
        middle = left + at * (width + gap) + width / 2
        axes.text(middle, 3.66, name, weight="bold", ha="center", va="center")
        if at:
            start = left + at * (width + gap) - gap
            draw_arrow(axes, (start - 0.3, 3.66), (start + gap + 0.3, 3.66))
            axes.text(
                start + gap / 2,
                0.16,
                "reparameterize,\nfinetune",
                ha="center",
                va="center",
                fontsize=SMALL - 1,
            )
    for row, (name, primitives) in enumerate(rows):
        bottom = 2.72 - row * 0.78
        axes.text(0.08, bottom + 0.33, name, va="center", fontsize=SMALL, linespacing=1.3)
        for at, primitive in enumerate(primitives):
            x = left + at * (width + gap)
            draw_box(axes, x, bottom, width, 0.66, colors[primitive])
            axes.text(x + width / 2, bottom + 0.33, primitive, ha="center", va="center", fontsize=SMALL)
    return figure


PICTURES = {
    "concept_attention": draw_attention,
    "concept_angles": draw_angles,
    "concept_grids": draw_grids,
    "concept_latencies": draw_latencies,
    "concept_kernel": draw_kernel,
    "concept_stages": draw_stages,
}

if __name__ == "__main__":
    for kind, operations in attention_operations().items():
        print(kind, operations)
    errors = rounding_errors()
    for grid, levels, decibels in errors:
        print(f"{grid}, {levels} levels: {decibels:.1f} dB")
    for grid in ("one power", "two powers"):
        print(f"{grid} is worth {worth_in_bits(errors, grid):.1f} bits of integers")
    for ratio, shares in trained_shares().items():
        aim = aimed_shift_share((ratio, 1.0))
        print(f"{ratio}: {100 * aim:.1f} %; trained", ", ".join(f"{100 * share:.1f}" for share in shares))
    for name, draw in PICTURES.items():
        write(draw, name)
