import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.integrate import quad
from scipy.special import softmax
from scipy.stats import norm

from shiftaddvit_jax.nn import MoEDense, latency_aware_loss, load_probabilities, moe, routing_loss
from shiftaddvit_jax.nn.moe import (
    aimed_shift_share,
    routing_layers,
    shift_shares,
    squared_coefficient_of_variation,
)

INPUTS, FEATURES = 6, 5
TOP_K = pytest.mark.parametrize("top_k", [1, 2])


def parameters(seed=0):
    rng = np.random.default_rng(seed)

    def expert():
        return {
            "kernel": rng.normal(0, 0.5, (INPUTS, FEATURES)).astype(np.float32),
            "bias": rng.normal(size=FEATURES).astype(np.float32),
        }

    router = {"kernel": rng.normal(size=(INPUTS, 2)).astype(np.float32), "bias": np.float32([0.3, -0.2])}
    return {"router": router, "dense": expert(), "shift": expert()}


def tokens(*leading, seed=1):
    return np.random.default_rng(seed).normal(size=(*leading, INPUTS)).astype(np.float32)


def expert_outputs(params, x):
    """Both experts' outputs in NumPy, the second with weights rounded on the logarithm."""
    kernel = params["shift"]["kernel"].astype(np.float64)
    powers = np.sign(kernel) * 2.0 ** np.clip(np.round(np.log2(np.abs(kernel))), -14, 0)
    dense = x @ params["dense"]["kernel"].astype(np.float64) + params["dense"]["bias"]
    return np.stack([dense, x @ powers + params["shift"]["bias"]], axis=-2)


def mixture(params, x, logits, top_k):
    gates = softmax(logits, axis=-1)
    if top_k == 1:
        gates = gates * (logits == logits.max(axis=-1, keepdims=True))
    return np.sum(gates[..., None] * expert_outputs(params, x), axis=-2)


def apply_with_routing(layer, params, x, rngs=None, train=False):
    apply = jax.jit(
        lambda params, x: layer.apply({"params": params}, x, train, rngs=rngs, mutable=["routing"])
    )
    y, state = apply(params, x)
    return y, state["routing"]


def clean_logits(params, x):
    return x.astype(np.float64) @ params["router"]["kernel"] + params["router"]["bias"]


def test_init_makes_both_experts_and_a_router():
    params = MoEDense(FEATURES).init(jax.random.key(0), tokens(4))["params"]
    expert = {"kernel": (INPUTS, FEATURES), "bias": (FEATURES,)}
    router = {"kernel": (INPUTS, 2), "bias": (2,)}
    assert jax.tree.map(jnp.shape, params) == {"router": router, "dense": expert, "shift": expert}


@pytest.mark.parametrize(
    ("implementation", "top_k"), [(None, 1), ("xla", 1), ("tvm", 1), (None, 2), ("xla", 2)]
)
@pytest.mark.parametrize("leading", [(1,), (13,), (2, 3, 4)], ids=str)
def test_inference_dispatches_each_token_to_the_weighted_sum_of_its_experts(implementation, top_k, leading):
    params, x = parameters(), tokens(*leading)
    layer = MoEDense(FEATURES, top_k=top_k, implementation=implementation)
    expected = mixture(params, x, clean_logits(params, x), top_k)
    np.testing.assert_allclose(apply_with_routing(layer, params, x)[0], expected, rtol=1e-5, atol=1e-5)


@TOP_K
@pytest.mark.parametrize("sorted_out", [False, True])
def test_tokens_are_sorted_out_or_computed_by_both_experts(monkeypatch, top_k, sorted_out):
    monkeypatch.setattr(moe, "DISPATCHED_TOKENS", 0 if sorted_out else 1000)
    monkeypatch.setattr(moe, "DISPATCHED_PRODUCTS", 0)
    params, x = parameters(), tokens(45)
    layer = MoEDense(FEATURES, top_k=top_k, implementation="xla")
    assert layer.dispatches(*x.shape) == sorted_out
    expected = mixture(params, x, clean_logits(params, x), top_k)
    np.testing.assert_allclose(layer.apply({"params": params}, x), expected, rtol=1e-5, atol=1e-5)


