import dataclasses
import functools
import math
import re
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax.traverse_util import flatten_dict

import shiftaddvit_jax as sav
from kernels_tvm import store
from shiftaddvit_jax.models.inspect import on_xla
from shiftaddvit_jax.models.variables import count_parameters, variable_shapes
from shiftaddvit_jax.ops import two_powers_of_two
from shiftaddvit_jax.ops.implementation import custom_call
from shiftaddvit_jax.pack import packed_shapes, unpack

KINDS = {"attention": "msa", "projections": ("shift", "dense", "dense", "dense")}
MLP = ("shift", "dense", "shift", "dense")
MIXED = ("shift", "moe", "shift", "dense")  # XLA takes long to compile the mixtures
ACTIVATIONS = pytest.mark.parametrize("activations", ["float", "int8"])


@functools.cache
def model_and_variables(activations, mlp=MLP):
    model = sav.create_model("pvt_v2_nano", num_classes=10, activations=activations, mlp=mlp, **KINDS)
    shapes = variable_shapes(model)
    rng = np.random.default_rng(0)
    return model, jax.tree.map(lambda leaf: rng.normal(0, 0.2, leaf.shape).astype(np.float32), shapes)


@functools.cache
def packed_variables(activations, mlp=MLP):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore" if activations == "int8" else "error")
        return sav.pack(*model_and_variables(activations, mlp))


def images(batch=2):
    return np.random.default_rng(1).normal(size=(batch, 32, 32, 3)).astype(np.float32)


@functools.cache
def jitted(activations, implementation):
    model, _ = model_and_variables(activations)
    primitives = dataclasses.replace(model.primitives, implementation=implementation)
    return jax.jit(model.clone(primitives=primitives).apply)


def runs_a_kernel(function, variables):
    return "shiftaddvit." in function.lower(variables, images()).as_text()


def flat(variables):
    return flatten_dict(variables["params"])


def shift_kernels(variables):
    """The weights of the shift layers, by their layers' paths."""
    layers = [("stage1", "block1", "attn", name) for name in ("qkv", "proj")]
    for stage, expert in (("stage1", ()), ("stage2", ("shift",)), ("stage3", ())):
        layers += [(stage, "block1", "mlp", name, *expert) for name in ("fc1", "fc2")]
    return {layer: flat(variables)[(*layer, "kernel")] for layer in layers}


def powers(kernel):
    return np.sign(kernel) * 2.0 ** np.clip(np.round(np.log2(np.abs(kernel.astype(np.float64)))), -14, 0)


def octaves(weight):
    smallest = np.abs(weight).max(axis=0) / 64
    return np.sign(weight) * np.select(
        [np.abs(weight) >= smallest, np.abs(weight) >= smallest / 2], [np.abs(weight), smallest], 0
    )


@pytest.mark.slow
@ACTIVATIONS
@pytest.mark.parametrize("implementation", ["xla", "tvm"])
def test_packed_variables_give_the_logits_of_those_that_were_packed(activations, implementation):
    _, variables = model_and_variables(activations)
    function = jitted(activations, implementation)
    packed, unpacked = (function(each, images()) for each in (packed_variables(activations), variables))
    np.testing.assert_allclose(packed, unpacked, rtol=0, atol=1e-6 * np.abs(unpacked).max())


@ACTIVATIONS
def test_packing_changes_the_weights_of_linear_layers_alone(activations):
    _, variables = model_and_variables(activations, MIXED)
    before, after = flat(variables), flat(packed_variables(activations, MIXED))
    layers = shift_kernels(variables)
    made = {(*path, name) for path in layers for name in ("codes", "exponent")}
    blocks = {path for path in after if path[-1] == "blocks"}
    assert after.keys() - before.keys() == made | blocks
    replaced = {(*path, "kernel") for path in layers} | {(*path[:-1], "kernel") for path in blocks}
    assert before.keys() - after.keys() == replaced
    for path in before.keys() & after.keys():
        np.testing.assert_array_equal(before[path], after[path])


