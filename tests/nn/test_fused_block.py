import functools
import re
from concurrent.futures import ThreadPoolExecutor

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from jax import export
from numpy.lib.stride_tricks import sliding_window_view
from scipy.ndimage import correlate1d
from scipy.special import ndtr, softmax

from kernels_tvm.cpu import targets
from kernels_tvm.cpu.tiles import images_at_once
from shiftaddvit_jax.nn import Block, Primitives

GRID, CHANNELS, HEADS = (5, 7), 48, 2
RUNNING = [target.name for target in targets.TARGETS if targets.runs_here(target)]


def block_of(
    implementation, kind="moe", activations="float", threshold="sample", precision="float32", **arguments
):
    formats = {"activations": activations, "threshold": threshold, "precision": precision}
    primitives = Primitives(implementation=implementation, **formats)
    arguments = {"num_heads": HEADS, "attention": "hamming_linear", "depthwise": True} | arguments
    return Block(mlp=kind, projections=kind, primitives=primitives, **arguments)


def tokens(batch, grid=GRID, channels=CHANNELS, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, grid[0] * grid[1], channels)).astype(np.float32)


def random_variables(block, x, grid):
    """The block's parameters, all random: none is 0 or 1 as at the start."""
    shapes = jax.eval_shape(lambda key: block.init(key, x, grid), jax.random.key(0))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.3, leaf.shape).astype(np.float32), shapes)


class Reference:
    """The block in float64.

    Where rounding takes a number across a threshold, a code, a choice of expert or a whole number flips:
    ``margin`` is by image how far the nearest number is from its threshold, over the largest one.
    """

    def __init__(self, block, params):
        self.block, self.params, self.margin = block, params, np.ones(1)

    def __call__(self, x, grid):
        params, eps = self.params, self.block.layer_norm_eps or 1e-6
        x = x.astype(np.float64)
        x = x + self.attention(layer_norm(x, params["norm1"], eps), params["attn"], grid)
        return x + self.mlp(layer_norm(x, params["norm2"], eps), params["mlp"], grid)

    def keep_away(self, distance):
        self.margin = np.minimum(self.margin, distance.reshape(len(distance), -1).min(axis=1))

    def factors(self, *arrays):
        """As a dense layer multiplies them."""
        is_rounded = self.block.primitives.precision == "bfloat16"
        return (a.astype(ml_dtypes.bfloat16 if is_rounded else np.float64).astype(np.float64) for a in arrays)

    def linear(self, x, params, kind):
        if kind == "dense":
            x, kernel = self.factors(x, params["kernel"])
            return x @ kernel + params["bias"]
        if kind == "shift":
            weight = powers(params["kernel"])
            if self.block.primitives.activations == "int8":
                weight, scale = octaves(weight), np.abs(x).max(axis=-1, keepdims=True) / 127
                self.keep_away(np.abs(x / scale % 1 - 0.5) / 127)
                x = np.round(x / scale) * scale
            return x @ weight + params["bias"]
        logits = x @ params["router"]["kernel"].astype(np.float64) + params["router"]["bias"]
        dense, shift = (self.linear(x, params[expert], expert) for expert in ("dense", "shift"))
        self.keep_away(np.abs(logits[..., 0] - logits[..., 1]))
        gates = softmax(logits, axis=-1)
        return np.where(logits[..., :1] >= logits[..., 1:], gates[..., :1] * dense, gates[..., 1:] * shift)

    def attention(self, x, params, grid):
        batch, count, channels = x.shape
        heads = self.block.num_heads
        qkv = self.linear(x, params["qkv"], self.block.projections)
        q, k, v = qkv.reshape(batch, count, 3, heads, -1).transpose(2, 0, 3, 1, 4)
        if self.block.attention == "msa":
            y = softmax(q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]), axis=-1) @ v
        elif self.block.attention in ("hamming_quadratic", "binary_softmax"):
            y = softmax(self.code_scores(q, k, params.get("position_bias"), grid), axis=-1) @ v
        else:
            y = self.linear_angular(q, k, v, params["dconv"])
        y = y.transpose(0, 2, 1, 3).reshape(batch, count, channels)
        return self.linear(y, params["proj"], self.block.projections)

    def linear_angular(self, q, k, v, kernel):
        q, k = (self.codes(part / np.linalg.norm(part, axis=-1, keepdims=True)) for part in (q, k))
        y = v / 2 + q @ (k.swapaxes(-1, -2) @ v) / np.pi
        y /= np.linalg.norm(y, axis=-1, keepdims=True)
        for head in range(y.shape[1]):
            y[:, head] += correlate1d(v[:, head], kernel[:, head].astype(np.float64), 1, mode="constant")
        return y

    def code_scores(self, q, k, table, grid):
        products = np.einsum("bhnd,bhmd->bhnm", *(2 * self.codes(part) - 1 for part in (q, k)))
        if table is None:
            return products / np.sqrt(q.shape[-1])
        s_q, s_k = (np.abs(part).mean(axis=(-2, -1), keepdims=True) for part in (q, k))
        return s_q * s_k * products / np.sqrt(q.shape[-1]) + position_biases(table, grid, q.shape[-2])

    def codes(self, x):
        is_signs = self.block.attention == "binary_softmax"
        sample = self.block.primitives.threshold == "sample" and not is_signs
        limit = x.mean(axis=(-2, -1), keepdims=True) if sample else 0
        self.keep_away(np.abs(x - limit))
        return (x > limit).astype(np.float64)

    def mlp(self, x, params, grid):
        x = self.linear(x, params["fc1"], self.block.mlp)
        x = np.maximum(x, 0) if self.block.relu else x
        if self.block.depthwise:
            kernel = params["dwconv"]["kernel"].astype(np.float64)
            image = np.pad(x.reshape(len(x), *grid, -1), ((0, 0), (1, 1), (1, 1), (0, 0)))
            windows = sliding_window_view(image, (3, 3), axis=(1, 2))
            x = np.einsum("bhwcij,ijc->bhwc", windows, kernel).reshape(x.shape) + params["dwconv"]["bias"]
        return self.linear(x * ndtr(x), params["fc2"], self.block.mlp)


