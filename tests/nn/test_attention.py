import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.linalg import hadamard
from scipy.ndimage import correlate1d
from scipy.special import ndtr, softmax

from shiftaddvit_jax.nn import ATTENTION_KINDS, Primitives, make_attention
from shiftaddvit_jax.nn.attention import HASH_ANCHORS, HASH_BITS, weigh_values
from shiftaddvit_jax.ops import power_of_two

BATCH, GRID, CHANNELS, HEADS = 2, (4, 5), 12, 3
TOKENS, HEAD_DIM = 20, 4
KINDS = pytest.mark.parametrize("kind", ATTENTION_KINDS)
HASHED = ("ecoformer", "hamming_ksh")


def images(batch=BATCH, seed=1):
    return np.random.default_rng(seed).normal(size=(batch, TOKENS, CHANNELS)).astype(np.float32)


def layer_of(kind, **arguments):
    return make_attention(kind, num_heads=HEADS, sr_ratio=2 if kind == "sra" else 1, **arguments)


@functools.cache
def variables_of(kind):
    """Random values, well away from 0, in the place of every parameter, hash and random feature."""
    init = jax.jit(lambda key, x: layer_of(kind).init(key, x, GRID))
    shapes = jax.eval_shape(init, jax.random.key(0), images())
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)


@functools.cache
def jitted(kind, **arguments):
    layer = layer_of(kind, **arguments)
    return jax.jit(lambda variables, x: layer.apply(variables, x, GRID))


# The references: float64, and every attention as an explicit matrix of tokens by tokens.


def linear(x, params):
    return x @ params["kernel"].astype(np.float64) + params["bias"]


def split(x, heads=HEADS):
    return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3)


def join(x):
    return x.transpose(0, 2, 1, 3).reshape(x.shape[0], x.shape[2], -1)


def qkv(params, x, heads=HEADS):
    return [split(part, heads) for part in np.split(linear(x, params["qkv"]), 3, axis=-1)]


def unit(x):
    return x / np.linalg.norm(x, axis=-1, keepdims=True)


def above_own_mean(x):
    return (x > x.mean(axis=(-2, -1), keepdims=True)).astype(np.float64)


def products(q, k):
    return q @ k.swapaxes(-1, -2)


def convolved_over_tokens(params, values):
    y = np.empty(values.shape)
    for head in range(HEADS):
        y[:, head] = correlate1d(
            values[:, head], params["dconv"][:, head].astype(np.float64), 1, mode="constant"
        )
    return y


def linear_angular(params, q, k, v):
    return unit(v / 2 + products(q, k) @ v / np.pi) + convolved_over_tokens(params, v)


def hashed_codes(variables, x):
    hashing = {name: leaf.astype(np.float64) for name, leaf in variables["hash"].items()}
    shared = unit(split(linear(x, variables["params"]["qk"])))
    distance = ((shared[:, :, :, None] - hashing["anchors"][None, :, None]) ** 2).sum(axis=-1)
    kernel = np.exp(-distance / (2 * distance.mean(axis=(-2, -1), keepdims=True)))
    features = kernel - hashing["kernel_mean"][None, :, None]
    return (features @ hashing["projection"].swapaxes(-1, -2) > 0).astype(np.float64)


def msa(variables, x):
    q, k, v = qkv(variables["params"], x)
    return softmax(products(q, k) / np.sqrt(HEAD_DIM), axis=-1) @ v


def normalized(params, x):
    centred = x - x.mean(axis=-1, keepdims=True)
    x = centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)
    return x * params["scale"] + params["bias"]


def attention_to(variables, x, reduced):
    params = variables["params"]
    k, v = (split(part) for part in np.split(linear(reduced, params["kv"]), 2, axis=-1))
    q = split(linear(x, params["q"]))
    return softmax(products(q, k) / np.sqrt(HEAD_DIM), axis=-1) @ v


def sra(variables, x):
    params = variables["params"]
    kernel = params["sr"]["kernel"].astype(np.float64)
    image = x.reshape(-1, *GRID, CHANNELS)[:, :4, :4].reshape(-1, 2, 2, 2, 2, CHANNELS)
    reduced = np.einsum("byixjc,ijcd->byxd", image, kernel) + params["sr"]["bias"]
    return attention_to(variables, x, normalized(params["norm"], reduced.reshape(len(x), 4, CHANNELS)))