def test_blocks_hold_a_dense_weight_16_outputs_after_another():
    _, variables = model_and_variables("float", MIXED)
    before, after = flat(variables), flat(packed_variables("float", MIXED))
    for path in (("head",), ("stage1", "patch_embed", "proj"), ("stage2", "block1", "mlp", "fc1", "dense")):
        kernel, blocks = before[(*path, "kernel")], np.asarray(after[(*path, "blocks")])
        inputs, outputs = math.prod(kernel.shape[:-1]), kernel.shape[-1]
        expected = np.zeros((inputs, 16 * len(blocks)), np.float32)
        expected[:, :outputs] = kernel.reshape(inputs, outputs)
        for block, start in zip(blocks, range(0, expected.shape[1], 16), strict=True):
            np.testing.assert_array_equal(block, expected[:, start : start + 16])


@pytest.mark.parametrize("implementation", ["xla", "tvm", None])
@pytest.mark.parametrize("name", ["pvt_v2_nano", "deit_tiny"])
def test_a_dense_model_computes_the_same_packed(name, implementation):
    model = sav.create_model(name, num_classes=10, image_size=32, implementation=implementation)
    rng = np.random.default_rng(0)
    shapes = variable_shapes(model)
    variables = jax.tree.map(lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), shapes)
    expected = model.clone(primitives=dataclasses.replace(model.primitives, implementation="xla"))
    expected = jax.jit(expected.apply)(variables, images())
    result = jax.jit(model.apply)(sav.pack(model, variables), images())
    np.testing.assert_allclose(result, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize(("name", "kinds"), [("pvt_v2_nano", {"mlp": MIXED}), ("deit_tiny", {})])
def test_in_bfloat16_packing_rounds_dense_weights_and_no_others(name, kinds):
    model = sav.create_model(name, num_classes=10, image_size=32, precision="bfloat16", **kinds)
    before = flat(variable_shapes(model))
    after = flat(packed_shapes(model))
    rounded = {path for path, leaf in after.items() if leaf.dtype == jnp.bfloat16}
    products = {path[:-1] for path, leaf in before.items() if path[-1] == "kernel" and leaf.ndim in (2, 4)}
    others = {path for path in products if path[-1] in ("router", "dwconv")}
    shifts = {path[:-1] for path in after if path[-1] == "codes"}
    assert {path[:-1] for path in rounded} == products - others - shifts
    assert rounded


@pytest.mark.parametrize("implementation", ["xla", "tvm"])
def test_in_bfloat16_weights_may_be_rounded_before(implementation):
    model, variables = model_and_variables("float", "dense")
    formats = {"precision": "bfloat16", "implementation": implementation}
    model = model.clone(primitives=dataclasses.replace(model.primitives, **formats))
    packed = sav.pack(model, variables)
    assert flat(packed)[("head", "blocks")].dtype == jnp.bfloat16
    early, late = (jax.jit(model.apply)(each, images()) for each in (packed, variables))
    np.testing.assert_array_equal(early, late)


def test_with_float_activations_packing_moves_nothing_and_warns_of_nothing():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sav.pack(*model_and_variables("float"))


def test_with_int8_activations_a_warning_says_how_many_weights_moved_and_how_far():
    model, variables = model_and_variables("int8", MIXED)
    weights = [powers(kernel) for kernel in shift_kernels(variables).values()]
    changed = sum(np.count_nonzero(octaves(weight) != weight) for weight in weights)
    total = sum(weight.size for weight in weights)
    worst = max(np.abs(octaves(weight) - weight).max() / np.abs(weight).max() for weight in weights)
    message = (
        f"{changed} of {total} weights ({changed / total:.2%}) moved to fit 4 bits, by at most {worst:.1e} "
        "of their layer's largest weight"
    )
    assert changed > 0
    with pytest.warns(UserWarning, match=re.escape(message)):
        sav.pack(model, variables)


def test_int8_weights_within_seven_octaves_move_nowhere():
    model, variables = model_and_variables("int8")
    near = jax.tree.map(lambda leaf: np.sign(leaf) * np.clip(np.abs(leaf), 0.1, 0.9), variables)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sav.pack(model, near)


def test_what_is_packed_is_not_packed_again():
    model, _ = model_and_variables("float")
    with pytest.raises(ValueError, match="packed already"):
        sav.pack(model, packed_variables("float"))


def test_weights_of_more_than_five_bits_are_an_error_that_names_the_layer():
    model, variables = model_and_variables("float")
    wide = model.clone(primitives=dataclasses.replace(model.primitives, weight_bits=6))
    with pytest.raises(ValueError, match=r"stage1/.* can't be packed: .* got 6 bits"):
        sav.pack(wide, variables)


@ACTIVATIONS
def test_none_runs_packed_variables_on_kernels_and_others_on_xla(activations):
    _, variables = model_and_variables(activations)
    function = jitted(activations, None)
    assert runs_a_kernel(function, packed_variables(activations))
    assert not runs_a_kernel(function, variables)


@pytest.fixture
def without_tvm(monkeypatch):
    monkeypatch.setattr(store, "is_installed", lambda: False)
    custom_call.unavailable.cache_clear()
    yield
    custom_call.unavailable.cache_clear()


@pytest.mark.usefixtures("without_tvm")
@ACTIVATIONS
def test_without_tvm_none_runs_packed_variables_on_xla(activations):
    model, _ = model_and_variables(activations)

    # A function of its own: jit knows the model's by what it was with TVM.
    def apply(variables, x):
        return model.apply(variables, x)

    functions = jax.jit(apply), jitted(activations, "xla")
    packed = packed_variables(activations)
    lowered, on_xla = (function.lower(packed, images()).as_text() for function in functions)
    assert lowered == on_xla


@pytest.mark.usefixtures("without_tvm")
def test_without_tvm_a_model_that_asks_for_it_says_what_to_install():
    with pytest.raises(ValueError, match=r"can't run on TVM here: TVM is not installed \(pip install"):
        jitted("float", "tvm").__wrapped__(packed_variables("float"), images())


def test_int8_activations_refuse_weights_packed_with_five_bits():
    with pytest.raises(ValueError, match="int8 activations need weights of 4 bits, these have 5; pack"):
        jitted("int8", "tvm").lower(packed_variables("float"), images())


@pytest.mark.parametrize("activations", ["float", "int8"])
@pytest.mark.parametrize(
    ("name", "layers"), [("pvt_v2_b0", 2 * 8), ("pvt_tiny", 2 * 8), ("deit_tiny", 2 * 12)]
)
def test_the_weights_of_every_shift_layer_take_a_sixth_of_their_bytes(name, layers, activations):
    model = sav.create_model(name, mlp="shift", activations=activations)
    before = flat(variable_shapes(model))
    after = flat(packed_shapes(model))
    packed = [path[:-1] for path in after if path[-1] == "codes"]
    assert len(packed) == layers
    for path in packed:
        kernel = before[(*path, "kernel")]
        codes, exponent = after[(*path, "codes")], after[(*path, "exponent")]
        assert (codes.dtype, exponent.dtype) == (np.uint8, np.int8)
        assert math.prod(codes.shape) + math.prod(exponent.shape) <= kernel.size * 4 / 6


def shapes_of(variables):
    return jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), variables)


