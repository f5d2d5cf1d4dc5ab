"""What JAX does with the GPU kernels: traced here for a GPU, and on one they run."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_tvm.gpu import library
from kernels_tvm.gpu.targets import GPU_TARGETS, gpu_target, supporting_target
from shiftaddvit_jax.nn import MoEDense
from shiftaddvit_jax.ops import binarize, pack_weight, packed_product

X = jnp.ones((2, 35, 36))
FORMATS = pytest.mark.parametrize("activations", ["float", "int8"])
gpu = pytest.mark.gpu
needs_gpu = pytest.mark.skipif(jax.default_backend() != "gpu", reason="JAX finds no NVIDIA GPU here")


def packed_layer(activations, outputs=20):
    weight = 2.0 ** jax.random.randint(jax.random.key(0), (36, outputs), -6, 0)
    return pack_weight(weight * jnp.where(weight > 0.1, 1, -1), 4 if activations == "int8" else 5)


@pytest.mark.usefixtures("as_on_a_gpu")
@FORMATS
def test_a_packed_product_is_a_custom_call_with_its_scratch(activations):
    call = jax.jit(lambda x: packed_product(x, packed_layer(activations), 20, activations))
    text = call.trace(X).lower(lowering_platforms=("cuda",)).as_text()
    ((name, arguments, results),) = re.findall(
        r'stablehlo\.custom_call @"(\S+?)"\(.*: \((.*)\) -> \(?(.*?)\)?$', text, re.MULTILINE
    )
    assert name.startswith("shiftaddvit.linear-cuda-sm_86-")
    assert arguments.startswith("tensor<70x36xf32>, tensor<2x9x")
    scratch = "tensor<70x48xi8>, tensor<70xf32>, " if activations == "int8" else ""
    assert results == scratch + "tensor<70x20xf32>"


@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_mixture_is_one_custom_call():
    layer = MoEDense(20, implementation="tvm")
    variables = jax.eval_shape(lambda: MoEDense(20).init(jax.random.key(0), X))
    text = jax.jit(layer.apply).trace(variables, X).lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r'custom_call @"shiftaddvit\.linear-cuda-sm_86-', text)) == 1
    assert "tensor<70xi32>" in text  # the rows' order


@pytest.mark.usefixtures("as_on_a_gpu")
def test_without_a_cuda_runtime_xla_runs_and_tvm_says_what_to_install(monkeypatch):
    monkeypatch.setattr(library, "has_runtime", lambda: False)
    packed = packed_layer("float")
    assert "shiftaddvit." not in jax.jit(lambda x: packed_product(x, packed, 20)).lower(X).as_text()
    with pytest.raises(ValueError, match=r"finds no CUDA 13 runtime \(pip install 'shiftaddvit-jax\[gpu"):
        packed_product(X, packed, 20, implementation="tvm")


@pytest.mark.usefixtures("as_on_a_gpu")
def test_binarization_is_a_custom_call_with_its_scratch():
    call = jax.jit(lambda x: binarize(x, implementation="tvm"))
    text = call.trace(X).lower(lowering_platforms=("cuda",)).as_text()
    assert "-> (tensor<2x16xf32>, tensor<2x35x36xf32>)" in text


def test_a_gpu_takes_the_best_code_of_its_own_generation():
    expected = {
        "7.5": "sm_75",
        "8.0": "sm_80",
        "8.6": "sm_86",
        "8.7": "sm_86",
        "8.9": "sm_89",
        "9.0": "sm_90",
    }
    assert {capability: supporting_target(capability).arch for capability in expected} == expected
    assert supporting_target("7.0") is None
    assert supporting_target("12.0") is None


def test_an_unknown_gpu_target_lists_those_that_there_are():
    with pytest.raises(ValueError, match="unknown target 'cuda-sm_99'; choose among cuda-sm_75, cuda-sm_80"):
        gpu_target("cuda-sm_99")
    assert [gpu_target(target.name) for target in GPU_TARGETS] == list(GPU_TARGETS)


@gpu
@needs_gpu
@FORMATS
@jax.default_matmul_precision("highest")  # XLA's own products would be of TensorFloat-32 numbers
@pytest.mark.parametrize("implementation", ["tvm", "tvm_shift"])
@pytest.mark.parametrize("rows", [1, 77, 3136])
def test_packed_products_run_on_a_gpu(activations, implementation, rows):
    x, packed = jax.random.normal(jax.random.key(1), (rows, 36)), packed_layer(activations)
    y, expected = (
        jax.jit(lambda x, chosen=chosen: packed_product(x, packed, 20, activations, chosen))(x)
        for chosen in (implementation, "xla")
    )
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)


@gpu
@needs_gpu
@FORMATS
@jax.default_matmul_precision("highest")
@pytest.mark.parametrize("rows", [1, 77, 3136])
def test_mixtures_run_on_a_gpu(activations, rows):
    x = jax.random.normal(jax.random.key(1), (rows, 36))
    layers = [MoEDense(20, activations=activations, implementation=chosen) for chosen in ("tvm", "xla")]
    variables = layers[1].init(jax.random.key(0), x)
    y, expected = (jax.jit(layer.apply)(variables, x) for layer in layers)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