def test_what_an_expert_makes_of_others_tokens_is_cut_off():
    params, x = parameters(), np.abs(tokens(5))
    params["router"]["kernel"] = np.array([[1.0, -1.0]]) * np.ones((INPUTS, 1), np.float32)
    params["shift"]["bias"] = np.full(FEATURES, np.inf, np.float32)
    assert np.isfinite(MoEDense(FEATURES, implementation="xla").apply({"params": params}, x)).all()


def test_tvm_chooses_one_expert_a_token():
    layer = MoEDense(FEATURES, top_k=2, implementation="tvm")
    with pytest.raises(
        ValueError, match="the kernel chooses one expert a token, not 2; use implementation='xla'"
    ):
        layer.apply({"params": parameters()}, tokens(4))


@TOP_K
def test_training_is_the_weighted_sum_of_the_chosen_experts_under_noise(top_k):
    params, x = parameters(), tokens(3, 9)
    layer = MoEDense(FEATURES, top_k=top_k)
    rngs = {"router": jax.random.key(3)}
    key = layer.apply({}, rngs=rngs, method=lambda layer: layer.make_rng("router"))
    noise = np.asarray(jax.random.normal(key, (27, 2))).reshape(3, 9, 2)
    logits = clean_logits(params, x) + noise / 2
    y = layer.apply({"params": params}, x, train=True, rngs=rngs)
    np.testing.assert_allclose(y, mixture(params, x, logits, top_k), rtol=1e-5, atol=1e-5)


def test_training_draws_its_choice_from_the_router_stream():
    params, x = {"params": parameters()}, tokens(50)
    layer = MoEDense(FEATURES)
    first, again, other = (
        layer.apply(params, x, train=True, rngs={"router": jax.random.key(k)}) for k in (0, 0, 1)
    )
    np.testing.assert_array_equal(first, again)
    assert np.any(np.asarray(first) != np.asarray(other))


def test_training_needs_a_router_stream_and_inference_none():
    params, x = {"params": parameters()}, tokens(4)
    with pytest.raises(Exception, match="router"):
        MoEDense(FEATURES).apply(params, x, train=True)
    np.testing.assert_array_equal(MoEDense(FEATURES).apply(params, x), MoEDense(FEATURES).apply(params, x))


@pytest.mark.parametrize("only", [0, 1])
def test_all_tokens_may_choose_one_expert(only):
    params, x = parameters(), np.abs(tokens(11))
    params["router"]["kernel"] = np.where(np.arange(2) == only, 1, -1) * np.ones((INPUTS, 1), np.float32)
    y, routing = apply_with_routing(MoEDense(FEATURES), params, x)
    np.testing.assert_array_equal(routing["tokens"], np.where(np.arange(2) == only, 11, 0))
    expected = mixture(params, x, clean_logits(params, x), 1)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@TOP_K
@pytest.mark.parametrize("train", [False, True])
def test_importance_and_load_are_the_noiseless_sums(top_k, train):
    params, x = parameters(), tokens(2, 17)
    layer = MoEDense(FEATURES, top_k=top_k)
    rngs = {"router": jax.random.key(0)}
    _, routing = apply_with_routing(layer, params, x, rngs, train)
    logits = clean_logits(params, x).reshape(34, 2)
    first = norm.cdf((logits[:, 0] - logits[:, 1]) * 2 / np.sqrt(2)).sum()
    load = [first, 34 - first] if top_k == 1 else [34, 34]
    np.testing.assert_allclose(routing["importance"], softmax(logits, axis=1).sum(axis=0), rtol=1e-5)
    np.testing.assert_allclose(routing["load"], load, rtol=1e-5)
    assert routing["tokens"].sum() == 34 * top_k


def test_tokens_counts_the_tokens_that_chose_each_expert():
    params, x = parameters(), tokens(2, 17)
    _, routing = apply_with_routing(MoEDense(FEATURES), params, x)
    chosen = clean_logits(params, x).argmax(axis=-1)
    np.testing.assert_array_equal(routing["tokens"], np.bincount(chosen.ravel(), minlength=2))