@ACTIVATIONS
def test_the_shapes_of_packed_variables_are_known_without_packing_them(activations):
    model, _ = model_and_variables(activations, MIXED)
    assert shapes_of(packed_shapes(model)) == shapes_of(packed_variables(activations, MIXED))


def test_the_shapes_of_variables_packed_in_bfloat16_are_known_without_packing_them():
    model, variables = model_and_variables("float", MIXED)
    primitives = dataclasses.replace(model.primitives, precision="bfloat16")
    model = model.clone(primitives=primitives)
    assert shapes_of(packed_shapes(model)) == shapes_of(sav.pack(model, variables))


def test_the_shapes_of_variables_are_those_that_initializing_gives():
    model, _ = model_and_variables("int8", MIXED)
    initialized = jax.eval_shape(lambda: model.init(jax.random.key(0), images()))
    assert shapes_of(variable_shapes(model)) == shapes_of(initialized)


def mixed_formats(**settings):
    """A model with every number format, and its variables packed and not."""
    layers = {
        "stage1/block1/mlp/fc1": "shift_two_terms",
        "stage1/block1/mlp/fc2": "dense_int8",
        "stage2/block1/mlp/fc1": "moe",
        "stage3/block1/mlp/fc2": "shift",
    }
    model = sav.create_model("pvt_v2_nano", num_classes=10, layers=layers, weight_terms=2, **settings)
    variables = model_variables(model)
    return model, variables, sav.pack(model, variables)


