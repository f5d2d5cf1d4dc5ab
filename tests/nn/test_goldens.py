"""Every case of the authors' released PyTorch layers, within 1e-5, save where a test says otherwise."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from shiftaddvit_jax.nn import MoEDense, Primitives, ShiftDense, latency_aware_loss, make_attention
from shiftaddvit_jax.ops import (
    additive_power_of_two,
    additive_power_of_two_codes,
    additive_power_of_two_levels,
    matshift,
)

CASES = ("0", "1")
TOLERANCE = 1e-5


def assert_close(actual, expected):
    np.testing.assert_allclose(np.asarray(actual), expected, rtol=TOLERANCE, atol=TOLERANCE)


def linear(case, *names):
    """Torch's [out, in] weights and biases, joined along the outputs, as one Flax linear layer."""
    return {
        "kernel": np.concatenate([case[f"param/{name}.weight"] for name in names]).T,
        "bias": np.concatenate([case[f"param/{name}.bias"] for name in names]),
    }


def value_conv(case):
    return case["param/dconv.weight"][:, 0, :, 0].T


def apply_attention(kind, case, variables, **arguments):
    layer = make_attention(kind, num_heads=int(case["num_heads"]), **arguments)
    grid = tuple(int(side) for side in case["hw"])
    return jax.jit(lambda variables, x: layer.apply(variables, x, grid))(variables, case["input"])


def binary_attention(case, threshold):
    params = {"qkv": linear(case, "qkv"), "proj": linear(case, "proj"), "dconv": value_conv(case)}
    return apply_attention(
        "hamming_linear", case, {"params": params}, primitives=Primitives(threshold=threshold)
    )


def test_the_goldens_hold_the_groups_and_cases_tested_here(golden):
    assert set(golden) == {
        "Attention", "SRAttention", "LinearAttn", "lin_angular_binary", "lin_angular_ksh",
        "deepshift_ps", "deepshift_q", "apot", "gate",
    }  # fmt: skip
    for name, group in golden.items():
        assert set(group) - {"levels"} == set(CASES), name


@pytest.mark.parametrize("case", CASES)
def test_msa_is_the_authors_attention(golden, case):
    case = golden["Attention"][case]
    params = {"qkv": linear(case, "qkv"), "proj": linear(case, "proj")}
    assert_close(apply_attention("msa", case, {"params": params}), case["output"])


@pytest.mark.parametrize("case", CASES)
def test_sra_is_the_authors_spatial_reduction_attention(golden, case):
    case = golden["SRAttention"][case]
    params = {name: linear(case, name) for name in ("q", "kv", "proj")}
    if case["sr_ratio"] > 1:
        kernel = case["param/sr.weight"].transpose(2, 3, 1, 0)
        params["sr"] = {"kernel": kernel, "bias": case["param/sr.bias"]}
        params["norm"] = {"scale": case["param/norm.weight"], "bias": case["param/norm.bias"]}
    output = apply_attention("sra", case, {"params": params}, sr_ratio=int(case["sr_ratio"]))
    assert_close(output, case["output"])


@pytest.mark.parametrize("case", CASES)
def test_linear_is_the_authors_linear_attention(golden, case):
    case = golden["LinearAttn"][case]
    params = {"qkv": linear(case, "q", "kv"), "proj": linear(case, "proj")}
    assert_close(apply_attention("linear", case, {"params": params}), case["output"])


@pytest.mark.parametrize("case", CASES)
def test_hamming_linear_at_the_tensors_mean_is_the_authors_binary_attention(golden, case):
    case = golden["lin_angular_binary"][case]
    assert_close(binary_attention(case, "tensor"), case["output"])


def test_hamming_linear_by_default_departs_from_the_authors_so_that_images_do_not_mix(golden):
    # The authors threshold at the mean of the whole batch: an image's output depends on its neighbours.
    case = golden["lin_angular_binary"]["0"]
    single = {**case, "input": case["input"][:1]}
    assert Primitives().threshold == "sample"
    default = binary_attention(case, Primitives().threshold)
    assert np.abs(default - case["output"]).max() > 1e-3
    assert_close(default[:1], binary_attention(single, "sample"))
    assert np.abs(case["output"][:1] - binary_attention(single, "tensor")).max() > 1e-3


@pytest.mark.parametrize("case", CASES)
def test_hamming_ksh_with_the_authors_trained_hash_is_their_hashed_attention(golden, case):
    case = golden["lin_angular_ksh"][case]
    params = {
        "qk": linear(case, "to_qk"),
        "v": linear(case, "to_v"),
        "proj": linear(case, "proj"),
        "dconv": value_conv(case),
    }
    hashing = {
        "anchors": case["param/qk_quant.ksh.anchor"][0],
        "kernel_mean": case["param/qk_quant.ksh.mvec"][0, :, 0],
        "projection": case["param/qk_quant.ksh.A"],
    }
    output = apply_attention("hamming_ksh", case, {"params": params, "hash": hashing})
    assert_close(output, case["output"])


def ps_arguments(case):
    # A weight of 0 has no logarithm: its shift is -inf, its sign 0.
    return {"sign": case["sign"].T, "exponent": case["shift"].T, "bias": case["bias"]}


def shift_layer(case, **arguments):
    return ShiftDense(case["output"].shape[-1], activations="fixed_point", **arguments)


def vector_jacobian_product(layer, params, case):
    output, pull_back = jax.vjp(lambda params, x: layer.apply({"params": params}, x), params, case["input"])
    return output, *pull_back(jnp.asarray(case["cotangent"]))


