import dataclasses
import logging
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import shiftaddvit_jax as sav
from shiftaddvit_jax.calibrate import Moments, calibrate_with_report, compensated_rounding, fit_layer
from shiftaddvit_jax.calibrate.choice import MULTIPLY, SHIFT, Candidate, cheapest
from shiftaddvit_jax.calibrate.fit import fit_dense
from shiftaddvit_jax.calibrate.routing import fit_mixture
from shiftaddvit_jax.calibrate.smoothing import smooth
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.costs.energy import UNIT_ENERGIES
from shiftaddvit_jax.models import PyramidVisionTransformer, PyramidVisionTransformerV2, VisionTransformer
from shiftaddvit_jax.models.inspect import capture, watch_routers
from shiftaddvit_jax.nn import Block, Dense
from shiftaddvit_jax.ops import power_of_two, two_powers_of_two

POWERS = np.concatenate([sign * 2.0 ** np.arange(-14, 1) for sign in (1, -1)])
PYRAMID = {
    "image_size": 32,
    "num_classes": 3,
    "embed_dims": (8, 8, 8, 16),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 1, 2),
    "mlp_ratios": (2, 2, 2, 2),
    "sr_ratios": (8, 4, 2, 1),
    "attention": ("sra",) * 4,
    "mlp": ("dense",) * 4,
    "projections": ("dense",) * 4,
}
MODELS = {
    "vit": VisionTransformer(
        "deit_tiny", 32, 3, 16, 2, 2, False, ("msa",), ("dense",), ("dense",), layer_norm_eps=1e-6
    ),
    "pvt": PyramidVisionTransformer("pvt_tiny", **PYRAMID),
    "pvt_v2": PyramidVisionTransformerV2("pvt_v2_b0", mlp_relu=False, **PYRAMID),
}


def flat(variables):
    return flatten_dict(variables["params"], sep="/")