def position_biases(table, grid, count):
    """[heads, count, count]: the table's entry for a query's place minus a key's, or for a class token."""
    height, width = grid
    others = count - height * width
    image = table[:-3].reshape(2 * height - 1, 2 * width - 1, -1)
    biases = np.empty((count, count, table.shape[1]))
    biases[:others, others:], biases[others:, :others], biases[:others, :others] = table[-3:]
    places = np.indices(grid).reshape(2, -1)
    differences = places[:, :, None] - places[:, None, :]
    biases[others:, others:] = image[differences[0] + height - 1, differences[1] + width - 1]
    return biases.transpose(2, 0, 1)


def layer_norm(x, params, eps):
    centred = x - x.mean(axis=-1, keepdims=True)
    return (
        centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + eps) * params["scale"] + params["bias"]
    )


def powers(kernel):
    return np.sign(kernel) * 2.0 ** np.clip(np.round(np.log2(np.abs(kernel.astype(np.float64)))), -14, 0)


def octaves(weight):
    smallest = np.abs(weight).max(axis=0) / 64
    return np.sign(weight) * np.select(
        [np.abs(weight) >= smallest, np.abs(weight) >= smallest / 2], [np.abs(weight), smallest], 0
    )


@functools.cache
def case(batch=3, grid=GRID, channels=CHANNELS, others=0, **arguments):
    """Variables, images whose numbers stay far from their thresholds, and the block's outputs in float64.

    ``others`` tokens come before the grid.
    """
    block = block_of("xla", **arguments)
    x = tokens(10 * batch, (1, others + grid[0] * grid[1]), channels)
    variables = random_variables(block, x[:1], grid)
    reference = Reference(block, variables["params"])
    y = reference(x, grid)
    best = np.argsort(np.broadcast_to(reference.margin, len(x)))[-batch:]
    return variables, x[best], y[best]


