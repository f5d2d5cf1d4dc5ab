import collections
import importlib.util
import sys
import warnings
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax.checkpoints.to_onnx import save
from shiftaddvit_jax.checkpoints.to_onnx.nodes import Node
from shiftaddvit_jax.checkpoints.to_onnx.trace import trace
from shiftaddvit_jax.checkpoints.to_onnx.translations import translate
from shiftaddvit_jax.models.variables import example_batch, variable_shapes
from shiftaddvit_jax.ops import quantize_activations, two_powers_of_two

onnx = pytest.importorskip("onnx")
onnxruntime = pytest.importorskip("onnxruntime")


def random_variables(model):
    """No bias is 0 and no scale is 1, so that one that is left out shows."""
    rng = np.random.default_rng(0)

    def draw(path, leaf):
        if leaf.dtype == jnp.int8:  # of a rotation
            return rng.choice(np.int8([-1, 1]), leaf.shape)
        return 0.1 * rng.standard_normal(leaf.shape, np.float32) + (path[-1].key == "scale")

    return jax.tree_util.tree_map_with_path(draw, variable_shapes(model))


def export(path, name, batch=None, packed=False, **arguments):
    model = sav.create_model(name, **{"num_classes": 10, "implementation": "xla"} | arguments)
    variables = random_variables(model)
    if packed:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # weights that moved to fit 4 bits
            variables = sav.pack(model, variables)
    sav.save_onnx(model, variables, path, batch=batch)
    return model, variables


def product_with(codes):
    """A file that multiplies 19 rows by a weight."""
    images = Node("Input", (), (19, 19), {"dtype": np.dtype("float32")})
    product = Node("MatMul", (images, codes), codes.shape)
    return save._serialize(onnx, {"images": images}, "logits", product, "weight")


def run_onnxruntime(path, images):
    return onnxruntime.InferenceSession(path).run(["logits"], {"images": images})[0]


def run_openvino(path, images):
    import openvino

    settings = {"INFERENCE_PRECISION_HINT": "f32"}
    return openvino.Core().compile_model(path, "CPU", settings)({"images": images})[0]


RUNTIMES = [run_onnxruntime, *([run_openvino] if importlib.util.find_spec("openvino") else [])]


def check_logits(path, model, variables, batch, atol=1e-4):
    size = model.image_size
    images = np.random.default_rng(1).standard_normal((batch or 2, 3, size, size), np.float32)
    expected = jax.jit(model.apply)(variables, images.transpose(0, 2, 3, 1))
    for run in RUNTIMES:
        np.testing.assert_allclose(run(path, images), expected, rtol=1e-4, atol=atol, err_msg=run.__name__)


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("pvt_v2_nano", {"attention": "msa", "batch": 3}),
        ("pvt_v2_nano", {"attention": "sra", "image_size": 50, "layer_norm_eps": 1e-3}),
        ("pvt_v2_nano", {"attention": "linear_sra", "image_size": 64}),
        ("pvt_tiny", {"attention": "sra", "image_size": 64}),
        ("deit_tiny_distilled", {"image_size": 32, "threshold": "tensor"}),  # which nothing uses
        ("deit_tiny_distilled", {"image_size": 32, "batch": 2}),
    ],
)
def test_dense_logits_are_those_of_jax(tmp_path, name, arguments):
    model, variables = export(tmp_path / "model.onnx", name, **arguments)
    (images,) = onnx.load(tmp_path / "model.onnx").graph.input
    size, batch = model.image_size, arguments.get("batch")
    sides = images.type.tensor_type.shape.dim
    assert [side.dim_param or side.dim_value for side in sides] == [batch or "batch", 3, size, size]
    check_logits(tmp_path / "model.onnx", model, variables, batch)


