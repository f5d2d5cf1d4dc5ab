import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftaddvit_jax.nn import LINEAR_KINDS, Primitives, ShiftDense, make_linear
from shiftaddvit_jax.ops.precision import DOT_GENERAL

INPUTS, FEATURES = 7, 5
RNG = np.random.default_rng(0)
KERNEL = RNG.normal(0, 0.4, (INPUTS, FEATURES)).astype(np.float32)
BIAS = RNG.normal(size=FEATURES).astype(np.float32)
SIGN = RNG.choice([-1, 1], (INPUTS, FEATURES)).astype(np.float32)
EXPONENT = RNG.uniform(-9, 0, (INPUTS, FEATURES)).astype(np.float32)
LEADING = pytest.mark.parametrize("leading", [(), (3,), (2, 5)], ids=str)


def tokens(*leading):
    return np.random.default_rng(1).normal(size=(*leading, INPUTS)).astype(np.float32)


def powers(kernel, low=-14):
    kernel = kernel.astype(np.float64)
    return np.sign(kernel) * 2.0 ** np.clip(np.round(np.log2(np.abs(kernel))), low, 0)


def two_powers(kernel):
    """The nearest sums and differences of two of seven powers, scaled by a power of two of each output."""
    powers = 2.0 ** np.arange(7)
    numbers = np.unique(
        [0, *powers, *np.add.outer(powers, powers).flat, *np.subtract.outer(powers, powers).flat]
    )
    numbers = numbers[(numbers >= 0) & (numbers <= 96)]
    scale = 2.0 ** np.ceil(np.log2(np.abs(kernel.astype(np.float64)).max(axis=0) / 104))
    nearest = np.abs((np.abs(kernel) / scale)[..., None] - numbers).argmin(axis=-1)
    return np.sign(kernel) * numbers[nearest] * scale


def apply(layer, x, **params):
    return layer.apply({"params": params}, x)


@LEADING
def test_mode_q_rounds_its_kernel_in_the_forward_pass(implementation, leading):
    layer, x = ShiftDense(FEATURES, implementation=implementation), tokens(*leading)
    y = apply(layer, x, kernel=KERNEL, bias=BIAS)
    np.testing.assert_allclose(y, x @ powers(KERNEL) + BIAS, rtol=1e-5, atol=1e-5)


@LEADING
def test_mode_ps_multiplies_by_its_sign_and_rounded_exponent(implementation, leading):
    layer, x = ShiftDense(FEATURES, mode="ps", implementation=implementation), tokens(*leading)
    y = apply(layer, x, sign=SIGN, exponent=EXPONENT, bias=BIAS)
    np.testing.assert_allclose(y, x @ (SIGN * 2.0 ** np.round(EXPONENT)) + BIAS, rtol=1e-5, atol=1e-5)


def draws(layer, params, x, count, *, stream="rounding"):
    """The outputs by as many random keys."""
    keys = jax.random.split(jax.random.key(3), count)
    return jax.jit(jax.vmap(lambda key: layer.apply({"params": params}, x, rngs={stream: key})))(keys)


@pytest.mark.parametrize("bits", range(2, 9))
def test_weights_rounded_at_random_are_powers_whose_mean_is_the_weight(bits):
    layer = ShiftDense(FEATURES, use_bias=False, weight_bits=bits)
    low = -(2 ** (bits - 1) - 2)
    weights = np.asarray(draws(layer, {"kernel": KERNEL}, np.eye(INPUTS, dtype=np.float32), 2000), float)
    exponents = np.log2(np.abs(weights))
    np.testing.assert_array_equal(exponents, np.round(exponents))
    assert exponents.min() >= low
    assert exponents.max() <= 0
    np.testing.assert_array_equal(np.sign(weights), np.broadcast_to(np.sign(KERNEL), weights.shape))
    # Outside the range, a weight is its nearest end.
    expected = np.sign(KERNEL) * np.clip(np.abs(KERNEL.astype(float)), 2.0**low, 1)
    error = weights.std(axis=0) / np.sqrt(len(weights))
    assert np.all(np.abs(weights.mean(axis=0) - expected) <= 4.5 * error + 1e-7)


@pytest.mark.parametrize("settings", [{}, {"mode": "ps"}, {"weight_terms": 2}], ids=str)
def test_without_the_stream_weights_are_rounded_to_the_nearest(settings):
    layer, x = ShiftDense(FEATURES, **settings), tokens(3)
    params = layer.init(jax.random.key(0), x)["params"]
    expected = layer.apply({"params": params}, x)
    for given in draws(layer, params, x, 3, stream="dropout"):
        np.testing.assert_allclose(given, expected, rtol=1e-6, atol=1e-7)


