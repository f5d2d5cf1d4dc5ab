import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
import tempfile
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict, unflatten_dict

import shiftaddvit_jax as sav
from shiftaddvit_jax import compile as compiling
from shiftaddvit_jax.compile import compile_kernels, kernels_of, runs_on_kernels


@functools.cache
def model_and_packed(activations="float", mlp="moe"):
    model = sav.create_model(
        "pvt_v2_nano", num_classes=10, attention="hamming_linear", mlp=mlp, activations=activations
    )
    variables = sav.init_variables(model, jax.random.key(0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that 4 bits move some weights
        return model, sav.pack(model, variables)


def on(model, implementation):
    return model.clone(primitives=dataclasses.replace(model.primitives, implementation=implementation))


@functools.cache
def apply_function(activations, implementation):
    model, _ = model_and_packed(activations)
    return jax.jit(on(model, implementation).apply)


def both(packed, x, activations="float"):
    return [apply_function(activations, implementation)(packed, x) for implementation in ("tvm", "xla")]


def images(batch, side=32):
    return jax.random.normal(jax.random.key(1), (batch, side, side, 3))


@pytest.mark.parametrize(("batch", "side"), [(1, 32), (3, 32), (1, 45)])
def test_a_models_logits_are_xlas(batch, side):
    _, packed = model_and_packed()
    logits, reference = both(packed, images(batch, side))
    np.testing.assert_allclose(logits, reference, rtol=0, atol=1e-4)


def test_a_models_int8_logits_are_nearly_xlas():
    _, packed = model_and_packed("int8")
    logits, reference = both(packed, images(2), "int8")
    np.testing.assert_allclose(logits, reference, rtol=0, atol=2e-3)


@functools.cache
def features_function(activations, implementation):
    model, _ = model_and_packed(activations)
    return jax.jit(functools.partial(on(model, implementation).apply, method="features"))


@pytest.mark.parametrize(
    ("activations", "batch", "side", "bound"), [("float", 1, 45, 1e-4), ("int8", 2, 32, 2e-2)]
)
def test_a_models_features_are_xlas(activations, batch, side, bound):
    _, packed = model_and_packed(activations)
    found, reference = (
        features_function(activations, implementation)(packed, images(batch, side))
        for implementation in ("tvm", "xla")
    )
    assert [tokens.shape[-1] for tokens in found] == [32, 48, 64, 96]
    for one, other in zip(found, reference, strict=True):
        assert np.abs(np.mean(one, axis=-1)).max() < 1e-5  # a LayerNorm came last
        np.testing.assert_allclose(one, other, rtol=0, atol=bound)


def test_features_run_on_the_kernels_of_the_logits():
    model, packed = model_and_packed(mlp="shift")
    lowered = jax.jit(lambda x: sav.features(model, packed, x)).lower(images(1)).as_text()
    assert len(re.findall("shiftaddvit\\.", lowered)) == 12  # all but the head's


def test_a_dense_models_logits_in_bfloat16_are_nearly_xlas():
    model = sav.create_model("pvt_v2_nano", num_classes=10, attention="msa", precision="bfloat16")
    variables = sav.init_variables(model, jax.random.key(0))
    logits, reference = (jax.jit(on(model, name).apply)(variables, images(2)) for name in ("tvm", "xla"))
    np.testing.assert_allclose(logits, reference, rtol=0, atol=2e-3)
    exact = dataclasses.replace(model.primitives, precision="float32", implementation="xla")
    apart = np.abs(jax.jit(model.clone(primitives=exact).apply)(variables, images(2)) - reference).max()
    assert np.abs(logits - reference).max() < apart < 0.1


def test_packed_weights_run_on_kernels_by_themselves():
    model, packed = model_and_packed(mlp="shift")
    lowered = jax.jit(lambda x: model.apply(packed, x)).lower(images(1)).as_text()
    assert len(re.findall("shiftaddvit\\.", lowered)) == 13


def test_an_image_does_not_depend_on_its_batch():
    _, packed = model_and_packed()
    apply, batch = apply_function("float", "tvm"), images(3)
    together = apply(packed, batch)
    alone = jnp.concatenate([apply(packed, image[None]) for image in batch])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


@pytest.mark.parametrize("expert", ["dense", "shift"])
def test_all_tokens_may_go_to_one_expert(expert):
    _, packed = model_and_packed()
    bias = jnp.asarray([100.0, -100.0] if expert == "dense" else [-100.0, 100.0])
    flat = flatten_dict(packed)
    routed = unflatten_dict({k: bias if k[-2:] == ("router", "bias") else v for k, v in flat.items()})
    logits, reference = both(routed, images(1))
    np.testing.assert_allclose(logits, reference, rtol=0, atol=1e-4)


def test_a_packed_checkpoint_comes_back_bit_for_bit(tmp_path):
    model, packed = model_and_packed()
    sav.save_model(tmp_path / "model", model, packed)
    _, loaded, description = sav.load_model(tmp_path / "model")
    assert description["packed"]
    jax.tree.map(np.testing.assert_array_equal, packed, loaded)


def test_the_kernels_of_a_model_are_those_that_its_first_call_makes():
    model, _ = model_and_packed()
    kernels = kernels_of(on(model, "tvm"))
    compile_kernels(kernels)
    named = {kernel.name for kernel in kernels}
    expected = {"patch_embed", "hamming_linear", "softmax_attention", "mlp", "head"}
    assert named == expected


def test_where_nothing_compiles_a_model_runs_on_kernels_if_all_of_them_are_there(monkeypatch):
    model, _ = model_and_packed()
    keys = {kernel.key for kernel in kernels_of(on(model, "tvm"))}
    monkeypatch.setattr(compiling, "is_installed", lambda: False)
    monkeypatch.setattr(compiling, "is_provided", keys.__contains__)
    assert runs_on_kernels(model)
    keys.pop()
    assert not runs_on_kernels(model)


ON_FOUR_DEVICES = """
import json, re, sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import shiftaddvit_jax as sav

model, packed, _ = sav.load_model(sys.argv[1])
images = np.random.default_rng(0).normal(size=(8, 32, 32, 3)).astype(np.float32)
mesh = Mesh(jax.devices(), "batch")
split = jax.device_put(images, NamedSharding(mesh, PartitionSpec("batch")))
whole = jax.device_put(packed, NamedSharding(mesh, PartitionSpec()))
program = jax.jit(model.apply).lower(whole, split).compile()
text = program.as_text()
found = {
    "one": jax.jit(model.apply)(packed, images).tolist(),
    "four": program(whole, split).tolist(),
    "batches": re.findall(r"\\w+\\[(\\d+),[\\d,]*\\]\\S* custom-call\\([^\\n]*shiftaddvit\\.", text),
    "exchanges": re.findall(r"all-gather|all-reduce|all-to-all|collective-permute", text),
}
print(json.dumps(found))
"""


@functools.cache
def on_four_devices():
    model, packed = model_and_packed(mlp="shift")
    with tempfile.TemporaryDirectory() as folder:
        sav.save_model(f"{folder}/model", model, packed)
        flags = os.environ["XLA_FLAGS"] + " --xla_force_host_platform_device_count=4"
        command = [sys.executable, "-c", ON_FOUR_DEVICES, f"{folder}/model"]
        environment = {**os.environ, "XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def test_each_of_four_devices_computes_a_quarter_of_the_batch():
    found = on_four_devices()
    assert found["batches"] == ["2"] * 13
    assert not found["exchanges"]


def test_the_logits_of_four_devices_are_those_of_one():
    found = on_four_devices()
    np.testing.assert_allclose(found["four"], found["one"], rtol=0, atol=1e-6)
