import collections
import sys

import jax
import numpy as np
import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax.models.variables import variable_shapes

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def random_variables(model):
    """No bias is 0 and no scale is 1, so that one that is left out shows."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        return 0.1 * rng.standard_normal(leaf.shape, np.float32) + (path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(model))


def export(path, name, batch=1, **arguments):
    model = sav.create_model(name, num_classes=10, **arguments)
    variables = random_variables(model)
    sav.save_onnx(model, variables, path, batch=batch)
    return model, variables


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pvt_v2_nano", {"attention": "msa", "batch": 3}),
        ("pvt_v2_nano", {"attention": "sra", "image_size": 50, "layer_norm_eps": 1e-3}),
        ("pvt_v2_nano", {"attention": "linear_sra", "image_size": 64}),
        ("pvt_tiny", {"attention": "sra", "image_size": 64}),
        ("deit_tiny_distilled", {"image_size": 32, "batch": 2}),
    ],
)
def test_logits_are_those_of_jax(tmp_path, name, arguments):
    model, variables = export(tmp_path / "model.onnx", name, **arguments)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (images,) = session.get_inputs()
    size = model.image_size
    assert images.shape == [arguments.get("batch", 1), 3, size, size]
    values = np.random.default_rng(1).standard_normal(images.shape, np.float32)
    (found,) = session.run(["logits"], {"images": values})
    expected = jax.jit(model.apply)(variables, values.transpose(0, 2, 3, 1))
    np.testing.assert_allclose(found, expected, atol=1e-4, rtol=1e-4)


def test_the_graph_has_the_operators_that_runtimes_fuse(tmp_path):
    export(tmp_path / "model.onnx", "pvt_v2_nano", attention="sra")
    graph = onnx.load(tmp_path / "model.onnx").graph
    operators = collections.Counter(node.op_type for node in graph.node)
    # A block has q, k, v, the output, two layers of the MLP and two products; the head is one more.
    blocks, reductions = 4, 3
    assert operators["MatMul"] == 8 * blocks + 1
    assert operators["Gelu"] == operators["Softmax"] == blocks
    assert operators["LayerNormalization"] == 4 * blocks + reductions
    assert set(operators) == {
        *("Add", "Conv", "Div", "Gelu", "LayerNormalization", "MatMul", "Mul", "ReduceSum", "Reshape"),
        *("Softmax", "Transpose"),
    }
    convolutions = [node for node in graph.node if node.op_type == "Conv"]
    assert all(len(node.input) == 3 for node in convolutions)  # with their biases
    groups = [
        attribute.i for node in convolutions for attribute in node.attribute if attribute.name == "group"
    ]
    assert sorted(groups) == [1] * (4 + reductions) + [128, 192, 256, 384]


@pytest.mark.parametrize(("attention", "mlp"), [("hamming_linear", "dense"), ("msa", "moe")])
def test_other_models_are_refused(tmp_path, attention, mlp):
    with pytest.raises(ValueError, match="not translated to ONNX; only dense models with softmax"):
        export(tmp_path / "model.onnx", "pvt_v2_nano", attention=attention, mlp=mlp)
    assert not (tmp_path / "model.onnx").exists()


def test_without_onnx_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"pip install 'shiftaddvit-jax\[peers\]'"):
        export(tmp_path / "model.onnx", "pvt_v2_nano")


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be written"):
        export(tmp_path / "none" / "model.onnx", "pvt_v2_nano")