# A code or a whole number flips where a token lies within float noise of a border. No code does here; an int8
# number does, whose step is 1/127 of its token's largest.
@pytest.mark.parametrize(
    "arguments",
    [
        {
            "attention": ("hamming_linear", "hamming_ksh", "hamming_quadratic", "ecoformer"),
            "mlp": ("moe", "shift", "dense", "dense"),
            "projections": ("shift", "dense", "moe", "dense"),
            "image_size": 36,  # 9 x 9, 5 x 5, 3 x 3 and 2 x 2 tokens
        },
        {
            "attention": ("linear", "performer", "binary_softmax", "linear_sra"),
            "mlp": ("moe", "dense", "dense", "shift"),
            "threshold": "zero",
            "weight_bits": 8,
        },
        {
            "attention": "hamming_linear",
            "mlp": ("shift", "moe", "dense", "dense"),
            "threshold": "tensor",
            "activations": "int8",
            "batch": 2,
        },
        {"mlp": ("shift", "moe", "dense", "dense"), "activations": "fixed_point", "num_classes": 0},
        {"mlp": ("shift", "moe", "dense", "dense"), "weight_terms": 2},
        {
            "attention": ("hamming_linear", "hamming_quadratic", "binary_softmax", "msa"),
            "rotation": "hadamard_2x",
        },
    ],
    ids=["codes", "linear", "int8", "fixed_point", "two_terms", "rotated"],
)
def test_logits_of_shifts_and_additions_are_those_of_jax(tmp_path, arguments):
    model, variables = export(tmp_path / "model.onnx", "pvt_v2_nano", **arguments)
    atol = 1e-3 if model.primitives.activations == "int8" else 1e-4
    check_logits(tmp_path / "model.onnx", model, variables, arguments.get("batch"), atol)


@pytest.mark.parametrize("run", RUNTIMES)
@pytest.mark.parametrize("odd", [np.nan, np.inf])
@pytest.mark.parametrize("place", [0, 7, 18])
def test_int8_rows_that_are_not_finite_stay_so(tmp_path, place, odd, run):
    rows = np.random.default_rng(0).standard_normal((2, 19), np.float32)
    rows[0, place] = odd
    quantize = partial(quantize_activations, activations="int8")
    images = Node("Input", (), rows.shape, {"dtype": rows.dtype})
    output = translate(trace(quantize, jax.ShapeDtypeStruct(rows.shape, rows.dtype)), [images])
    onnx.save(save._serialize(onnx, {"images": images}, "logits", output, "rows"), tmp_path / "rows.onnx")
    found = run(tmp_path / "rows.onnx", rows)
    assert not np.isfinite(found[0]).any()
    np.testing.assert_allclose(found[1], rows[1], atol=np.abs(rows[1]).max() / 254)


def initializers(path):
    return {tensor.name: onnx.numpy_helper.to_array(tensor) for tensor in onnx.load(path).graph.initializer}


def test_shift_weights_are_codes_of_five_bits(tmp_path):
    export(tmp_path / "dense.onnx", "pvt_v2_nano", attention="linear")
    kinds = {"attention": "linear", "mlp": "shift", "projections": "shift"}
    _, variables = export(tmp_path / "shift.onnx", "pvt_v2_nano", **kinds)
    blocks = [variables["params"][f"stage{stage}"]["block1"] for stage in (1, 2, 3, 4)]
    weights = [
        layer["kernel"].size
        for block in blocks
        for layer in (block["attn"]["qkv"], block["attn"]["proj"], block["mlp"]["fc1"], block["mlp"]["fc2"])
    ]
    dense, shift = (initializers(tmp_path / name) for name in ("dense.onnx", "shift.onnx"))
    graph = onnx.load(tmp_path / "shift.onnx").graph
    tables = [shift[name] for name in {node.input[0] for node in graph.node if node.op_type == "Gather"}]
    for table in tables:
        np.testing.assert_array_equal(np.frexp(table[table != 0])[0], np.sign(table[table != 0]) / 2)
    floats = [sum(a.nbytes for a in arrays.values() if a.dtype == np.float32) for arrays in (dense, shift)]
    assert floats[0] - floats[1] == 4 * sum(weights) - sum(table.nbytes for table in tables)
    assert sum(array.nbytes for array in shift.values() if array.dtype == np.uint8) == sum(weights) * 5 / 8
    sizes = [(tmp_path / name).stat().st_size for name in ("dense.onnx", "shift.onnx")]
    assert sizes[1] < 0.55 * sizes[0]


@pytest.mark.parametrize("activations", ["float", "int8"])
def test_packing_changes_nothing_in_the_file(tmp_path, activations):
    files = [tmp_path / name for name in ("unpacked.onnx", "packed.onnx")]
    for packed, file in enumerate(files):
        kinds = {"attention": "hamming_linear", "mlp": ("moe", "dense", "dense", "dense")}
        export(file, "pvt_v2_nano", packed=bool(packed), activations=activations, **kinds)
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.parametrize("values", [1, 3, 16, 17, 32, 33, 255])
def test_codes_keep_a_weight_exactly(tmp_path, values):
    rng = np.random.default_rng(values)
    powers = np.ldexp(np.float32(1), -np.arange(126))
    table = np.concatenate([[np.float32(0)], powers, -powers, [np.float32(2), np.float32(-2)]])[:values]
    weight = rng.permutation(np.resize(table, 19 * 27)).reshape(19, 27)
    codes = Node("Codes", (), weight.shape, value=weight)
    made = product_with(codes)
    stored = [tensor for tensor in made.graph.initializer if list(tensor.dims) != [values]]
    assert all(np.prod(tensor.dims) <= 8 or tensor.data_type == onnx.TensorProto.UINT8 for tensor in stored)
    onnx.save(made, tmp_path / "weight.onnx")
    found = run_onnxruntime(tmp_path / "weight.onnx", np.eye(19, dtype=np.float32))
    np.testing.assert_array_equal(found, weight)