@pytest.mark.parametrize("case", CASES)
def test_shift_dense_ps_has_the_authors_output_and_all_their_gradients(golden, case):
    case = golden["deepshift_ps"][case]
    params = ps_arguments(case)
    output, grad_params, grad_input = vector_jacobian_product(shift_layer(case, mode="ps"), params, case)
    assert_close(output, case["output"])
    assert_close(grad_input, case["grad_input"])
    assert_close(grad_params["exponent"], case["grad_shift"].T)
    assert_close(grad_params["sign"], case["grad_sign"].T)
    assert_close(grad_params["bias"], case["grad_bias"])


@pytest.mark.parametrize("case", CASES)
def test_matshift_has_the_output_of_the_authors_shift_layer(golden, xla_implementation, case):
    case = golden["deepshift_ps"][case]
    output = matshift(
        case["input"], case["sign"].T, case["shift"].T, 5, "fixed_point", implementation=xla_implementation
    )
    assert_close(output + np.floor(case["bias"] * 2**16) / 2**16, case["output"])


def smallest_exponent_departure(kernel):
    """What our rounding to 2^-14..1 differs by from the authors' to 2^-15..1: (indices, our - theirs).

    The authors' layer "q" clips the exponent to -15, their layer "ps" and the paper's five bits to -14.
    """
    below = (kernel != 0) & (np.abs(kernel) < 2**-14.5)
    return np.where(below, np.sign(kernel) * (2.0**-14 - 2.0**-15), 0).astype(np.float32)


@pytest.mark.parametrize("case", CASES)
def test_shift_dense_q_has_the_authors_output_and_gradients_but_for_the_smallest_exponent(golden, case):
    case = golden["deepshift_q"][case]
    departure = smallest_exponent_departure(case["dense_kernel"])
    assert np.count_nonzero(departure) == 1
    params = {"kernel": case["dense_kernel"].T, "bias": case["bias"]}
    output, grad_params, grad_input = vector_jacobian_product(shift_layer(case, mode="q"), params, case)
    assert_close(output - case["input"] @ departure.T, case["output"])
    assert_close(grad_input - case["cotangent"] @ departure, case["grad_input"])
    assert_close(grad_params["kernel"], case["grad_weight"].T)
    assert_close(grad_params["bias"], case["grad_bias"])


def test_shift_dense_q_rounds_the_authors_smallest_weight_to_the_smallest_exponent(golden):
    case = golden["deepshift_q"]["0"]
    departure = smallest_exponent_departure(case["dense_kernel"])
    layer = ShiftDense(1, mode="q", use_bias=False)
    row = np.flatnonzero(departure.any(axis=1))
    kernel = case["dense_kernel"][row].T
    output = layer.apply({"params": {"kernel": kernel}}, np.eye(len(kernel), dtype=np.float32))
    smallest = departure[row][0] != 0
    np.testing.assert_array_equal(np.asarray(output)[smallest, 0], np.sign(kernel[smallest, 0]) * 2.0**-14)


def test_apot_has_the_authors_levels(golden):
    assert_close(additive_power_of_two_levels(5), np.sort(golden["apot"]["levels"]))


@pytest.mark.parametrize("case", CASES)
def test_apot_has_the_authors_codes(golden, case):
    case = golden["apot"][case]
    codes = additive_power_of_two_codes(jnp.asarray(case["dense_kernel"]))
    for code, name in zip(codes, ("sign", "sign_1", "sign_2", "shift_1", "shift_2"), strict=True):
        np.testing.assert_array_equal(code, case[name], err_msg=name)


@pytest.mark.parametrize("case", CASES)
def test_apot_values_are_those_that_the_authors_codes_stand_for(golden, case):
    case = golden["apot"][case]
    first = case["sign_1"] * 4.0 ** case["shift_1"]
    second = case["sign_2"] * 4.0 ** case["shift_2"] / 2
    expected = case["sign"] * (first + second) * 2 / 3
    assert_close(additive_power_of_two(jnp.asarray(case["dense_kernel"])), expected)


@pytest.mark.parametrize("case", CASES)
def test_moe_weighs_each_token_by_the_authors_gate(golden, case):
    case = golden["gate"][case]
    inputs = case["w_gate"].shape[0]
    # Whatever the token, expert "dense" answers (1, 0) and "shift" (0, 1): the output is the gates.
    bias = {"dense": np.float32([1, 0]), "shift": np.float32([0, 1])}
    params = {name: {"kernel": np.zeros((inputs, 2), np.float32), "bias": b} for name, b in bias.items()}
    params["router"] = {"kernel": case["w_gate"], "bias": np.zeros(2, np.float32)}
    assert_close(jax.jit(MoEDense(2).apply)({"params": params}, case["input"]), case["gates"])


@pytest.mark.parametrize("case", CASES)
def test_latency_aware_loss_is_the_authors_but_for_the_load_that_they_leave_unweighted(golden, case):
    # In eval mode the authors weigh the importance 6:4 and forget the load; the paper weighs both.
    case = golden["gate"][case]
    latencies = (6, 4)
    importance = jax.nn.softmax(jnp.asarray(case["input"] @ case["w_gate"])).sum(axis=0)
    tokens = (case["gates"] > 0).sum(axis=0)
    unweighted = jnp.asarray(tokens / np.array(latencies), jnp.float32)
    loss = latency_aware_loss(importance, unweighted, latencies)
    assert_close(loss, case["loss_eval_weights_6_4"])