@functools.cache
def model_variables(model):
    rng = np.random.default_rng(0)
    return jax.tree.map(
        lambda leaf: rng.normal(0, 0.1, leaf.shape).astype(np.float32), variable_shapes(model)
    )


def test_each_layer_is_packed_in_its_own_format():
    _, _, packed = mixed_formats()
    formats = {
        ("stage1", "block1", "mlp", "fc1"): {"codes": (np.int8, 64)},
        ("stage1", "block1", "mlp", "fc2"): {"blocks": (np.int8, 64)},
        ("stage2", "block1", "mlp", "fc1", "shift"): {"codes": (np.int8, 64)},
        ("stage2", "block1", "mlp", "fc1", "dense"): {"blocks": (np.float32, 16)},
        ("stage3", "block1", "mlp", "fc2"): {"codes": (np.uint8, 40)},
    }
    for path, weights in formats.items():
        for name, (dtype, size) in weights.items():
            leaf = flat(packed)[(*path, name)]
            assert (leaf.dtype, leaf.shape[-1]) == (dtype, size)


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_unpacking_gives_the_rounded_weights_of_each_format(precision):
    model, variables, packed = mixed_formats(precision=precision)
    before, after = flat(variables), flat(unpack(model, packed))
    two, whole = (("stage1", "block1", "mlp", name, "kernel") for name in ("fc1", "fc2"))
    np.testing.assert_array_equal(after[two], two_powers_of_two(before[two]))
    np.testing.assert_allclose(
        after[whole], before[whole], rtol=0, atol=0.504 / 127 * np.abs(before[whole]).max()
    )
    numbers = after[whole] / np.abs(after[whole]).max(axis=0) * 127
    np.testing.assert_allclose(numbers, np.round(numbers), rtol=0, atol=1e-4)


def test_the_shapes_of_mixed_formats_are_known_without_packing_them():
    model, _, packed = mixed_formats(precision="int8")
    assert shapes_of(packed_shapes(model)) == shapes_of(packed)


@pytest.mark.parametrize("implementation", ["xla", "tvm"])
@pytest.mark.parametrize("activations", ["float", "int8"])
def test_packed_mixed_formats_give_the_logits_of_those_that_were_packed(activations, implementation):
    model, variables, packed = mixed_formats(activations=activations, precision="int8")
    expected = np.asarray(jax.jit(on_xla(model).apply)(variables, images()))
    kernels = model.clone(primitives=dataclasses.replace(model.primitives, implementation=implementation))
    result = jax.jit(kernels.apply)(packed, images())
    # A number of int8 between two may be rounded to either after sums in another order.
    np.testing.assert_allclose(result, expected, rtol=0, atol=0.02 * np.abs(expected).max())


def test_two_terms_and_int8_take_less_than_a_third_of_float32():
    kinds = {"mlp": "shift", "projections": "shift"}
    model = sav.create_model("pvt_v2_nano", num_classes=10, weight_terms=2, precision="int8", **kinds)
    packed = sum(
        math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(packed_shapes(model))
    )
    assert packed < 0.3 * 4 * count_parameters(model)
