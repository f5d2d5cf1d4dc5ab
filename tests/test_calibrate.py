import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import shiftaddvit_jax as sav
from shiftaddvit_jax.calibrate import (
    Moments,
    calibrate_with_report,
    compensated_rounding,
    fit_layer,
)
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.models import PyramidVisionTransformer, PyramidVisionTransformerV2, VisionTransformer
from shiftaddvit_jax.models.inspect import capture
from shiftaddvit_jax.nn import Block, Dense
from shiftaddvit_jax.ops import power_of_two

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


@pytest.fixture(scope="module")
def vit():
    model, variables = make("vit")
    return model, variables, calibrate_with_report(model, variables, images(), mlp="shift")


def nearest(weights):
    """The nearest power of two of each weight, by trying all."""
    return POWERS[np.argmin(np.abs(np.asarray(weights)[..., None] - POWERS), axis=-1)]


def slow_gptq(weight, hessian):
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
    np.testing.assert_array_equal(compensated_rounding(weight, hessian), slow_gptq(weight, hessian))


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


def test_convert_writes_a_checkpoint_that_packs_without_loss(tmp_path, capsys, recwarn):
    model = sav.create_model("pvt_v2_nano", num_classes=10, attention="msa")
    about = {"class_names": list("0123456789"), "top1": 0.5}
    sav.save_model(tmp_path / "dense", model, sav.init_variables(model, jax.random.key(0)), about)
    command = ["convert", str(tmp_path / "dense"), "--images", "digits", "--count", "16", "--mlp"]
    assert main([*command, "shift,dense,dense,dense", "--output", str(tmp_path / "shift")]) == 0
    assert "2 layers, 16 images" in capsys.readouterr().out
    student, variables, description = sav.load_model(tmp_path / "shift")
    assert student.mlp == ("shift", "dense", "dense", "dense")
    assert description["class_names"] == list("0123456789")
    assert "top1" not in description
    sav.pack(student, variables)
    assert not [warning for warning in recwarn if "weights" in str(warning.message)]
    assert main([*command, "shift", "--images", "nowhere", "--output", str(tmp_path / "other")]) == 2
    assert "--images must be a folder or one of digits" in capsys.readouterr().err