def jitted(implementation="tvm", grid=GRID, **arguments):
    block = block_of(implementation, **arguments)
    return jax.jit(lambda variables, x: block.apply(variables, x, grid))


def kernels_of(function, *arguments):
    return re.findall(r"custom_call @\"?(shiftaddvit\.[\w.-]+)", function.lower(*arguments).as_text())


def assert_same(y, expected, activations="float", precision="float32"):
    error = np.abs(y - expected) / np.abs(expected).max()
    if (activations, precision) == ("float", "float32"):
        assert error.max() < 1e-5
    else:
        # Where rounding takes a number across a half, the next whole number is 1/127 of the largest away, and
        # the next number of bfloat16 1/128 of its own size.
        assert error.max() < 0.02
        assert np.median(error) < 1e-5


KINDS = [("dense", "float"), ("shift", "float"), ("shift", "int8"), ("moe", "float"), ("moe", "int8")]


@pytest.mark.parametrize(
    ("implementation", "depthwise", "kind", "activations"),
    [
        *(("tvm", True, *kind) for kind in KINDS),
        ("tvm", False, "dense", "float"),
        ("tvm", False, "moe", "int8"),
        ("xla", True, "dense", "float"),
        ("xla", True, "moe", "int8"),
    ],
)
def test_a_block_is_its_formula_in_float64(implementation, kind, activations, depthwise):
    arguments = {"kind": kind, "activations": activations, "depthwise": depthwise}
    variables, x, expected = case(**arguments)
    assert_same(jitted(implementation, **arguments)(variables, x), expected, activations)


@pytest.mark.parametrize("implementation", ["xla", "tvm"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"kind": "dense"},
        {"kind": "dense", "attention": "msa"},
        {"kind": "moe", "activations": "int8"},
    ],
    ids=str,
)
def test_a_block_in_bfloat16_is_its_formula_of_rounded_factors(implementation, arguments):
    variables, x, expected = case(precision="bfloat16", **arguments)
    y = jitted(implementation, precision="bfloat16", **arguments)(variables, x)
    assert_same(y, expected, precision="bfloat16")


@pytest.mark.parametrize(
    "arguments",
    [
        {"grid": (1, 1), "batch": 1, "kind": "moe", "activations": "int8"},
        {"grid": (1, 1), "batch": 3, "kind": "shift", "depthwise": False},
        {"grid": (1, 9), "batch": 1, "kind": "dense", "num_heads": 1, "layer_norm_eps": 0.1},
        {"grid": (9, 1), "batch": 2, "kind": "shift"},
        {"threshold": "zero", "kind": "shift", "num_heads": 3, "relu": True},
        {"kind": "moe", "num_heads": 6, "mlp_ratio": 1},
        {"grid": (17, 23), "batch": 1, "kind": "shift"},
        {"attention": "msa", "kind": "dense"},
        {"attention": "msa", "kind": "shift", "grid": (1, 1), "batch": 1, "num_heads": 6},
        {"attention": "msa", "kind": "dense", "grid": (1, 65), "batch": 1, "depthwise": False},
        {"attention": "hamming_quadratic", "kind": "dense"},
        {"attention": "hamming_quadratic", "kind": "shift", "threshold": "zero", "num_heads": 1},
        {"attention": "binary_softmax", "kind": "dense"},
        {"attention": "binary_softmax", "kind": "moe", "activations": "int8", "num_heads": 6},
        {"attention": "binary_softmax", "kind": "shift", "grid": (1, 1), "batch": 1},
        {"attention": "binary_softmax", "kind": "dense", "grid": (17, 18), "batch": 1, "num_heads": 1},
        {"attention": "binary_softmax", "kind": "dense", "grid": (9, 1), "others": 2, "depthwise": False},
        {"attention": "binary_softmax", "kind": "shift", "grid": (14, 14), "others": 1, "depthwise": False},
    ],
    ids=str,
)
def test_a_block_of_any_size_on_tvm_is_its_formula_in_float64(arguments):
    variables, x, expected = case(**arguments)
    settings = {name: value for name, value in arguments.items() if name not in ("batch", "others")}
    assert_same(jitted(**settings)(variables, x), expected, arguments.get("activations", "float"))