def test_the_gradient_is_straight_through_where_weights_are_rounded_at_random():
    x, cotangent = tokens(4), np.random.default_rng(2).normal(size=(4, FEATURES)).astype(np.float32)
    layer, rngs = ShiftDense(FEATURES, use_bias=False), {"rounding": jax.random.key(0)}

    def loss(kernel):
        return jnp.vdot(layer.apply({"params": {"kernel": kernel}}, x, rngs=rngs), cotangent)

    np.testing.assert_allclose(jax.grad(loss)(KERNEL), x.T @ cotangent, rtol=1e-5, atol=1e-6)


def test_a_mixtures_shift_expert_rounds_at_random_too():
    layer, x = make_linear("moe", FEATURES, Primitives(), name=None), tokens(3)
    params = layer.init(jax.random.key(0), x)["params"]
    params["shift"]["kernel"] = KERNEL
    params["router"] = {"kernel": np.zeros((INPUTS, 2), np.float32), "bias": np.float32([-50, 50])}
    streams = jax.random.split(jax.random.key(4), (500, 2))

    @jax.jit
    @jax.vmap
    def train(keys):
        rngs = dict(zip(("router", "rounding"), keys, strict=True))
        return layer.apply({"params": params}, x, train=True, rngs=rngs)

    y = np.asarray(train(streams), float)
    error = y.std(axis=0) / np.sqrt(len(y))
    assert np.all(error > 0)
    assert np.all(np.abs(y.mean(axis=0) - x @ np.clip(KERNEL, -1, 1)) <= 4.5 * error + 1e-5)


def test_both_modes_agree_on_the_same_powers():
    x, weight = tokens(3), powers(KERNEL)
    q = apply(ShiftDense(FEATURES, use_bias=False), x, kernel=KERNEL)
    ps = ShiftDense(FEATURES, use_bias=False, mode="ps")
    exponent = np.log2(np.abs(weight)).astype(np.float32)
    np.testing.assert_array_equal(q, apply(ps, x, sign=np.float32(np.sign(weight)), exponent=exponent))


def test_without_a_bias_there_is_none():
    layer = ShiftDense(FEATURES, use_bias=False)
    assert set(layer.init(jax.random.key(0), tokens(1))["params"]) == {"kernel"}
    np.testing.assert_array_equal(apply(layer, np.zeros((1, INPUTS), np.float32), kernel=KERNEL), 0)


def test_fewer_bits_clip_the_exponents():
    x = np.eye(INPUTS, dtype=np.float32)
    y = apply(ShiftDense(FEATURES, use_bias=False, weight_bits=3), x, kernel=KERNEL)
    np.testing.assert_array_equal(y, powers(KERNEL, low=-2))
    assert np.any(powers(KERNEL, low=-2) != powers(KERNEL))


@LEADING
def test_two_terms_round_to_sums_and_differences_of_two_powers(implementation, leading):
    layer, x = ShiftDense(FEATURES, weight_terms=2, implementation=implementation), tokens(*leading)
    y = apply(layer, x, kernel=KERNEL, bias=BIAS)
    np.testing.assert_allclose(y, x @ two_powers(KERNEL) + BIAS, rtol=1e-5, atol=1e-5)


def test_fixed_point_puts_tokens_and_bias_on_the_same_grid():
    x = tokens(3)
    y = apply(ShiftDense(FEATURES, activations="fixed_point"), x, kernel=KERNEL, bias=BIAS)
    on_grid = [np.floor(part.astype(np.float64) * 2**16) / 2**16 for part in (x, BIAS)]
    np.testing.assert_allclose(y, on_grid[0] @ powers(KERNEL) + on_grid[1], rtol=0, atol=2e-6)


def test_int8_rounds_each_token_to_its_own_scale():
    x = tokens(3)
    scale = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64) / 127
    y = apply(ShiftDense(FEATURES, activations="int8"), x, kernel=KERNEL, bias=BIAS)
    expected = np.round(x / scale) * scale @ powers(KERNEL) + BIAS
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


def test_int8_tokens_leave_sums_of_two_powers_as_they_are():
    x = tokens(3)
    scale = np.abs(x).max(axis=-1, keepdims=True).astype(np.float64) / 127
    layer = ShiftDense(FEATURES, weight_terms=2, activations="int8")
    expected = np.round(x / scale) * scale @ two_powers(KERNEL) + BIAS
    np.testing.assert_allclose(apply(layer, x, kernel=KERNEL, bias=BIAS), expected, rtol=1e-5, atol=1e-5)


def gradients(layer, **params):
    x = tokens(4)
    cotangent = np.random.default_rng(2).normal(size=(4, FEATURES)).astype(np.float32)
    loss = lambda params: jnp.vdot(layer.apply({"params": params}, x), cotangent)  # noqa: E731
    return jax.jit(jax.grad(loss))(params), x.T @ cotangent, cotangent


