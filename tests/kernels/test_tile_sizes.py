"""Kernels compute the same whatever tile sizes are on record for them."""

import dataclasses

import numpy as np
import pytest
from linear_references import blocks, dense_int8, whole_product, whole_tokens
from numpy.lib.stride_tricks import sliding_window_view
from scipy.special import expit, ndtr

from kernels_tvm.cpu import targets
from kernels_tvm.cpu.linear import few_rows
from kernels_tvm.cpu.tuning import CHOICES
from kernels_tvm.descriptions import LinearDescription, MlpDescription
from kernels_tvm.store import Kernel
from shiftaddvit_jax.ops import pack_weight

GRID, CHANNELS, HIDDEN = (9, 8), 16, 32
# One target for each table of choices.
TABLES = [target for target in targets.TARGETS if target.name in ("amx", "avx512", "avx2")]
RUNNING = [target for target in TABLES if targets.runs_here(target)]


def variants(*names):
    return [
        dataclasses.replace(target, **{name: value})
        for target in RUNNING
        for name in names
        for value in CHOICES[target.name].get(name, ())
        if value != getattr(target, name)
    ]


def tiles_of(target):
    sizes = (target.float_tile, target.int8_tile, target.strip_bytes, target.convolved_tokens)
    return f"{target.name}-{sizes}".replace(" ", "")


def random(*shape, seed=0):
    return np.random.default_rng(seed).normal(0, 0.5, shape).astype(np.float32)


def assert_near(y, expected):
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


class MlpCase:
    """A dense MLP with a depthwise convolution: its arrays, and its outputs in float64."""

    def __init__(self, images=2, grid=GRID, channels=CHANNELS):
        self.grid, self.channels = grid, channels
        self.x = random(images, grid[0] * grid[1], channels)
        shapes = [(channels,)] * 2 + [(channels, HIDDEN), (HIDDEN,), (9, HIDDEN), (HIDDEN,)]
        shapes += [(HIDDEN, channels), (channels,)]
        self.parameters = [random(*shape, seed=seed) for seed, shape in enumerate(shapes)]
        scale, shift, kernel1, bias1, taps, conv_bias, kernel2, bias2 = map(np.float64, self.parameters)
        centred = self.x - self.x.mean(axis=-1, keepdims=True, dtype=np.float64)
        normalized = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-6) * scale + shift
        image = (normalized @ kernel1 + bias1).reshape(images, *grid, HIDDEN)
        padded = np.pad(image, ((0, 0), (1, 1), (1, 1), (0, 0)))
        windows = sliding_window_view(padded, (3, 3), axis=(1, 2))
        hidden = np.einsum("bhwcij,ijc->bhwc", windows, taps.reshape(3, 3, HIDDEN)) + conv_bias
        hidden = (hidden * ndtr(hidden)).reshape(images, -1, HIDDEN)
        self.y = self.x + hidden @ kernel2 + bias2

    def run(self, run_kernel, target, threads=2):
        fc1, fc2 = (
            LinearDescription("dense", self.channels, HIDDEN),
            LinearDescription("dense", HIDDEN, self.channels),
        )
        mlp = MlpDescription(fc1, fc2, 1e-6, self.x.shape[1], self.grid)
        output = self.x.shape, "float32"
        scale, shift, kernel1, *between, kernel2, bias2 = self.parameters
        arrays = [self.x, scale, shift, blocks(kernel1), *between, blocks(kernel2), bias2]
        return run_kernel(Kernel("mlp", mlp), target, arrays, output, threads=threads)


@pytest.mark.parametrize("target", RUNNING[-1:], ids=lambda target: target.name)
@pytest.mark.parametrize("threads", [1, 4])
@pytest.mark.parametrize("rows", [1, 2, 5])
def test_strips_of_any_height_are_convolved_across_their_borders(run_kernel, target, threads, rows):
    # Two more rows are neighbours.
    strip_bytes = 4 * (GRID[1] + 2) * HIDDEN * (rows + 2)
    case = MlpCase()
    assert_near(case.run(run_kernel, dataclasses.replace(target, strip_bytes=strip_bytes), threads), case.y)