@pytest.mark.parametrize(
    ("attention", "grid", "kept", "at_once"),
    [
        ("hamming_linear", (50, 50), 3, 2),
        ("msa", (8, 8), 4, 85),
        ("hamming_quadratic", (20, 20), 4, 13),
    ],
)
def test_images_for_which_passes_take_turns_are_as_one_by_one(attention, grid, kept, at_once):
    assert images_at_once(kept * grid[0] * grid[1] * CHANNELS) == at_once
    variables, *_ = case(attention=attention, kind="dense")
    function = jitted(grid=grid, attention=attention, kind="dense")
    x = tokens(at_once + 1, grid)
    alone = [function(variables, image[None]) for image in x]
    np.testing.assert_array_equal(function(variables, x), np.concatenate(alone))


def test_a_class_token_beside_the_grid_is_a_token_like_the_others():
    variables, x, expected = case(grid=(1, 36), kind="shift", depthwise=False)
    assert_same(jitted(grid=(5, 7), kind="shift", depthwise=False)(variables, x), expected)


def test_biases_of_another_grid_are_interpolated_for_the_kernel_too():
    settings = {"attention": "binary_softmax", "kind": "dense", "trained_grid": (3, 3), "depthwise": False}
    variables, *_ = case(grid=(3, 3), **settings)
    assert variables["params"]["attn"]["position_bias"].shape == (28, HEADS)
    y, expected = (jitted(name, **settings)(variables, tokens(1)) for name in ("tvm", "xla"))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_eight_bit_probabilities_have_no_kernel_and_are_computed_op_by_op():
    variables, x, _ = case(attention="binary_softmax", kind="dense")
    block = block_of("tvm", attention="binary_softmax", kind="dense")
    block = block.clone(primitives=Primitives(implementation="tvm", attention_precision="int8"))
    function = jax.jit(lambda variables, x: block.apply(variables, x, GRID))
    assert not any("binary_softmax" in name for name in kernels_of(function, variables, x))
    expected = jitted("xla", attention="binary_softmax", kind="dense")(variables, x)
    assert np.median(np.abs(function(variables, x) - expected)) < 0.02 * np.abs(expected).max()


def test_shifts_and_products_are_the_same_numbers():
    arguments = {"kind": "shift", "activations": "int8"}
    variables, x, _ = case(**arguments)
    products, shifts = (
        jitted(implementation, **arguments)(variables, x) for implementation in ("tvm", "tvm_shift")
    )
    np.testing.assert_array_equal(shifts, products)


@pytest.mark.parametrize(
    ("attention", "kernel"),
    [
        ("hamming_linear", "hamming_linear"),
        ("msa", "softmax_attention"),
        ("hamming_quadratic", "binary_softmax"),
        ("binary_softmax", "binary_softmax"),
    ],
)
def test_a_block_is_two_kernels(attention, kernel):
    variables, x, _ = case(attention=attention, kind="dense")
    lowered = kernels_of(jitted(attention=attention, kind="dense"), variables, x)
    assert [re.match(r"shiftaddvit\.([a-z_]+)-", name)[1] for name in lowered] == [kernel, "mlp"]


def test_channels_that_do_not_fill_vectors_are_computed_op_by_op():
    variables, x, expected = case(channels=24, num_heads=3, kind="shift")
    function = jitted(num_heads=3, kind="shift")
    assert not any(re.search("hamming_linear|mlp", name) for name in kernels_of(function, variables, x))
    assert_same(function(variables, x), expected)


@pytest.mark.parametrize("target", RUNNING)
def test_a_block_on_every_target_is_its_formula(on_machine, target):
    on_machine(target=target)
    variables, x, expected = case(activations="int8")
    assert_same(jitted(activations="int8")(variables, x), expected, "int8")


@pytest.mark.parametrize("threads", [1, 16])
def test_a_block_for_any_number_of_threads_is_its_formula(on_machine, threads):
    on_machine(threads=threads)
    variables, x, expected = case(kind="shift")
    assert_same(jitted(kind="shift")(variables, x), expected)