def correlated(tokens, inputs, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((tokens, 4)) @ rng.standard_normal((4, inputs)) + 0.3 * rng.standard_normal(
        (tokens, inputs)
    )


def images(count=200):
    return np.random.default_rng(1).standard_normal((count, 32, 32, 3), np.float32)


def make(name):
    model = MODELS[name]
    variables = sav.init_variables(model, jax.random.key(0))
    # Weights as large as trained ones, whose rounding shows.
    keys = iter(jax.random.split(jax.random.key(1), 400))
    return model, jax.tree.map(lambda leaf: leaf + 0.2 * jax.random.normal(next(keys), leaf.shape), variables)


@pytest.fixture(scope="module", params=MODELS)
def any_family(request):
    model, variables = make(request.param)
    return (
        model,
        variables,
        calibrate_with_report(model, variables, images(), mlp="shift", projections="shift"),
    )


def with_outliers(variables):
    """The first channel of LayerNorms is 50 times as large, and read with a fiftieth of its weights."""

    def scaled(path, leaf):
        *_, module, name = (key.key for key in path)
        if module in ("norm1", "norm2"):
            return leaf.at[0].multiply(50)
        return leaf.at[0].divide(50) if module in ("qkv", "fc1") and name == "kernel" else leaf

    return jax.tree_util.tree_map_with_path(scaled, variables)


@pytest.mark.parametrize("name", MODELS)
def test_smoothing_moves_outliers_and_changes_no_output(name):
    model, variables = make(name)
    variables = with_outliers(variables)
    smoothed = smooth(model, variables, images(20), 0.5)
    before, after = (jax.jit(model.apply)(each, images(20)) for each in (variables, smoothed))
    np.testing.assert_allclose(after, before, rtol=0, atol=1e-5 * np.abs(before).max())
    norms = [norm for norm in flat(variables) if norm.endswith(("norm1/scale", "norm2/scale"))]
    for norm in norms:
        old, new = (np.abs(flat(each)[norm]) for each in (variables, smoothed))
        assert new.max() / np.median(new) < old.max() / np.median(old)


def test_smoothing_helps_products_in_int8():
    model, variables = make("vit")
    variables = with_outliers(variables)
    dense = jax.jit(model.apply)(variables, images(20))
    whole = model.clone(primitives=dataclasses.replace(model.primitives, precision="int8"))
    errors = [
        np.mean(np.square(jax.jit(whole.apply)(each, images(20)) - dense))
        for each in (variables, smooth(model, variables, images(20), 0.5))
    ]
    assert errors[1] < errors[0] / 2


@pytest.fixture(scope="module")
def vit():
    model, variables = make("vit")
    return model, variables, calibrate_with_report(model, variables, images(), mlp="shift")


def nearest_of_two(weights):
    """Rounds to sums and differences of two of seven powers, at a scale that holds an output's largest."""
    powers = 2.0 ** np.arange(7)
    numbers = {0, *powers, *np.add.outer(powers, powers).flat, *np.subtract.outer(powers, powers).flat}
    numbers = np.array(sorted(number for number in numbers if 0 <= number <= 96))
    scale = 2.0 ** np.ceil(np.log2(np.abs(weights).max(axis=0) / 104))

    def nearest(row):
        closest = np.abs(np.abs(row / scale)[..., None] - numbers).argmin(axis=-1)
        return np.sign(row) * numbers[closest] * scale

    return nearest


def nearest(weights):
    """The nearest power of two of each weight, by trying all."""
    return POWERS[np.argmin(np.abs(np.asarray(weights)[..., None] - POWERS), axis=-1)]


def slow_gptq(weight, hessian, nearest):
    """Optimal brain quantization in a fixed order: after each input, the inverse loses its row and column."""
    weight, inverse = np.array(weight, np.float64), np.linalg.inv(hessian)
    rounded = np.zeros_like(weight)
    for row in np.argsort(-np.diag(hessian)):
        rounded[row] = nearest(weight[row])
        error = (weight[row] - rounded[row]) / inverse[row, row]
        weight -= np.outer(inverse[:, row], error)
        inverse -= np.outer(inverse[:, row], inverse[row]) / inverse[row, row]
    return rounded


@pytest.mark.parametrize("inputs", [22, 150])  # less than a block, and two of which one is padded
def test_rounding_equals_a_slow_gptq(inputs):
    x = correlated(400, inputs)
    hessian = x.T @ x + np.eye(inputs)
    weight = 0.3 * np.random.default_rng(2).standard_normal((inputs, 5))
    np.testing.assert_array_equal(compensated_rounding(weight, hessian), slow_gptq(weight, hessian, nearest))
    two = compensated_rounding(weight, hessian, weight_terms=2)
    np.testing.assert_array_equal(two, slow_gptq(weight, hessian, nearest_of_two(weight)))


def test_uncorrelated_inputs_give_the_nearest_powers():
    weight = np.random.default_rng(3).standard_normal((12, 7))
    hessian = np.diag(np.arange(1.0, 13.0))
    np.testing.assert_array_equal(compensated_rounding(weight, hessian), nearest(weight))


def test_compensation_takes_away_more_than_half_of_the_error_on_correlated_inputs():
    x = correlated(400, 32)
    weight = 0.3 * np.random.default_rng(4).standard_normal((32, 16))
    errors = [
        np.sum(np.square(x @ (weight - rounded)))
        for rounded in (compensated_rounding(weight, x.T @ x), nearest(weight))
    ]
    assert errors[0] < errors[1] / 2


def test_two_terms_leave_a_hundredth_of_the_error_of_one():
    x = correlated(400, 32)
    weight = 0.3 * np.random.default_rng(4).standard_normal((32, 16))
    errors = [
        np.sum(np.square(x @ (weight - compensated_rounding(weight, x.T @ x, weight_terms=terms))))
        for terms in (1, 2)
    ]
    assert errors[1] < errors[0] / 20


def moments(x, y):
    return Moments(len(x), x.sum(0), y.sum(0), x.T @ x, x.T @ y, np.sum(y**2, axis=0))


def test_a_layer_makes_up_for_what_the_layers_before_it_changed():
    x = correlated(500, 12)
    kernel = 0.3 * np.random.default_rng(5).standard_normal((12, 6))
    wanted = x @ kernel + 0.7
    found = moments(1.5 * x + 2, wanted)
    fit = fit_layer(found, kernel)
    np.testing.assert_allclose((1.5 * x + 2).mean(0) @ fit["kernel"] + fit["bias"], wanted.mean(0), atol=1e-5)
    assert found.signal_to_noise(**fit) > found.signal_to_noise(nearest(kernel), wanted.mean(0)) + 3


def test_signal_to_noise_is_that_of_the_outputs():
    x = correlated(300, 12) + 1
    kernel, bias = np.random.default_rng(6).standard_normal((12, 6)), np.arange(6.0)
    wanted = x @ kernel + bias
    noise = wanted - (x @ nearest(kernel) + bias)
    expected = 10 * np.log10(np.sum(np.square(wanted - wanted.mean(0))) / np.sum(np.square(noise)))
    assert moments(x, wanted).signal_to_noise(nearest(kernel), bias) == pytest.approx(expected)


def test_a_dense_layer_is_the_ridge_regression_that_is_drawn_to_the_old_kernel():
    x = correlated(500, 12)
    kernel = np.random.default_rng(5).standard_normal((12, 6))
    wanted = 2 * x @ kernel + 0.7
    fit = fit_dense(moments(x, wanted), kernel)
    centred = x - x.mean(0)
    damping = 0.01 * np.mean(np.sum(centred**2, axis=0)) * np.eye(12)
    right = np.linalg.solve(centred.T @ centred + damping, centred.T @ wanted + damping @ kernel)
    np.testing.assert_allclose(fit["kernel"], right, rtol=1e-5)
    np.testing.assert_allclose(x.mean(0) @ fit["kernel"] + fit["bias"], wanted.mean(0), rtol=1e-5)


@pytest.fixture(scope="module")
def mixture():
    """Tokens of which those with a large first channel lose most, and a mixture fitted to them."""
    rng = np.random.default_rng(9)
    x = rng.standard_normal((600, 8)).astype(np.float32)
    dense = {"kernel": rng.standard_normal((8, 5)).astype(np.float32), "bias": np.zeros(5, np.float32)}
    shift = {"kernel": dense["kernel"].copy(), "bias": np.full(5, 0.05, np.float32)}
    shift["kernel"][0] += 0.5
    x[:, 0] = np.exp(x[:, 0])
    wanted = x @ dense["kernel"]
    batches = [(x[:300], wanted[:300]), (x[300:], wanted[300:])]
    return x, wanted, dense, shift, fit_mixture(lambda: iter(batches), dense, shift, 0.6)


def routed(mixture):
    x, _, dense, shift, (params, _) = mixture
    logits = x @ params["router"]["kernel"] + params["router"]["bias"]
    y = [x @ expert["kernel"] + expert["bias"] for expert in (dense, shift)]
    probabilities = np.exp(logits - logits.max(1, keepdims=True))
    probabilities /= probabilities.sum(1, keepdims=True)
    return np.argmax(logits, 1), np.where(np.argmax(logits, 1)[:, None] == 0, *y) * probabilities.max(1)[
        :, None
    ]


def test_a_fitted_router_shares_out_the_tokens_as_asked(mixture):
    chosen, _ = routed(mixture)
    assert np.mean(chosen == 1) == pytest.approx(0.6, abs=0.005)


def test_the_tokens_that_lose_most_go_to_the_dense_expert(mixture):
    x, wanted, dense, shift, _ = mixture
    chosen, _ = routed(mixture)
    losses = [np.mean((wanted - x @ it["kernel"] - it["bias"]) ** 2, axis=1) for it in (dense, shift)]
    more = losses[1] - losses[0]
    assert np.mean(more[chosen == 0]) > 3 * np.mean(more[chosen == 1])


def test_a_mixtures_noise_is_what_its_outputs_miss(mixture):
    _, found = routed(mixture)
    noise = np.mean((mixture[1] - found) ** 2, axis=0)
    np.testing.assert_allclose(mixture[4][1], noise, rtol=1e-3)


def candidates(*costs):
    return [
        Candidate(choice, *cost)
        for choice, cost in zip(("shift", "shift_two_terms", "moe"), costs, strict=True)
    ]


@pytest.mark.parametrize(
    ("error", "choices"),
    [
        (np.inf, ("shift", "shift")),
        (8.5, ("shift", "shift_two_terms")),  # 4 of error for 1 of energy, rather than 3
        (5.5, ("shift_two_terms", "shift_two_terms")),
        (0.0, ("moe", "moe")),
    ],
)
def test_the_step_that_takes_most_error_for_its_energy_comes_first(error, choices):
    table = {"a": candidates((1, 6), (2, 3), (9, 1)), "b": candidates((1, 6), (2, 2), (9, 1))}
    found = cheapest(table, error)
    assert tuple(found[path].choice for path in "ab") == choices


def test_energies_are_those_of_the_accelerator():
    unit = UNIT_ENERGIES
    assert pytest.approx(unit["int8"]["shift"] + unit["int32"]["add"]) == SHIFT
    assert {
        "float32": unit["float32"]["multiply"] + unit["float32"]["add"],
        "bfloat16": unit["float16"]["multiply"] + unit["float32"]["add"],
        "int8": unit["int8"]["multiply"] + unit["int32"]["add"],
    } == pytest.approx(MULTIPLY)


def test_constant_inputs_leave_each_weight_its_nearest_power():
    x, kernel = np.ones((50, 4)), 0.3 * np.random.default_rng(7).standard_normal((4, 3))
    fit = fit_layer(moments(x, x @ kernel), kernel)
    np.testing.assert_array_equal(fit["kernel"], nearest(kernel))
    np.testing.assert_allclose(fit["kernel"].sum(0) + fit["bias"], kernel.sum(0), atol=1e-6)


def test_kernels_are_powers_of_two_and_the_rest_is_the_dense_model_s(any_family):
    _, variables, (student, calibrated, layers) = any_family
    old, new = flat(variables), flat(calibrated)
    assert student.mlp == student.projections == ("shift",) * len(student.mlp)
    names = {layer.name for layer in layers}
    assert names == {name.rpartition("/")[0] for name in new if "/fc" in name or "/attn/" in name} - {
        name.rpartition("/")[0] for name in new if "/attn/sr/" in name or "/attn/norm/" in name
    }
    for name, leaf in new.items():
        if name.rpartition("/")[0] not in names:
            assert jnp.array_equal(leaf, old[name]), name
        elif name.endswith("kernel"):
            assert jnp.array_equal(leaf, power_of_two(leaf)), name


def test_calibrated_models_come_nearer_than_rounded_ones(any_family):
    model, variables, (student, calibrated, _) = any_family
    others = np.random.default_rng(8).standard_normal((40, 32, 32, 3), np.float32)
    rounded = sav.reparameterize(model, variables, mlp="shift", projections="shift")[1]
    dense = jax.jit(model.apply)(variables, others)
    shift = jax.jit(student.apply)
    calibrated, rounded = (np.mean(np.square(shift(it, others) - dense)) for it in (calibrated, rounded))
    assert calibrated < rounded / 2


def test_each_block_puts_out_the_dense_block_s_mean(any_family):
    """Which it does only if a layer was fitted to what the shift layers before it put out."""
    model, variables, (student, calibrated, _) = any_family

    def look(module, method, arguments, result):
        return result if isinstance(module, Block) and method == "__call__" else None

    dense = capture(model, variables, images(), look)
    shift = capture(student, calibrated, images(), look)
    assert len(dense) == (2 if "block1" in dense else 4)
    for name, (tokens,) in dense.items():
        mean, scale = np.mean(tokens, axis=(0, 1)), np.std(tokens)
        np.testing.assert_allclose(np.mean(shift[name][0], axis=(0, 1)), mean, atol=1e-3 * scale)


def test_the_first_layer_s_ratios_are_those_of_its_outputs(vit):
    model, variables, (_, calibrated, layers) = vit
    name = "block1/mlp/fc1"

    def look(module, method, arguments, result):
        is_it = isinstance(module, Dense) and method == "__call__" and "/".join(module.path) == name
        return (arguments[0], result) if is_it else None

    ((x, y),) = capture(model, variables, images(), look)[name]
    x, y = (np.asarray(z, np.float64).reshape(-1, z.shape[-1]) for z in (x, y))
    kernel, bias = (np.asarray(flat(calibrated)[f"{name}/{leaf}"], np.float64) for leaf in ("kernel", "bias"))
    ratio = 10 * np.log10(np.sum((y - y.mean(0)) ** 2) / np.sum((y - x @ kernel - bias) ** 2))
    assert layers[0].name == name
    assert layers[0].calibrated == pytest.approx(ratio, abs=0.01)
    assert layers[0].calibrated > layers[0].rounded


@pytest.fixture(scope="module")
def mixed(vit):
    model, variables, _ = vit
    layers = {"block1/mlp/fc2": "moe", "block2/mlp/fc1": "shift_two_terms", "block2/attn/qkv": "dense_int8"}
    return calibrate_with_report(model, variables, images(), layers=layers)


def test_single_layers_are_fitted_as_what_they_become(mixed):
    student, variables, layers = mixed
    assert dict(student.primitives.layers) == {layer.name: layer.choice for layer in layers}
    two = flat(variables)["block2/mlp/fc1/kernel"]
    assert jnp.array_equal(two, two_powers_of_two(two))
    assert all(layer.calibrated >= layer.rounded - 0.1 for layer in layers)


def test_a_fitted_mixture_loses_less_than_shifts_alone(vit, mixed):
    moe, shift = (
        next(layer for layer in each if layer.name == "block1/mlp/fc2") for each in (mixed[2], vit[2][2])
    )
    assert moe.calibrated > shift.calibrated + 1


def test_a_mixture_sends_the_share_of_its_latencies_to_shifts(mixed):
    student, variables, _ = mixed
    name = "block1/mlp/fc2/router"
    chosen = watch_routers(student)(variables, images())[name][0]
    assert np.mean(chosen) == pytest.approx(0.6, abs=0.01)


def error_of(model, variables, dense):
    """The squared error of the logits in percent of their variance."""
    return float(100 * np.mean(np.square(jax.jit(model.apply)(variables, images()) - dense)) / np.var(dense))


def test_a_budget_of_error_buys_better_choices_than_one_term(vit):
    model, variables, (student, one, report) = vit
    dense = jax.jit(model.apply)(variables, images())
    spent = error_of(student, one, dense)
    chosen, fitted, layers = calibrate_with_report(
        model, variables, images(), mlp="shift", budget=spent / 4, proxy="error"
    )
    assert error_of(chosen, fitted, dense) <= spent / 4
    assert {layer.name for layer in layers} == {layer.name for layer in report}
    assert len({layer.choice for layer in layers}) > 1  # no more than it takes


def test_attentions_stay_as_they_are_unless_asked(vit):
    assert [layer.name for layer in vit[2][2]] == [
        f"block{block}/mlp/fc{number}" for block in (1, 2) for number in (1, 2)
    ]
    assert vit[2][0].projections == ("dense",)


def test_calibration_is_deterministic(vit):
    model, variables, (_, calibrated, _) = vit
    again = sav.calibrate(model, variables, images(), mlp="shift")[1]
    jax.tree.map(np.testing.assert_array_equal, again, calibrated)


def test_another_attention_s_last_layer_is_fitted_to_the_old_attention(vit):
    model, variables, _ = vit
    student, fitted, layers = calibrate_with_report(model, variables, images(), attention="linear")
    assert student.attention == ("linear",)
    assert [(layer.name, layer.choice) for layer in layers] == [
        (f"block{block}/attn/proj", "dense") for block in (1, 2)
    ]
    assert all(layer.calibrated > layer.rounded + 3 for layer in layers)
    inherited = sav.reparameterize(model, variables, attention="linear")[1]
    dense = jax.jit(model.apply)(variables, images())
    errors = [np.mean(np.square(jax.jit(student.apply)(it, images()) - dense)) for it in (fitted, inherited)]
    assert errors[0] < errors[1] / 2


def test_a_rotation_of_the_new_attention_is_there_while_it_is_fitted(vit):
    model, variables, _ = vit
    kinds = {"attention": "hamming_quadratic", "rotation": "hadamard_2x"}
    student, fitted, layers = calibrate_with_report(model, variables, images(64), **kinds)
    assert student.primitives.rotation == "hadamard_2x"
    assert {leaf.shape for leaf in jax.tree.leaves(fitted["rotation"])} == {(2, 2, 8)}
    assert all(layer.calibrated > layer.rounded for layer in layers)


def test_too_few_tokens_are_said_once(vit, caplog):
    model, variables, _ = vit
    with caplog.at_level(logging.WARNING):
        _, calibrated = sav.calibrate(model, variables, images(2), mlp="shift")
    assert [record.message[:9] for record in caplog.records] == ["4 layers,"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(calibrated))


def spoiled(variables):
    leaf = variables["params"]["head"]["bias"] + jnp.nan
    return {"params": {**variables["params"], "head": {**variables["params"]["head"], "bias": leaf}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda m, v, x: (m, v, x[:0]), "there are no images"),
        (lambda m, v, x: (m, v, x[:, :16, :16]), "must be 32 x 32 pixels for deit_tiny, got 16 x 16"),
        (lambda m, v, x: (m, v, x * np.float32(np.nan)), "pixels that are not finite"),
        (lambda m, v, x: (m, spoiled(v), x), "params/head/bias has numbers that are not finite"),
        (lambda m, v, x: (*sav.reparameterize(m, v, mlp="shift"), x), "converted already: its mlp has shift"),
        (lambda m, v, x: (m, sav.pack(m, v), x), "packed; expected a dense model's"),
        (lambda m, v, x: (m, v, x * np.float32(1e30)), "block1/mlp/fc1 overflows"),
    ],
)
def test_bad_input_is_refused_in_one_line(vit, change, message):
    model, variables, _ = vit
    with pytest.raises(ValueError, match=message) as error:
        sav.calibrate(*change(model, variables, images(16)), mlp="shift")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("kind", "message"), [(None, "nothing to calibrate"), ("moo", "kind of mlp")])