@pytest.mark.parametrize("train", [False, True])
def test_the_gradient_reaches_the_router_through_the_gate(train):
    params, x = parameters(), tokens(9)
    layer = MoEDense(FEATURES)
    rngs = {"router": jax.random.key(3)}
    cotangent = np.random.default_rng(2).normal(size=(9, FEATURES)).astype(np.float32)
    loss = lambda params: jnp.vdot(layer.apply({"params": params}, x, train, rngs=rngs), cotangent)  # noqa: E731
    gradient = jax.jit(jax.grad(loss))(params)["router"]["kernel"]

    logits = clean_logits(params, x)
    if train:
        key = layer.apply({}, rngs=rngs, method=lambda layer: layer.make_rng("router"))
        logits = logits + np.asarray(jax.random.normal(key, (9, 2))) / 2
    gates, chosen = softmax(logits, axis=1), np.eye(2)[logits.argmax(axis=1)]
    # d p_c / d logits = p_c (one_hot_c - p), times the cotangent's share of the chosen expert.
    outputs = np.sum(chosen[..., None] * expert_outputs(params, x), axis=1)
    slope = np.sum(outputs * cotangent, axis=1) * np.sum(chosen * gates, axis=1)
    np.testing.assert_allclose(gradient, x.T @ (slope[:, None] * (chosen - gates)), rtol=1e-4, atol=1e-5)


def test_inference_has_the_gradients_of_the_dense_computation():
    params, x = parameters(), tokens(9)
    cotangent = np.random.default_rng(2).normal(size=(9, FEATURES)).astype(np.float32)

    def loss(params):
        return jnp.vdot(MoEDense(FEATURES).apply({"params": params}, x), cotangent)

    gradient = jax.jit(jax.grad(loss))(params)
    logits = clean_logits(params, x)
    gates = softmax(logits, axis=1) * np.eye(2)[logits.argmax(axis=1)]
    for i, name in enumerate(("dense", "shift")):
        weighted = gates[:, i : i + 1] * cotangent
        np.testing.assert_allclose(gradient[name]["kernel"], x.T @ weighted, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(gradient[name]["bias"], weighted.sum(axis=0), rtol=1e-5, atol=1e-5)


def test_experts_compute_in_bfloat16_and_the_router_in_float32():
    params, x = parameters(), tokens(31)
    y = MoEDense(FEATURES, dtype=jnp.bfloat16).apply({"params": params}, x)
    assert y.dtype == jnp.bfloat16
    expected = mixture(params, x, clean_logits(params, x), 1)
    np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=0.02, atol=0.05)


@pytest.mark.parametrize("top_k", [0, 3])
def test_top_k_is_one_or_two(top_k):
    with pytest.raises(ValueError, match=f"top_k must be between 1 and 2, got {top_k}"):
        MoEDense(FEATURES, top_k=top_k).init(jax.random.key(0), tokens(4))


def random_logits(experts, count=5):
    return np.random.default_rng(experts).normal(0, 0.7, (count, experts)).astype(np.float32)


def test_load_of_two_experts_has_its_closed_form():
    logits = random_logits(2)
    first = norm.cdf((logits[:, 0] - logits[:, 1]) * np.sqrt(2))
    expected = np.stack([first, 1 - first], axis=1)
    np.testing.assert_allclose(load_probabilities(logits), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("experts", [3, 4])
def test_load_of_more_experts_is_the_integral_over_their_own_noise(experts):
    logits = random_logits(experts, 2).astype(np.float64)

    def probability(token, i):
        margins = experts * (logits[token, i] - np.delete(logits[token], i))
        return quad(lambda t: norm.pdf(t) * np.prod(norm.cdf(margins + t)), -9, 9)[0]

    expected = [[probability(token, i) for i in range(experts)] for token in range(2)]
    np.testing.assert_allclose(load_probabilities(jnp.asarray(logits)), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (3, 1), (3, 2), (4, 1), (4, 2)])
def test_load_is_how_often_an_expert_is_chosen_under_the_noise(experts, top_k):
    logits, draws = random_logits(experts), 100_000
    noise = np.random.default_rng(0).normal(0, 1 / experts, (draws, *logits.shape))
    order = np.argsort(-(logits + noise), axis=-1)[..., :top_k]
    expected = np.stack([np.any(order == i, axis=-1).mean(axis=0) for i in range(experts)], axis=-1)
    load = load_probabilities(logits, top_k)
    standard_error = np.sqrt(expected * (1 - expected) / draws)
    assert np.all(np.abs(load - expected) <= 4.5 * standard_error + 1e-4)