@pytest.mark.parametrize("batch", [None, 3])
@pytest.mark.parametrize(
    "arguments", [{}, {"attention": "hamming_linear", "mlp": "moe", "projections": "shift"}]
)
def test_colours_of_rays_are_those_of_jax(tmp_path, arguments, batch):
    model = sav.create_model("gnt_nano", implementation="xla", **arguments)
    variables, rng = random_variables(model), np.random.default_rng(0)
    samples = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32), example_batch(model, 3)
    )
    samples = samples._replace(visible=samples.visible > 0)
    sav.save_onnx(model, variables, tmp_path / "model.onnx", batch=batch)
    session = onnxruntime.InferenceSession(tmp_path / "model.onnx")
    (found,) = session.run(["colours"], samples._asdict())
    expected = jax.jit(partial(model.apply, method="render"))(variables, samples)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_a_softmax_over_views_is_one_operator(tmp_path):
    sav.save_onnx(model := sav.create_model("gnt_nano"), random_variables(model), tmp_path / "model.onnx")
    kinds = collections.Counter(node.op_type for node in onnx.load(tmp_path / "model.onnx").graph.node)
    assert kinds["Softmax"] == 4  # two over views, two along rays
    assert not kinds["Exp"]


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


def test_numbers_of_two_powers_with_many_scales_are_kept_exactly(tmp_path):
    rng = np.random.default_rng(0)
    weight = np.asarray(
        two_powers_of_two((rng.normal(size=(19, 27)) * 2.0 ** -np.arange(27)).astype(np.float32))
    )
    assert len(np.unique(weight)) > 256
    onnx.save(product_with(Node("Codes", (), weight.shape, value=weight)), tmp_path / "weight.onnx")
    found = run_onnxruntime(tmp_path / "weight.onnx", np.eye(19, dtype=np.float32))
    np.testing.assert_array_equal(found, weight)


@pytest.mark.parametrize(
    "arguments",
    [
        {"precision": "bfloat16"},
        {"dtype": jnp.bfloat16},
        {"precision": "int8"},
        {"layers": {"stage1/block1/mlp/fc1": "dense_int8"}},
    ],
    ids=str,
)
def test_other_dtypes_are_refused(tmp_path, arguments):
    with pytest.raises(ValueError, match=r"computes in float32.*without dtype and precision"):
        export(tmp_path / "model.onnx", "pvt_v2_nano", **arguments)
    assert not (tmp_path / "model.onnx").exists()


@pytest.mark.parametrize(
    ("function", "needs"),
    [
        (jnp.sin, "needs sin"),
        (lambda x: x[::2], r"needs a slice with strides \(2, 1\)"),
        (lambda x: jax.lax.round(x), "needs rounding away from zero"),
        (lambda x: jax.lax.top_k(x, 2)[0], "needs more than the place of the largest number"),
    ],
)
def test_an_operation_that_is_not_translated_is_named(function, needs):
    graph = trace(function, jax.ShapeDtypeStruct((4, 8), jnp.float32))
    with pytest.raises(ValueError, match=f"{needs}, which is not translated to ONNX"):
        translate(graph, [Node("Input", (), (4, 8))])


def test_any_number_of_images_is_refused_where_they_influence_each_other(tmp_path):
    with pytest.raises(ValueError, match="mean over all images of a batch; say how many: batch=1"):
        export(tmp_path / "model.onnx", "pvt_v2_nano", attention="hamming_linear", threshold="tensor")


def test_without_onnx_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(ValueError, match=r"pip install 'shiftaddvit-jax\[peers\]'"):
        export(tmp_path / "model.onnx", "pvt_v2_nano")


def test_a_path_that_cannot_be_written_is_refused(tmp_path):
    with pytest.raises(ValueError, match="cannot be written"):
        export(tmp_path / "none" / "model.onnx", "pvt_v2_nano")
