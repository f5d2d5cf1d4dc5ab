"""Weights and images that stand in for those of training and of real data.

`random_variables` and `random_images` are for time, which no number's size changes. `trained_like_variables`
and `natural_images` are for the error that number formats cause, which hangs on the statistics of numbers.
"""

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Float, PyTree

from shiftaddvit_jax.models.gnt import Samples
from shiftaddvit_jax.models.inspect import Examples, square_grid
from shiftaddvit_jax.models.variables import HEADS, variable_shapes

# Of `trained_like_variables`.
DEGREES = 5  # of freedom of Student's t
OUTLIERS, OUTLIER_SCALES = 0.005, (10.0, 30.0)  # share of channels, at least one, and what their scale is
LOUD = 0.1  # share of the outputs that hear an outlier channel as they hear the others
HEAD_GAIN = 3.0  # standard deviation of logits
BIAS, EMBEDDING = 0.05, 0.1  # standard deviations
_BLOCK = re.compile(r"(.*block\d+)/")
_CLOSING = re.compile(r".*/(proj|fc2)(/\w+)?/kernel")  # of a branch's last layer

DARK_AND_BRIGHT = (-2.0, 2.5)  # of `natural_images`


def random_images(shape: Sequence[int]) -> Float[np.ndarray, "batch height width 3"]:
    """The normally distributed images that every contestant sees."""
    return np.random.default_rng(0).standard_normal(shape, np.float32)


def random_examples(shapes: Mapping[str, Sequence[int]]) -> Examples:
    """The images, or samples of rays, that every contestant sees, from shapes by their names."""
    if "images" in shapes:
        return random_images(shapes["images"])
    drawn: dict[str, Any] = {name: random_images(shape) for name, shape in shapes.items()}
    return Samples(**drawn | {"visible": drawn["visible"] > -1})


def random_variables(model: nn.Module) -> PyTree:
    """Random weights that keep activations near 1, always the same.

    NumPy draws them at once, where `init_variables` would compile a program for seconds. No array is uniform,
    as none is after training: XLA would make a uniform constant anew in every call of a program.
    """
    weights, around = np.random.default_rng(0), np.random.default_rng(1)

    def draw(path, leaf):
        if leaf.ndim == 1:
            mean = np.float32(path[-1].key == "scale")
            return mean + np.float32(0.02) * around.standard_normal(leaf.shape, np.float32)
        return weights.standard_normal(leaf.shape, np.float32) / math.sqrt(math.prod(leaf.shape[:-1]))

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(model))


def trained_like_variables(model: nn.Module, seed: int) -> PyTree:
    """Random weights of a dense model whose statistics are like those of training; a seed's are the same.

    - Kernels are heavy-tailed: Student's t with five degrees of freedom, of variance 1 / inputs. That of a
      branch's last layer is divided by the number of branches, so that tokens stay bounded in any depth.
    - A few channels are outliers: each LayerNorm in a block scales some 0.5 % of its channels, at least one,
      by 10 to 30, and the kernels that read it have weights as much smaller there for nine tenths of their
      outputs. They are the same channels in all blocks of a width.
    - Other scales are log-normal about 1. Biases and class tokens are small, and heavy-tailed too.
    - Position embeddings are smooth: in each channel three cosines, of at most one period along each side.

    That activations have such outliers, in few channels, in all tokens, and in the same channels of all
    layers, is known of trained language models (LLM.int8(), arXiv 2208.07339; SmoothQuant, arXiv 2211.10438).
    The numbers here are choices. What training does to directions is not in them: kernels have full rank, and
    most of the logits' power is common to all images, so that errors weigh more than in a trained model.
    Methods can be compared by them, not models.

    Args:
      model: from `create_model`, with dense layers.
      seed: of NumPy's generator.
    """
    shapes: dict[str, Any] = flatten_dict(variable_shapes(model), sep="/")
    branches = 2 * len({match[0] for match in map(_BLOCK.match, shapes) if match})
    random = np.random.default_rng(seed)

    def draw(name, shape):
        leaf = name.rpartition("/")[2]
        in_block = _BLOCK.match(name) is not None
        if leaf == "scale":
            scales = np.exp(0.2 * random.standard_normal(shape))
            return scales * _outlier_scales(seed, shape[0]) if in_block else scales
        if leaf == "pos_embed":
            return _smooth_embeddings(random, *shape)
        tails = random.standard_t(DEGREES, shape) * math.sqrt((DEGREES - 2) / DEGREES)  # of variance 1
        if leaf != "kernel":
            return BIAS * tails
        kernel = tails / math.sqrt(math.prod(shape[:-1]))
        if not in_block:
            return HEAD_GAIN * kernel if name.split("/")[1] in HEADS else kernel
        if _CLOSING.fullmatch(name):
            return kernel / math.sqrt(branches)
        if "/dwconv/" in name:  # reads no LayerNorm
            return kernel
        is_quiet = random.random(shape[-1]) >= LOUD
        return kernel / np.where(is_quiet, _outlier_scales(seed, shape[-2])[:, None], 1)

    found = {name: np.asarray(draw(name, leaf.shape), leaf.dtype) for name, leaf in shapes.items()}
    return unflatten_dict(found, sep="/")


def _outlier_scales(seed, channels):
    """By how much every LayerNorm of so many channels scales each of them: 1, and more for outliers."""
    random = np.random.default_rng((seed, channels))
    scales = np.ones(channels)
    chosen = random.choice(channels, max(1, round(OUTLIERS * channels)), replace=False)
    scales[chosen] = random.uniform(*OUTLIER_SCALES, len(chosen))
    return scales


def _smooth_embeddings(random, tokens, channels):
    """Embeddings that vary slowly over a grid of tokens, and random ones of tokens before it."""
    first, side = square_grid(tokens)
    axis = np.linspace(0, 1, side)
    places = np.stack(np.meshgrid(axis, axis, indexing="ij"), axis=-1).reshape(-1, 2)
    waves = random.uniform(-1, 1, (3, 2, channels))
    phases = random.uniform(0, 2 * math.pi, (3, 1, channels))
    grid = np.cos(2 * math.pi * places @ waves + phases).sum(axis=0) / math.sqrt(3 / 2)
    return EMBEDDING * np.concatenate([random.standard_normal((first, channels)), grid])


def natural_images(count: int, size: int, seed: int) -> Float[np.ndarray, "count size size 3"]:
    """Images with the spectrum of photographs, as a model's input, float32; a seed's are the same.

    Amplitudes fall as 1 / frequency (Field, J. Opt. Soc. Am. A 4, 2379, 1987). Phases are random, so there
    are no edges. Colours share nine tenths of their variance. Over many images the mean is 0 and the variance
    some 1, as of normalized photographs; the least and largest values are about those of black and of white
    pixels.
    """
    random = np.random.default_rng(seed)
    axis = np.fft.fftfreq(size)
    amplitude = 1 / np.maximum(np.hypot(axis[:, None], axis), 1 / size)
    amplitude /= np.sqrt(np.mean(np.square(amplitude)))

    def draw():
        noise = random.standard_normal((4, size, size))
        gray, *colors = np.fft.ifft2(np.fft.fft2(noise) * amplitude).real
        return math.sqrt(0.9) * gray[..., None] + math.sqrt(0.1) * np.stack(colors, axis=-1)

    images = [np.clip(draw(), *DARK_AND_BRIGHT).astype(np.float32) for _ in range(count)]
    return np.stack(images)