def linear_sra(variables, x):
    params = variables["params"]
    image = x.reshape(-1, *GRID, CHANNELS)
    rows, columns = ([(i * side // 7, -(-(i + 1) * side // 7)) for i in range(7)] for side in GRID)
    pooled = [image[:, a:b, c:d].mean(axis=(1, 2)) for a, b in rows for c, d in columns]
    mixed = np.stack(pooled, axis=1) @ params["sr"]["kernel"][0, 0].astype(np.float64) + params["sr"]["bias"]
    reduced = normalized(params["norm"], mixed)
    return attention_to(variables, x, reduced * ndtr(reduced))


def linear_attention(variables, x):
    q, k, v = qkv(variables["params"], x)
    return products(q, k) @ v / np.sqrt(HEAD_DIM)


def performer(variables, x):
    projection = variables["features"]["projection"].astype(np.float64)

    def features(x, across):
        x = x / HEAD_DIM**0.25
        projected = x @ projection.T
        length = (x**2).sum(axis=-1, keepdims=True)
        return np.exp(projected - length / 2 - projected.max(axis=across, keepdims=True)) + 1e-4

    q, k, v = qkv(variables["params"], x)
    weights = products(features(q, -1), features(k, (-2, -1)))
    return weights / weights.sum(axis=-1, keepdims=True) @ v


def ecoformer(variables, x):
    codes = hashed_codes(variables, x)
    values = split(linear(x, variables["params"]["v"]))
    similarity, bias = products(codes, codes), HASH_BITS + 1
    return (similarity @ values + bias * values) / (similarity + bias).sum(axis=-1, keepdims=True)


def hamming_linear(variables, x):
    q, k, v = qkv(variables["params"], x)
    return linear_angular(variables["params"], above_own_mean(unit(q)), above_own_mean(unit(k)), v)


def hamming_ksh(variables, x):
    codes = hashed_codes(variables, x)
    return linear_angular(variables["params"], codes, codes, split(linear(x, variables["params"]["v"])))


def hamming_quadratic(variables, x):
    q, k, v = qkv(variables["params"], x)
    q, k = above_own_mean(q), above_own_mean(k)
    distance = (q[..., :, None, :] != k[..., None, :, :]).sum(axis=-1)
    return softmax((HEAD_DIM - 2 * distance) / np.sqrt(HEAD_DIM), axis=-1) @ v


def codes_of_signs(x):
    return np.where(x > 0, 1.0, -1.0)


def biases(table, grid, others=0):
    """The bias of every pair of tokens, [heads, tokens, tokens], pair by pair."""
    height, width = grid
    places = [None] * others + [(row, column) for row in range(height) for column in range(width)]
    image = table[:-3].reshape(2 * height - 1, 2 * width - 1, -1)
    found = np.empty((len(places), len(places), table.shape[1]))
    for i, query in enumerate(places):
        for j, key in enumerate(places):
            if query and key:
                found[i, j] = image[query[0] - key[0] + height - 1, query[1] - key[1] + width - 1]
            else:
                found[i, j] = table[-3 if key else -2 if query else -1]
    return found.transpose(2, 0, 1)


def binary_probabilities(variables, x, grid=GRID, others=0):
    q, k, v = qkv(variables["params"], x, variables["params"]["position_bias"].shape[1])
    s_q, s_k = (np.abs(part).mean(axis=(-2, -1), keepdims=True) for part in (q, k))
    scores = s_q * s_k * products(codes_of_signs(q), codes_of_signs(k)) / np.sqrt(q.shape[-1])
    return softmax(scores + biases(variables["params"]["position_bias"], grid, others), axis=-1), v


def binary_softmax(variables, x):
    probabilities, v = binary_probabilities(variables, x)
    return probabilities @ v


REFERENCES = {
    "msa": msa,
    "sra": sra,
    "linear_sra": linear_sra,
    "linear": linear_attention,
    "performer": performer,
    "ecoformer": ecoformer,
    "hamming_linear": hamming_linear,
    "hamming_ksh": hamming_ksh,
    "hamming_quadratic": hamming_quadratic,
    "binary_softmax": binary_softmax,
}


def reference(kind, variables, x):
    return linear(join(REFERENCES[kind](variables, x.astype(np.float64))), variables["params"]["proj"])


@KINDS
def test_every_kind_is_its_formula_in_float64(implementation, kind):
    variables, x = variables_of(kind), images()
    y = jitted(kind, primitives=Primitives(implementation=implementation))(variables, x)
    np.testing.assert_allclose(y, reference(kind, variables, x), rtol=1e-4, atol=1e-4)


@KINDS
def test_a_batch_has_the_outputs_of_its_images_one_by_one(kind):
    variables, x = variables_of(kind), images(3)
    x[1:] *= np.float32([2, 0.1])[:, None, None]
    one_by_one = np.concatenate([jitted(kind)(variables, image[None]) for image in x])
    largest = np.abs(one_by_one).max()  # "linear" is cubic in its input, with outputs in the hundreds
    np.testing.assert_allclose(jitted(kind)(variables, x) / largest, one_by_one / largest, rtol=0, atol=1e-5)


@functools.cache
def jitted_gradients(kind):
    def loss(params, x, rest):
        return jnp.sum(layer_of(kind).apply({"params": params, **rest}, x, GRID) ** 2)

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


def gradients(kind, variables, x):
    rest = {name: collection for name, collection in variables.items() if name != "params"}
    return jitted_gradients(kind)(variables["params"], x, rest)


@KINDS
def test_gradients_are_finite_and_reach_every_parameter(kind):
    grad_params, grad_x = gradients(kind, variables_of(kind), images())
    assert np.all(np.isfinite(grad_x))
    for path, gradient in jax.tree_util.tree_leaves_with_path(grad_params):
        assert np.all(np.isfinite(gradient)), path
        assert np.any(gradient != 0), path


@KINDS
def test_an_image_of_zeros_has_finite_outputs_and_gradients(kind):
    # Biases of zero too: every query, key and value is a vector of zeros.
    variables = jax.tree_util.tree_map_with_path(
        lambda path, leaf: np.zeros_like(leaf) if path[-1].key == "bias" else leaf, variables_of(kind)
    )
    x = np.zeros((BATCH, TOKENS, CHANNELS), np.float32)
    np.testing.assert_array_equal(jitted(kind)(variables, x), 0)
    assert all(np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradients(kind, variables, x)))


@KINDS
def test_bfloat16_is_near_float32(kind):
    variables, x = variables_of(kind), images()
    y = jitted(kind, primitives=Primitives(dtype=jnp.bfloat16))(variables, x)
    assert y.dtype == jnp.bfloat16
    expected = reference(kind, variables, x)
    # Codes near their threshold flip, so the binary kinds are near only in the mean.
    error = np.abs(np.asarray(y, np.float64) - expected).mean() / np.abs(expected).mean()
    assert error < (0.02 if kind in ("msa", "sra", "linear_sra", "linear", "performer") else 0.2)


@KINDS
def test_shift_projections_are_dense_ones_rounded_to_powers_of_two(kind):
    variables, x = variables_of(kind), images()
    projections = ("q", "kv", "qk", "v", "qkv", "proj")
    rounded = jax.tree_util.tree_map_with_path(
        lambda path, leaf: (
            power_of_two(leaf) if path[-2].key in projections and path[-1].key == "kernel" else leaf
        ),
        variables,
    )
    y = jitted(kind, projections="shift")(variables, x)
    np.testing.assert_allclose(y, jitted(kind)(rounded, x), rtol=1e-5, atol=1e-5)
    assert np.any(np.abs(y - jitted(kind)(variables, x)) > 1e-2)


@KINDS
def test_heads_that_do_not_divide_the_channels_are_an_error(kind):
    layer = make_attention(kind, num_heads=5)
    with pytest.raises(ValueError, match="12 channels do not split into 5 heads"):
        jax.eval_shape(layer.init, jax.random.key(0), images(), GRID)


def test_an_unknown_kind_names_the_nearest():
    with pytest.raises(ValueError, match="kind of attention 'haming_linear'; did you mean 'hamming_linear'"):
        make_attention("haming_linear", num_heads=1)


def test_sra_without_reduction_is_msa_with_other_parameters():
    params = variables_of("msa")["params"]
    kernels = np.split(params["qkv"]["kernel"], [CHANNELS], axis=1)
    biases = np.split(params["qkv"]["bias"], [CHANNELS])
    parts = [{"kernel": kernel, "bias": bias} for kernel, bias in zip(kernels, biases, strict=True)]
    sra_params = {"q": parts[0], "kv": parts[1], "proj": params["proj"]}
    y = make_attention("sra", num_heads=HEADS).apply({"params": sra_params}, images(), GRID)
    np.testing.assert_allclose(y, jitted("msa")({"params": params}, images()), rtol=1e-5, atol=1e-5)


def test_the_threshold_of_the_codes_is_that_of_the_primitives():
    variables, x = variables_of("hamming_linear"), images()
    x[1] *= 5
    outputs = [
        jitted("hamming_linear", primitives=Primitives(threshold=threshold))(variables, x)
        for threshold in ("sample", "tensor", "zero")
    ]
    assert all(np.any(np.abs(outputs[i] - outputs[j]) > 1e-3) for i, j in [(0, 1), (0, 2), (1, 2)])


@pytest.mark.parametrize("kind", HASHED)
def test_the_hash_is_a_collection_of_its_own(kind):
    shapes = jax.tree.map(np.shape, variables_of(kind)["hash"])
    assert shapes == {
        "anchors": (HEADS, HASH_ANCHORS, HEAD_DIM),
        "kernel_mean": (HEADS, HASH_ANCHORS),
        "projection": (HEADS, HASH_BITS, HASH_ANCHORS),
    }


@functools.cache
def jitted_learning(kind):
    def learn(variables, x, key):
        return layer_of(kind).apply(variables, x, GRID, rngs={"hash": key}, mutable=["hash"])

    return jax.jit(learn)


@pytest.mark.parametrize("kind", HASHED)
def test_a_mutable_hash_is_learned_from_the_tokens_and_used_at_once(kind):
    variables, x = variables_of(kind), images()
    y, learned = jitted_learning(kind)(variables, x, jax.random.key(0))
    shared = unit(split(linear(x, variables["params"]["qk"])))
    for head in range(HEADS):
        distance = learned["hash"]["anchors"][head][:, None] - shared[:, head].reshape(-1, HEAD_DIM)
        np.testing.assert_allclose(np.abs(distance).max(axis=-1).min(axis=1), 0, atol=1e-6)
    again = jitted(kind)({**variables, **learned}, x)
    np.testing.assert_allclose(y, again, rtol=1e-5, atol=1e-5)


def test_learning_a_hash_is_deterministic_for_its_key():
    variables, x = variables_of("hamming_ksh"), images()
    first, again, other = (
        jitted_learning("hamming_ksh")(variables, x, jax.random.key(seed))[1]["hash"]["projection"]
        for seed in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_an_immutable_hash_gets_no_gradient():
    def loss(hashing):
        variables = {**variables_of("hamming_ksh"), "hash": hashing}
        return jnp.sum(layer_of("hamming_ksh").apply(variables, images(), GRID))

    gradient = jax.jit(jax.grad(loss))(variables_of("hamming_ksh")["hash"])
    assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(gradient))


def test_dropout_in_training_zeroes_outputs_and_scales_the_rest():
    variables, x = variables_of("msa"), images()
    layer = layer_of("msa", dropout=0.5)
    y = np.asarray(layer.apply(variables, x, GRID, train=True, rngs={"dropout": jax.random.key(0)}))
    kept = y != 0
    assert 0.4 < kept.mean() < 0.6
    expected = np.asarray(jitted("msa", dropout=0.5)(variables, x))
    np.testing.assert_allclose(y[kept], 2 * expected[kept], rtol=1e-5, atol=1e-5)


def binary_softmax_of(x, grid, trained_grid=None, **primitives):
    """A "binary_softmax" of two heads, random variables for it, and its outputs."""
    layer = make_attention(
        "binary_softmax", num_heads=2, trained_grid=trained_grid, primitives=Primitives(**primitives)
    )
    shapes = jax.eval_shape(lambda: layer.init(jax.random.key(0), x, grid))
    rng = np.random.default_rng(0)
    variables = jax.tree.map(lambda leaf: rng.normal(0, 0.5, leaf.shape).astype(np.float32), shapes)
    return layer, variables, jax.jit(lambda variables, x: layer.apply(variables, x, grid))(variables, x)


@pytest.mark.parametrize("others", [1, 2])
@pytest.mark.parametrize("grid", [(1, 1), (3, 4), (5, 2)])
def test_biases_of_class_tokens_are_the_last_three_rows(grid, others):
    x = np.random.default_rng(1).normal(size=(2, others + grid[0] * grid[1], CHANNELS)).astype(np.float32)
    _, variables, y = binary_softmax_of(x, grid)
    assert variables["params"]["position_bias"].shape == ((2 * grid[0] - 1) * (2 * grid[1] - 1) + 3, 2)
    probabilities, v = binary_probabilities(variables, x.astype(np.float64), grid, others)
    np.testing.assert_allclose(
        y, linear(join(probabilities @ v), variables["params"]["proj"]), rtol=1e-4, atol=1e-4
    )


def test_biases_start_at_zero():
    shapes = layer_of("binary_softmax").init(jax.random.key(0), images(), GRID)
    np.testing.assert_array_equal(shapes["params"]["position_bias"], np.zeros((66, HEADS)))


def test_a_larger_grid_interpolates_the_biases_as_torch_does():
    torch = pytest.importorskip("torch")
    grid, new_grid = (3, 3), (4, 6)
    x = np.tile(images(), (1, 2, 1))[:, :24]
    _, variables, _ = binary_softmax_of(x[:, :9], grid)
    table = variables["params"]["position_bias"]
    image = torch.tensor(table[:-3].reshape(1, 5, 5, 2)).permute(0, 3, 1, 2)
    resized = torch.nn.functional.interpolate(image, (7, 11), mode="bicubic", align_corners=False)
    resized = resized.permute(0, 2, 3, 1).reshape(77, 2).numpy()
    params = variables["params"] | {"position_bias": np.concatenate([resized, table[-3:]])}
    layers = [
        make_attention("binary_softmax", num_heads=2, trained_grid=trained) for trained in (grid, new_grid)
    ]
    y, expected = (
        layer.apply({"params": given}, x, new_grid)
        for layer, given in zip(layers, (variables["params"], params), strict=True)
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_signs_of_queries_and_keys_pass_gradients_within_one():
    """With magnitudes held, d score / d q is sign(k) where |q| <= 1, and 0 elsewhere."""
    q, k = (np.random.default_rng(seed).normal(0, 1, (1, 2, 3, 8)).astype(np.float32) for seed in (0, 1))
    layer = make_attention("binary_softmax", num_heads=2)

    def log_weight(q):
        weights = layer.apply({}, q, k, jnp.zeros((2, 3, 3)), method="weights")
        return jnp.sum(jnp.log(weights[..., 0]) - jnp.log(weights[..., 1]))

    s_q, s_k = (np.abs(x).mean(axis=(-2, -1), keepdims=True) for x in (q, k))
    signs = codes_of_signs(k)
    difference = signs[:, :, :1] - signs[:, :, 1:2]
    scale = s_k / np.sqrt(8)
    through_signs = np.where(np.abs(q) <= 1, s_q * scale * difference, 0)
    gap = (codes_of_signs(q) * difference).sum(axis=(-2, -1), keepdims=True)
    through_magnitudes = scale * gap * np.sign(q) / (3 * 8)
    np.testing.assert_allclose(
        jax.grad(log_weight)(q), through_signs + through_magnitudes, rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(("precision", "limit"), [("int8", None), ("clipped_int8", 2)])
def test_eight_bit_probabilities_and_values_are_whole_numbers(precision, limit):
    rng = np.random.default_rng(0)
    weights = softmax(rng.normal(0, 2, (2, 3, 5, 7)), axis=-1).astype(np.float32)
    v = rng.normal(0, 2, (2, 3, 7, 4)).astype(np.float32)
    largest = np.abs(v).max(axis=(-2, -1), keepdims=True) if limit is None else np.float32(limit)
    values = np.round(np.clip(v / largest, -1, 1) * 127).astype(np.int8)
    shares = np.round(weights / weights.max(axis=-1, keepdims=True) * 255).astype(np.uint8)
    sums = shares.astype(np.int32) @ values.astype(np.int32)
    expected = sums / shares.sum(axis=-1, keepdims=True, dtype=np.int32) * (largest / 127)
    np.testing.assert_allclose(weigh_values(weights, v, precision), expected, rtol=1e-5, atol=1e-6)


def test_eight_bit_values_beyond_the_limit_get_no_gradient():
    weights = jnp.full((1, 1, 2, 4), 0.25)
    v = jnp.float32([-3, -1, 1, 3]).reshape(1, 1, 4, 1)
    gradient = jax.grad(lambda v: jnp.sum(weigh_values(weights, v, "clipped_int8")))(v)
    np.testing.assert_allclose(gradient.ravel(), [0, 0.5, 0.5, 0], rtol=1e-6)


def test_eight_bits_are_near_float32():
    _, _, y = binary_softmax_of(images(), GRID)
    _, _, rounded = binary_softmax_of(images(), GRID, attention_precision="int8")
    assert 0 < np.abs(rounded - y).mean() / np.abs(y).mean() < 0.02


BINARY = ("hamming_linear", "hamming_quadratic", "binary_softmax")
ROTATED = pytest.mark.parametrize(("rotation", "count"), [("hadamard", 1), ("hadamard_4x", 4)])


def random_signs(count):
    return np.random.default_rng(2).choice([-1, 1], (count, 2, HEAD_DIM)).astype(np.int8)


def rotated_reference(kind, variables, x, signs):
    """The attention's heads, in float64, by explicit rotation matrices."""
    matrices = [
        np.diag(first) @ hadamard(HEAD_DIM) @ np.diag(last) @ hadamard(HEAD_DIM) / HEAD_DIM
        for first, last in signs.astype(np.float64)
    ]
    params = variables["params"]
    q, k, v = qkv(params, x)
    if kind == "hamming_linear":
        q, k = unit(q), unit(k)
    q, k = (np.concatenate([part @ matrix for matrix in matrices], axis=-1) for part in (q, k))
    if kind == "hamming_linear":
        mean = products(above_own_mean(q), above_own_mean(k)) / len(signs)
        return unit(v / 2 + mean @ v / np.pi) + convolved_over_tokens(params, v)
    if kind == "hamming_quadratic":
        mean = products(2 * above_own_mean(q) - 1, 2 * above_own_mean(k) - 1) / len(signs)
        return softmax(mean / np.sqrt(HEAD_DIM), axis=-1) @ v
    s_q, s_k = (np.abs(part).mean(axis=(-2, -1), keepdims=True) for part in (q, k))
    mean = products(codes_of_signs(q), codes_of_signs(k)) / len(signs)
    return softmax(s_q * s_k * mean / np.sqrt(HEAD_DIM) + biases(params["position_bias"], GRID), axis=-1) @ v


@ROTATED
@pytest.mark.parametrize("kind", BINARY)
def test_codes_are_those_of_rotated_queries_and_keys(implementation, kind, rotation, count):
    variables, x, signs = variables_of(kind), images(), random_signs(count)
    layer = layer_of(kind, primitives=Primitives(rotation=rotation, implementation=implementation))
    y = layer.apply({**variables, "rotation": {"signs": signs}}, x, GRID)
    expected = join(rotated_reference(kind, variables, x.astype(np.float64), signs))
    np.testing.assert_allclose(y, linear(expected, variables["params"]["proj"]), rtol=1e-4, atol=1e-4)


def test_signs_of_a_rotation_are_drawn_for_each_layer():
    layer = layer_of("hamming_quadratic", primitives=Primitives(rotation="hadamard_2x"))
    first, again, other = (
        layer.init(jax.random.key(seed), images(), GRID)["rotation"]["signs"] for seed in (0, 0, 1)
    )
    assert (first.shape, first.dtype) == ((2, 2, HEAD_DIM), jnp.int8)
    assert set(np.unique(first)) == {-1, 1}
    np.testing.assert_array_equal(first, again)
    assert np.any(first != other)


def test_gradients_pass_through_a_rotation_within_the_codes_levels():
    layer = layer_of("hamming_quadratic", primitives=Primitives(rotation="hadamard_2x"))
    variables = {**variables_of("hamming_quadratic"), "rotation": {"signs": random_signs(2)}}
    gradient = jax.grad(lambda x: jnp.sum(layer.apply(variables, x, GRID) ** 2))(images())
    assert np.all(np.isfinite(gradient))
    assert np.all(np.any(gradient != 0, axis=-1))


def test_kinds_without_codes_of_their_own_have_no_rotation():
    layer = layer_of("hamming_ksh", primitives=Primitives(rotation="hadamard"))
    shapes = jax.eval_shape(lambda x: layer.init(jax.random.key(0), x, GRID), images())
    assert set(shapes) == {"params", "hash"}
