"""Pictures of what happens inside a model: where tokens go, what they attend to, what weights become."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path

import numpy as np
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import ListedColormap, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import PercentFormatter

from shiftaddvit_jax.models.inspect import natural_order, square_grid
from shiftaddvit_jax.nn.moe import EXPERTS
from shiftaddvit_jax.pictures.style import COLORS, EXPERT_COLORS, save_figure

MOST_COLUMNS = 6
MAP_COLORS, OPACITY = "cividis", 0.65  # for what is drawn over an image
LAYER_ORDER = ("q", "kv", "qk", "v", "qkv", "proj", "fc1", "fc2")
Image = UInt8[np.ndarray, "side side 3"]


def plot_routing(
    images: Sequence[Image],
    routed: Mapping[str, Bool[np.ndarray, "batch _tokens"]],  # of each layer their own number
    path: str | Path | None = None,
) -> Figure:
    """Which tokens each MoE layer sends to which expert, drawn over the images; a row for each block.

    Args:
      images: the images that the model saw.
      routed: the result of `routed_tokens` for these images.
      path: see `shiftaddvit_jax.pictures`.

    Raises:
      ValueError: a model without MoE layers.
    """
    if not routed:
        raise ValueError("there is no routing to draw: the model has no mixtures of experts")
    blocks: dict[str, dict[str, str]] = {}
    for name in sorted(routed, key=natural_order):
        module, _, layer = name.rpartition("/")
        blocks.setdefault(module.removesuffix("/attn").removesuffix("/mlp"), {})[layer] = name
    layers = sorted({layer for names in blocks.values() for layer in names}, key=_in_block)
    columns = len(layers) * len(images)
    size = (max(4.5, 0.9 + 1.15 * columns), 0.7 + 1.25 * len(blocks))
    figure = Figure(figsize=size, layout="constrained")
    axes = figure.subplots(len(blocks), columns, squeeze=False, subplot_kw={"xticks": [], "yticks": []})
    for panels, (block, names) in zip(axes, blocks.items(), strict=True):
        panels[0].set_ylabel(block, fontsize=9)
        for panel, (index, layer) in zip(panels, product(range(len(images)), layers), strict=True):
            if layer in names:
                share = _draw_experts(panel, images[index], routed[names[layer]][index])
                panel.set_title(f"{layer}: {share:.0%}", fontsize=9)
            else:
                panel.spines[:].set_visible(False)
    handles = [
        Patch(color=EXPERT_COLORS["dense"], label="multiplication expert"),
        Patch(color=EXPERT_COLORS["shift"], label="shift expert (its share of the tokens in %)"),
    ]
    figure.legend(handles=handles, loc="outside upper center", ncols=2, frameon=False)
    return save_figure(figure, path)


def _draw_experts(panel: Axes, image, shifted):
    """Draw the image in grey under its tokens' colors; return the shift expert's share of all tokens."""
    others, side = square_grid(len(shifted))
    extent = (0, side, side, 0)
    panel.imshow(image.mean(axis=-1), cmap="gray", extent=extent)
    colors = ListedColormap([EXPERT_COLORS[expert] for expert in EXPERTS])
    panel.imshow(shifted[others:].reshape(side, side), colors, vmin=0, vmax=1, alpha=OPACITY, extent=extent)
    return shifted.mean()


def plot_attention(
    image: Image,
    maps: Mapping[str, Mapping[str, Float[np.ndarray, "_heads _tokens _others"]]],
    path: str | Path | None = None,
    query: tuple[float, float] = (0.5, 0.5),
) -> Figure:
    """What one token attends to in each layer, the mean over its heads; a row for each model.

    Args:
      image: the image that the models saw.
      maps: those of `attention_maps` for this image, by the models' names; layers with fewer than four keys
        are left out, and at most six layers are drawn.
      path: see `shiftaddvit_jax.pictures`.
      query: where the token is, as shares of the image's height and width.

    Raises:
      ValueError: no model with a map to draw.
    """
    drawn = {
        model: [
            name for name in sorted(layers, key=natural_order) if square_grid(layers[name].shape[-1])[1] > 1
        ]
        for model, layers in maps.items()
    }
    names = sorted({name for layers in drawn.values() for name in layers}, key=natural_order)
    if not names:
        raise ValueError("there are no attention maps to draw: no attention has weights of four tokens")
    chosen = np.unique(np.linspace(0, len(names) - 1, min(MOST_COLUMNS, len(names))).round().astype(int))
    names = [names[index] for index in chosen]
    size = (2.4 + 2.1 * len(names), 0.5 + 2.3 * len(maps))
    figure = Figure(figsize=size, layout="constrained")
    no_ticks = {"xticks": [], "yticks": []}
    axes = figure.subplots(len(maps), 1 + len(names), squeeze=False, subplot_kw=no_ticks)
    for panels, (model, layers) in zip(axes, maps.items(), strict=True):
        panels[0].imshow(image)
        panels[0].set_ylabel(model)
        side = image.shape[0]
        panels[0].plot(query[1] * side, query[0] * side, "o", color=COLORS[3], markeredgecolor="w")
        for panel, name in zip(panels[1:], names, strict=True):
            if name in drawn[model]:
                weights = _draw_attention(panel, image, layers[name], query)
                panel.set_xlabel(f"up to {100 * weights.max():.1f} % a token", fontsize=9)
            else:
                panel.set_axis_off()
    for panel, name in zip(axes[0], ["the token", *names], strict=True):
        panel.set_title(name.removesuffix("/attn"), fontsize=10)
    scale = ScalarMappable(Normalize(0, 100), MAP_COLORS)
    bar = figure.colorbar(scale, ax=axes, shrink=0.8, pad=0.01, alpha=OPACITY)
    bar.set_label("share of the token's attention,\n% of the panel's largest")
    return save_figure(figure, path)


def _draw_attention(panel, image, weights, query):
    """Draw the weights of the token at ``query`` over the image in grey; return them."""
    others, side = square_grid(weights.shape[-2])
    row, column = (min(side - 1, int(place * side)) for place in query)
    key_others, key_side = square_grid(weights.shape[-1])
    seen = weights.mean(axis=0)[others + row * side + column, key_others:].reshape(key_side, key_side)
    extent = (0, side, side, 0)
    panel.imshow(image.mean(axis=-1), cmap="gray", extent=extent)
    panel.imshow(100 * seen / seen.max(), MAP_COLORS, vmin=0, vmax=100, alpha=OPACITY, extent=extent)
    panel.add_patch(Rectangle((column, row), 1, 1, fill=False, edgecolor=COLORS[3], linewidth=2))
    return seen


def plot_weights(
    layers: Mapping[str, tuple[np.ndarray | None, np.ndarray]], path: str | Path | None = None
) -> Figure:
    """Histograms of all shift layers' weights, before and after rounding to powers of two.

    The left panel shows the weights, in the range where most lie; the right one their exponents, log2 |w|.

    Args:
      layers: the result of `shift_weights`: weights before (None if only the powers are kept) and after.
      path: see `shiftaddvit_jax.pictures`.

    Raises:
      ValueError: a model without shift layers.
    """
    if not layers:
        raise ValueError("there are no power-of-two weights to draw: the model has no shift layers")
    before = [np.ravel(weight) for weight, _ in layers.values() if weight is not None]
    after = np.concatenate([np.ravel(weight) for _, weight in layers.values()])
    figure = Figure(figsize=(10, 4.2), layout="constrained")
    linear, logarithmic = figure.subplots(1, 2)
    # From the 1st to the 99th percentile, so that the powers near 0 can be told apart.
    limit = float(np.quantile(np.abs(after), 0.99)) or 1.0
    levels, counts = np.unique(after, return_counts=True)
    shares = 100 * counts / after.size
    seen = np.abs(levels) <= 1.05 * limit
    linear.vlines(levels[seen], 0, shares[seen], color=COLORS[1], linewidth=2, label="after: powers of two")
    exponents = np.log2(np.abs(levels[levels != 0]))
    places, where = np.unique(exponents, return_inverse=True)
    heights = np.bincount(where, weights=shares[levels != 0])
    logarithmic.bar(places, heights, 0.25, color=COLORS[1], label="after", zorder=2)
    if before:
        before = np.concatenate(before)
        bins = np.linspace(-limit, limit, 121)
        style = {"histtype": "stepfilled", "color": COLORS[0], "alpha": 0.5}
        weights = np.full(before.size, 100 / before.size)
        linear.hist(before, bins, weights=weights, label="before (120 bins)", **style)
        magnitudes = np.log2(np.maximum(np.abs(before), np.finfo(np.float32).tiny))
        low, high = np.floor(places.min()) - 1, np.ceil(places.max()) + 1
        bins = np.arange(low - 0.5, high + 0.75, 0.25)
        logarithmic.hist(magnitudes, bins, weights=weights, label="before (bins of 1/4)", **style)
    linear.set_xlabel("weight")
    linear.set_xlim(-1.08 * limit, 1.08 * limit)
    logarithmic.set_xlabel("exponent of the weight, log2 |w|")
    for panel in (linear, logarithmic):
        panel.set_ylabel(f"weights (% of {after.size:,})")
        panel.yaxis.set_major_formatter(PercentFormatter(decimals=0))
        panel.grid(alpha=0.3)
        panel.legend(frameon=False)
    return save_figure(figure, path)


def _in_block(layer):
    """A key that sorts a block's layers in the order of their computation, and others last."""
    return LAYER_ORDER.index(layer) if layer in LAYER_ORDER else len(LAYER_ORDER)
