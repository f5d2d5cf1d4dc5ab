"""The canonical packed format, decoded by a reader of its own that follows the format's description."""

import json
import warnings

import jax
import numpy as np
import pytest
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.numpy import load_file, save_file

import shiftaddvit_jax as sav
from shiftaddvit_jax.checkpoints.canonical import read_canonical, write_canonical
from shiftaddvit_jax.pack import unpack

FORMATS = [("float", "float32", 1), ("int8", "bfloat16", 1), ("float", "int8", 2)]


@pytest.fixture(scope="module", params=FORMATS, ids=str)
def model_and_packed(request):
    activations, precision, terms = request.param
    kinds = {"attention": "hamming_linear", "mlp": "moe", "projections": "shift"}
    formats = {"activations": activations, "precision": precision, "weight_terms": terms}
    model = sav.create_model("pvt_v2_nano", num_classes=5, **kinds, **formats)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model, sav.pack(model, sav.init_variables(model, jax.random.key(0)))


@pytest.fixture
def file(model_and_packed, tmp_path):
    write_canonical(tmp_path / "model.safetensors", *model_and_packed)
    return tmp_path / "model.safetensors"


def assert_same(found, expected):
    found, expected = flatten_dict(found), flatten_dict(expected)
    assert set(found) == set(expected)
    for name, leaf in expected.items():
        assert found[name].dtype == leaf.dtype
        np.testing.assert_array_equal(np.asarray(found[name]), np.asarray(leaf))


def test_packed_variables_come_back_bit_for_bit(model_and_packed, file):
    assert_same(read_canonical(file), model_and_packed[1])


def test_unpacked_variables_are_packed_on_the_way(model_and_packed, tmp_path):
    model, packed = model_and_packed
    write_canonical(tmp_path / "other.safetensors", model, unpack(model, packed))
    assert_same(read_canonical(tmp_path / "other.safetensors"), packed)


def test_the_file_holds_powers_of_two_as_the_format_says(model_and_packed, file):
    model, packed = model_and_packed
    weights = flatten_dict(unpack(model, packed), sep="/")
    arrays = load_file(file)
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata()
    terms = model.primitives.weight_terms
    assert (metadata["format"], metadata["version"]) == ("shiftaddvit", str(terms))
    shapes = json.loads(metadata["shapes"])
    assert len(shapes) == 16
    for layer, (inputs, outputs) in shapes.items():
        halves = arrays[f"{layer}/codes"]
        if terms == 2:
            decoded = halves * 2.0 ** arrays[f"{layer}/exponents"]
            np.testing.assert_array_equal(decoded, weights[f"{layer}/kernel"])
            continue
        codes = [halves[i // 2] >> 4 * (i % 2) & 15 for i in range(inputs * outputs)]
        if f"{layer}/signs" in arrays:
            signs = [arrays[f"{layer}/signs"][i // 8] >> i % 8 & 1 for i in range(inputs * outputs)]
        else:
            codes, signs = [code & 7 for code in codes], [code >> 3 for code in codes]
        exponents = arrays[f"{layer}/exponents"]
        decoded = [
            0.0 if code == 0 else (-1.0) ** int(sign) * 2.0 ** (int(code) - 1 + int(exponents[i % outputs]))
            for i, (code, sign) in enumerate(zip(codes, signs, strict=True))
        ]
        np.testing.assert_array_equal(np.reshape(decoded, (inputs, outputs)), weights[f"{layer}/kernel"])


def test_dense_weights_are_as_flax_has_them(model_and_packed, file):
    model, packed = model_and_packed
    arrays = load_file(file)
    assert arrays["params/head/kernel"].shape == (96, 5)
    scale = arrays.get("params/head/scale", np.float32(1))
    np.testing.assert_array_equal(
        np.asarray(arrays["params/head/kernel"], np.float32) * scale,
        unpack(model, packed)["params"]["head"]["kernel"],
    )


def rewritten(file, metadata=None, remove=()):
    arrays = load_file(file)
    with safe_open(file, "numpy") as opened:
        metadata = opened.metadata() | (metadata or {})
    save_file({name: array for name, array in arrays.items() if name not in remove}, file, metadata)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.write_bytes(file.read_bytes()[:-1]), "is not a whole safetensors file"),
        (lambda file: file.write_bytes(b""), "is not a whole safetensors file"),
        (lambda file: rewritten(file, {"version": "3"}), "version '3' of the format, and .* up to 2; update"),
        (lambda file: rewritten(file, {"format": "pt"}), "its format is 'pt'"),
        (lambda file: rewritten(file, {"shapes": "{"}), "does not hold what its metadata say"),
        (
            lambda file: rewritten(file, remove=["params/stage1/block1/mlp/fc1/shift/codes"]),
            "does not hold what its metadata say",
        ),
    ],
)
def test_another_file_is_refused_in_one_line(file, damage, message):
    damage(file)
    with pytest.raises(ValueError, match=message) as error:
        read_canonical(file)
    assert "\n" not in str(error.value)