def test_a_kind_that_is_none_is_refused(vit, kind, message):
    with pytest.raises(ValueError, match=message):
        sav.calibrate(*vit[:2], images(1), mlp=kind)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"budget": -1.0}, "budget must be at least 0 points, got -1"),
        ({"budget": np.nan}, "budget must be at least 0 points, got nan"),
        ({"budget": 1.0, "proxy": "erro"}, "unknown proxy 'erro'; did you mean 'error'"),
        ({"smoothing": 1.5}, "smoothing must be between 0 and 1, got 1.5"),
        ({"weight_terms": 3}, "weight_terms must be 1 or 2, got 3"),
        ({"mlp": "moe", "latencies": {}}, "no latencies for block1/mlp/fc1"),
        (
            {"mlp": "dense", "projections": "dense", "layers": {"block1/mlp/fc3": "shift"}},
            "unknown linear layer",
        ),
    ],
    ids=str,
)
def test_bad_settings_are_refused_in_one_line(vit, settings, message):
    with pytest.raises(ValueError, match=message):
        sav.calibrate(*vit[:2], images(1), **{"mlp": "shift", **settings})


def test_convert_writes_a_checkpoint_that_packs_without_loss(tmp_path, capsys, recwarn):
    model = sav.create_model("pvt_v2_nano", num_classes=10, attention="msa")
    about = {"class_names": list("0123456789"), "top1": 0.5}
    sav.save_model(tmp_path / "dense", model, sav.init_variables(model, jax.random.key(0)), about)
    command = ["convert", str(tmp_path / "dense"), "--images", "digits", "--count", "16", "--mlp"]
    codes = ["--attention", "binary_softmax,msa,msa,msa", "--rotation", "hadamard_2x"]
    terms = ["--weight-terms", "2", "--output", str(tmp_path / "shift")]
    assert main([*command, "shift,dense,dense,dense", *codes, *terms]) == 0
    printed = capsys.readouterr().out
    assert "3 layers, 16 images" in printed  # the new attention's last one, too
    assert "shift_two_terms" in printed
    student, variables, description = sav.load_model(tmp_path / "shift")
    assert (student.primitives.weight_terms, student.primitives.rotation) == (2, "hadamard_2x")
    assert student.attention == ("binary_softmax", "msa", "msa", "msa")
    assert student.mlp == ("shift", "dense", "dense", "dense")
    assert description["class_names"] == list("0123456789")
    assert "top1" not in description
    sav.pack(student, variables)
    assert not [warning for warning in recwarn if "weights" in str(warning.message)]
    assert main([*command, "shift", "--images", "nowhere", "--output", str(tmp_path / "other")]) == 2
    assert "--images must be a folder or one of digits" in capsys.readouterr().err


def test_a_budget_predicts_mixtures_with_the_terms_that_they_get(monkeypatch):
    model, variables = make("vit")
    seen = []

    def spy(candidates, error):
        seen.append(candidates)
        return cheapest(candidates, error)

    # `shiftaddvit_jax.calibrate` is the function, and the module of that name in `sys.modules`.
    monkeypatch.setattr(sys.modules[cheapest.__module__], "cheapest", spy)
    calibrate_with_report(model, variables, images(8), mlp="shift", weight_terms=2, budget=100.0)
    energies = {found.choice: found.energy for found in next(iter(seen[0].values()))}
    shift_share = 0.6
    products = energies["shift"] / SHIFT
    expected = products * (shift_share * 2 * SHIFT + (1 - shift_share) * MULTIPLY["float32"])
    assert energies["moe"] == pytest.approx(expected)