def test_the_gradient_of_a_block_on_tvm_is_xlas():
    variables, x, _ = case(kind="shift")
    cotangent = tokens(3, seed=2)
    gradients = [
        jax.jit(jax.grad(lambda variables, x, apply=apply: jnp.vdot(apply(variables, x), cotangent), (0, 1)))(
            variables, x
        )
        for apply in (jitted(kind="shift"), jitted("xla", kind="shift"))
    ]
    for actual, expected in zip(*(jax.tree.leaves(gradient) for gradient in gradients), strict=True):
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_forward_mode_of_a_block_on_tvm_is_xlas():
    variables, x, _ = case(kind="shift")
    tangents = jax.tree.map(lambda leaf: np.cos(99 * leaf), (variables, x))
    (y, actual), (_, expected) = (
        jax.jit(lambda *tangents, apply=apply: jax.jvp(apply, (variables, x), tangents))(*tangents)
        for apply in (jitted(kind="shift"), jitted("xla", kind="shift"))
    )
    np.testing.assert_array_equal(y, jitted(kind="shift")(variables, x))
    np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_vmap_over_batches_is_one_larger_batch():
    variables, x, expected = case()
    mapped = jax.jit(jax.vmap(jitted(), in_axes=(None, 0)))(variables, x[:, None])
    assert_same(mapped[:, 0], expected)


def test_vmap_over_parameters_is_each_model_alone():
    variables, x, expected = case()
    negative = jax.tree.map(lambda leaf: -leaf, variables)
    both = jax.tree.map(lambda *leaves: np.stack(leaves), variables, negative)
    mapped = jax.jit(jax.vmap(jitted(), in_axes=(0, None)))(both, x)
    assert_same(mapped[0], expected)
    np.testing.assert_array_equal(mapped[1], jitted()(negative, x))


def test_an_exported_block_computes_the_same_when_it_is_read_again():
    variables, x, expected = case()
    function = jitted()
    allowed = [export.DisabledSafetyCheck.custom_call(name) for name in kernels_of(function, variables, x)]
    assert len(allowed) == 2
    exported = export.export(function, disabled_checks=allowed)(variables, x)
    read = export.deserialize(exported.serialize())
    np.testing.assert_array_equal(read.call(variables, x), function(variables, x))
    assert_same(read.call(variables, x), expected)


def test_eight_threads_at_once_compute_what_one_does():
    variables, _, _ = case()
    function, batches = jitted(), [tokens(3, seed=seed) for seed in range(8)]
    expected = [np.asarray(function(variables, x)) for x in batches]

    def repeatedly(x):
        return [np.asarray(function(variables, x)) for _ in range(5)]

    with ThreadPoolExecutor(8) as pool:
        for outputs, one in zip(pool.map(repeatedly, batches), expected, strict=True):
            for output in outputs:
                np.testing.assert_array_equal(output, one)


def alone(variables, expert):
    """The variables of a block whose linear layers are that expert of the mixtures."""
    mlp, attention = variables["params"]["mlp"], variables["params"]["attn"]
    return {
        "params": variables["params"]
        | {
            "mlp": mlp | {name: mlp[name][expert] for name in ("fc1", "fc2")},
            "attn": attention | {name: attention[name][expert] for name in ("qkv", "proj")},
        }
    }


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize("expert", ["dense", "shift"])
def test_a_mixture_routed_to_one_expert_is_that_expert_alone(expert, activations):
    variables, x, _ = case(activations=activations)
    bias = np.float32([100, -100] if expert == "dense" else [-100, 100])
    routed = jax.tree_util.tree_map_with_path(
        lambda path, leaf: bias if path[-2].key == "router" and path[-1].key == "bias" else leaf, variables
    )
    y = jitted(activations=activations)(routed, x)
    expected = jitted(kind=expert, activations=activations)(alone(routed, expert), x)
    np.testing.assert_allclose(y, expected, rtol=1e-6, atol=1e-6 * np.abs(expected).max())