@pytest.mark.parametrize("terms", [1, 2])
def test_mode_q_has_a_straight_through_gradient(terms):
    gradient, expected, cotangent = gradients(
        ShiftDense(FEATURES, weight_terms=terms), kernel=KERNEL, bias=BIAS
    )
    np.testing.assert_allclose(gradient["kernel"], expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradient["bias"], cotangent.sum(axis=0), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("freeze_sign", [False, True])
def test_freeze_sign_stops_the_gradient_of_the_sign_alone(freeze_sign):
    layer = ShiftDense(FEATURES, mode="ps", freeze_sign=freeze_sign)
    gradient, expected, _ = gradients(layer, sign=SIGN, exponent=EXPONENT, bias=BIAS)
    np.testing.assert_allclose(gradient["sign"], 0 if freeze_sign else expected, rtol=1e-5, atol=1e-6)
    slope = expected * SIGN * 2.0 ** np.round(EXPONENT) * np.log(2)
    np.testing.assert_allclose(gradient["exponent"], slope, rtol=1e-5, atol=1e-6)


def test_mode_ps_starts_from_whole_codes_of_a_small_dense_kernel():
    layer = ShiftDense(40, mode="ps")
    params = layer.init(jax.random.key(0), jnp.ones((1, 50)))["params"]
    assert set(params) == {"sign", "exponent", "bias"}
    np.testing.assert_array_equal(np.unique(params["sign"]), [-1, 1])
    np.testing.assert_array_equal(params["exponent"], np.round(params["exponent"]))
    assert -14 <= params["exponent"].min() < params["exponent"].max() <= 0


def test_the_output_has_the_dtype_asked_for_and_parameters_stay_float32():
    layer, x = ShiftDense(FEATURES, dtype=jnp.bfloat16), tokens(3)
    params = layer.init(jax.random.key(0), x)["params"]
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {jnp.dtype("float32")}
    y = apply(layer, x, kernel=KERNEL, bias=BIAS)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(y, np.float64), x @ powers(KERNEL) + BIAS, rtol=0.02, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "sp"}, "unknown shift mode 'sp'; did you mean 'ps'"),
        ({"weight_terms": 3}, "weight_terms must be 1 or 2, got 3"),
        ({"weight_terms": 2, "mode": "ps"}, "mode 'ps' trains one power of two a weight, not 2"),
        ({"weight_bits": 9}, "weight_bits must be between 2 and 8, got 9"),
        ({"weight_bits": 9, "mode": "ps"}, "weight_bits must be between 2 and 8, got 9"),
        ({"activations": "int9"}, "unknown activations 'int9'; did you mean 'int8'"),
    ],
)
def test_what_a_shift_layer_cannot_be_is_a_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShiftDense(FEATURES, **arguments).init(jax.random.key(0), tokens(3))


@pytest.mark.parametrize("kind", LINEAR_KINDS)
def test_every_kind_of_linear_layer_starts_from_small_weights_and_zero_biases(kind):
    layer = make_linear(kind, FEATURES, Primitives(), name=None)
    params = layer.init(jax.random.key(0), tokens(3))["params"]
    for expert in [params[name] for name in ("dense", "shift")] if kind == "moe" else [params]:
        assert 0 < np.abs(expert["kernel"]).max() < 0.1
        np.testing.assert_array_equal(expert["bias"], 0)


@pytest.mark.parametrize("kind", ["shift", "moe"])
def test_primitives_reach_the_shift_layers(kind):
    primitives = Primitives(weight_bits=3, activations="int8", implementation="xla", dtype=jnp.bfloat16)
    layer = make_linear(kind, FEATURES, primitives, name=None)
    for name in ("weight_bits", "activations", "implementation", "dtype"):
        assert getattr(layer, name) == getattr(primitives, name)


def test_precision_is_that_of_dense_layers_and_not_of_routers():
    formats = {}

    def note(call, arguments, keywords, context):
        if isinstance(context.module, nn.Dense):
            formats[context.module.name] = context.module.dot_general
        return call(*arguments, **keywords)

    class Both(nn.Module):
        @nn.compact
        def __call__(self, x):
            primitives = Primitives(precision="bfloat16")
            for kind in ("dense", "moe"):
                x = make_linear(kind, FEATURES, primitives, name=f"a_{kind}")(x)
            return x

    with nn.intercept_methods(note):
        jax.eval_shape(Both().init, jax.random.key(0), tokens(3))
    bfloat16 = DOT_GENERAL["bfloat16"]
    assert formats == {"a_dense": bfloat16, "dense": bfloat16, "router": None}


def test_an_unknown_kind_of_linear_layer_names_the_nearest():
    with pytest.raises(ValueError, match="unknown kind of linear layer 'shfit'; did you mean 'shift'"):
        make_linear("shfit", FEATURES, Primitives(), name="layer")