@pytest.mark.parametrize("target", RUNNING, ids=lambda target: target.name)
def test_strips_give_the_same_numbers_whoever_claims_them(run_kernel, target):
    # Which of two threads finds the rows above a strip in its own memory differs from run to run.
    target = dataclasses.replace(target, strip_bytes=4 * (GRID[1] + 2) * HIDDEN * 4)
    case = MlpCase(images=7)
    alone = case.run(run_kernel, target, threads=1)
    for threads in (2, 2, 2, 5):
        np.testing.assert_array_equal(case.run(run_kernel, target, threads), alone)


@pytest.mark.parametrize("target", RUNNING, ids=lambda target: target.name)
@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("at_once", [1, 2, 9])
def test_few_tokens_are_computed_by_columns_however_many_images_at_once(run_kernel, target, threads, at_once):
    case = MlpCase(images=5, grid=(3, 7), channels=48)
    assert few_rows(3 * 7, LinearDescription("dense", 48, HIDDEN))
    strip_bytes = 4 * (3 + 2) * (7 + 2) * HIDDEN * at_once
    assert_near(case.run(run_kernel, dataclasses.replace(target, strip_bytes=strip_bytes), threads), case.y)


@pytest.mark.parametrize("strip_bytes", [1, 3000])
def test_rows_by_columns_are_cut_into_turns(run_kernel, strip_bytes):
    x, kernel, bias = random(70, 48), random(48, 80), random(80, seed=1)
    target = dataclasses.replace(RUNNING[-1], strip_bytes=strip_bytes)
    arrays = [x, blocks(kernel), bias]
    y = run_kernel(
        Kernel("linear", LinearDescription("dense", 48, 80)), target, arrays, ((70, 80), "float32")
    )
    assert_near(y, x.astype(np.float64) @ kernel + bias)


@pytest.mark.parametrize("variant", variants("float_tile", "strip_bytes", "convolved_tokens"), ids=tiles_of)
def test_an_mlp_is_its_formula_with_every_tile_size_that_is_tried(run_kernel, variant):
    case = MlpCase()
    assert_near(case.run(run_kernel, variant), case.y)


@pytest.mark.parametrize("variant", variants("float_tile", "int8_tile"), ids=tiles_of)
def test_a_mixture_is_its_formula_with_every_tile_size_that_is_tried(run_kernel, variant):
    rng = np.random.default_rng(0)
    x = rng.integers(-127, 128, (101, 35)).astype(np.float32)
    x[:, 0] = 127
    router, bias, kernel = random(35, 2), np.float32([0.1, 0]), random(35, 150)
    weight = (rng.choice([-1, 1], (35, 150)) * 2.0 ** rng.integers(-6, 1, (35, 150))).astype(np.float32)
    dense = [blocks(kernel), np.zeros(160, np.float32)]
    packed = [*map(np.asarray, pack_weight(weight, 4)), np.zeros(160, np.float32)]
    linear = Kernel("linear", LinearDescription("moe", 35, 150, 4, "int8"))
    y = run_kernel(linear, variant, [x, router, bias, *dense, *packed], ((101, 150), "float32"))
    logit = x.astype(np.float64) @ (router[:, 0] - router[:, 1]) + 0.1
    chosen = np.where(logit[:, None] >= 0, x.astype(np.float64) @ kernel, x.astype(np.float64) @ weight)
    assert_near(y, expit(np.abs(logit))[:, None] * chosen)


@pytest.mark.parametrize("variant", variants("int8_tile"), ids=tiles_of)
def test_a_dense_layer_in_int8_is_its_formula_with_every_tile_size_that_is_tried(run_kernel, variant):
    rng = np.random.default_rng(0)
    x, (parameters, numbers, scale) = whole_tokens(rng, 101, 35), dense_int8(rng, 35, 150)
    linear = Kernel("linear", LinearDescription("dense", 35, 150, precision="int8"))
    y = run_kernel(linear, variant, [x, *parameters], ((101, 150), "float32"))
    np.testing.assert_array_equal(y, whole_product(x, numbers, scale))