@pytest.mark.parametrize(("experts", "top_k"), [(2, 1), (2, 2), (3, 2), (4, 2), (4, 3)])
def test_load_sums_to_top_k(experts, top_k):
    load = load_probabilities(random_logits(experts), top_k)
    np.testing.assert_allclose(load.sum(axis=-1), top_k, rtol=1e-5)


def test_equal_logits_share_the_load_equally():
    np.testing.assert_allclose(load_probabilities(jnp.full((1, 4), 3.0)), 0.25, rtol=1e-5)


@pytest.mark.parametrize("experts", [2, 3])
def test_extreme_logits_have_a_finite_load_and_gradient(experts):
    logits = jnp.asarray([[1e4, *([-1e4] * (experts - 1))]])
    load, gradient = jax.jit(jax.value_and_grad(lambda logits: load_probabilities(logits)[0, 0]))(logits)
    np.testing.assert_allclose(load, 1, rtol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


def test_the_gradient_of_the_load_is_the_density_of_the_noise():
    logits = random_logits(2, 1)
    gradient = jax.grad(lambda logits: load_probabilities(logits)[0, 0])(jnp.asarray(logits))
    density = np.sqrt(2) * norm.pdf((logits[0, 0] - logits[0, 1]) * np.sqrt(2))
    np.testing.assert_allclose(gradient, [[density, -density]], rtol=1e-5)


@pytest.mark.parametrize("values", [[1, 3], [5, 5, 5], [0.2, 7, 1, 4]])
def test_scv_is_the_unbiased_variance_over_the_squared_mean(values):
    expected = np.var(values, ddof=1) / np.mean(values) ** 2
    np.testing.assert_allclose(
        squared_coefficient_of_variation(jnp.float32(values)), expected, rtol=1e-6, atol=1e-7
    )


def test_scv_of_zeros_is_zero():
    assert squared_coefficient_of_variation(jnp.zeros(2)) == 0


@pytest.mark.parametrize(
    ("importance", "load", "latencies", "expected"),
    [
        ((30, 10), (10, 30), (1, 1), 0.5 + 0.5),
        ((40, 0), (20, 20), (1, 1), 2 + 0),
        ((20, 20), (20, 20), (3, 1), 0.5 + 0.5),
        ((10, 30), (20, 20), (3, 1), 0 + 0.5),
        ((10, 10, 10), (30, 0, 0), (1, 1, 1), 0 + 3),
    ],
)
def test_the_latency_aware_loss_has_its_closed_form(importance, load, latencies, expected):
    loss = latency_aware_loss(jnp.float32(importance), jnp.float32(load), latencies)
    np.testing.assert_allclose(loss, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("latencies", [(1, 1), (3, 1), (0.002, 0.0005), (1, 2, 5)])
def test_the_loss_is_zero_where_shares_are_inverse_to_latencies(latencies):
    share = 1 / np.array(latencies)
    share = jnp.float32(100 * share / share.sum())
    np.testing.assert_allclose(latency_aware_loss(share, share, latencies), 0, atol=1e-10)
    assert latency_aware_loss(share * jnp.arange(1, len(latencies) + 1), share, latencies) > 0.05


def test_only_the_ratios_of_latencies_count():
    importance, load = jnp.float32([30, 10]), jnp.float32([15, 25])
    losses = [latency_aware_loss(importance, load, latencies) for latencies in ((3, 1), (3e-6, 1e-6))]
    np.testing.assert_allclose(*losses, rtol=1e-5)


def test_latencies_may_be_traced():
    importance, load = jnp.float32([30, 10]), jnp.float32([15, 25])
    traced = jax.jit(latency_aware_loss)(importance, load, jnp.float32([3, 1]))
    np.testing.assert_allclose(traced, latency_aware_loss(importance, load, (3, 1)), rtol=1e-6)


@pytest.mark.parametrize("latencies", [(0, 1), (-1, 1), (np.nan, 1), (np.inf, 1), (1,), (1, 2, 3), ()])
def test_bad_latencies_are_an_error(latencies):
    with pytest.raises(ValueError, match="latencies must be 2 positive numbers, one for each expert"):
        latency_aware_loss(jnp.ones(2), jnp.ones(2), latencies)
    with pytest.raises(ValueError, match="latencies must be 2 positive numbers, one for each expert"):
        aimed_shift_share(latencies)


def layer_statistics(importance, load):
    return {"importance": jnp.float32(importance), "load": jnp.float32(load), "tokens": jnp.zeros(2)}


def test_the_routing_loss_is_the_mean_over_layers_wherever_they_nest():
    routing = {
        "stage1": {"block1": {"mlp": {"fc1": layer_statistics((30, 10), (10, 30))}}},
        "head": layer_statistics((20, 20), (20, 20)),
    }
    assert routing_layers(routing).keys() == {"stage1/block1/mlp/fc1", "head"}
    np.testing.assert_allclose(routing_loss(routing, (1, 1)), (1 + 0) / 2, rtol=1e-6)


@pytest.mark.parametrize("latencies", [(1.0, 1.0), (6.0, 4.0), (0.3, 0.1)])
def test_the_loss_is_0_at_the_aimed_share(latencies):
    share = aimed_shift_share(latencies)
    tokens = jnp.float32((1 - share, share))
    np.testing.assert_allclose(latency_aware_loss(tokens, tokens, latencies), 0, atol=1e-12)


def test_each_layer_may_have_latencies_of_its_own():
    routing = {"a": layer_statistics((30, 10), (30, 10)), "b": layer_statistics((10, 30), (10, 30))}
    assert routing_loss(routing, {"a": (1, 3), "b": (3, 1)}) == 0
    np.testing.assert_allclose(
        routing_loss(routing, {"a": (1, 3), "b": (1, 1)}),
        latency_aware_loss(jnp.float32((10, 30)), jnp.float32((10, 30)), (1, 1)) / 2,
        rtol=1e-6,
    )
    with pytest.raises(ValueError, match="no latencies for the MoE layer b"):
        routing_loss(routing, {"a": (1, 1)})


def test_shares_of_the_shift_expert_are_by_layer():
    assert shift_shares({"a": {"b": {"tokens": jnp.float32((30, 10))}}}) == {"a/b": 0.25}


def test_the_routing_loss_of_one_layer_is_its_own():
    np.testing.assert_allclose(routing_loss(layer_statistics((30, 10), (10, 30)), (1, 1)), 1, rtol=1e-6)


def test_a_model_without_moe_layers_has_no_routing_loss():
    assert routing_loss({}, (1, 1)) == 0


ROUTER_INPUTS, ROUTER_TOKENS, ROUTER_STEPS = 16, 512, 300
ROUTER_LAYER = MoEDense(1)
ROUTER_OPTIMIZER = optax.adam(optax.cosine_decay_schedule(0.05, ROUTER_STEPS))


def router_tokens(key):
    return jax.random.normal(key, (ROUTER_TOKENS, ROUTER_INPUTS))


@jax.jit
def slow_share_after_training(key, latencies):
    """The share of fresh tokens on expert 0 once its router alone was trained on the LL loss alone."""
    init_key, train_key, test_key = jax.random.split(key, 3)
    params = ROUTER_LAYER.init(init_key, jnp.zeros((1, ROUTER_INPUTS)))["params"]

    def loss(router, key):
        token_key, noise_key = jax.random.split(key)
        _, state = ROUTER_LAYER.apply(
            {"params": params | {"router": router}},
            router_tokens(token_key),
            train=True,
            rngs={"router": noise_key},
            mutable=["routing"],
        )
        return routing_loss(state["routing"], latencies)

    def step(carry, key):
        router, state = carry
        updates, state = ROUTER_OPTIMIZER.update(jax.grad(loss)(router, key), state)
        return (optax.apply_updates(router, updates), state), None

    start = params["router"], ROUTER_OPTIMIZER.init(params["router"])
    (router, _), _ = jax.lax.scan(step, start, jax.random.split(train_key, ROUTER_STEPS))
    fresh = jax.vmap(router_tokens)(jax.random.split(test_key, 40)).reshape(-1, ROUTER_INPUTS)
    return jnp.mean(jnp.argmax(fresh @ router["kernel"] + router["bias"], axis=-1) == 0)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("latencies", "share"), [((3, 1), 0.25), ((1, 3), 0.75), ((1, 1), 0.5)], ids=str)
def test_a_router_trained_on_the_loss_alone_shares_tokens_inversely_to_latencies(seed, latencies, share):
    measured = float(slow_share_after_training(jax.random.key(seed), jnp.float32(latencies)))
    print(f"latencies {latencies}, seed {seed}: {100 * measured:.2f} % of tokens on expert 0")
    assert abs(measured - share) <= 0.03
