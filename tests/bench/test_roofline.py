"""A model's kernels beside their bounds, and the counts that these are made of."""

import json
import math

import pytest

import shiftaddvit_jax as sav
from kernels_tvm.descriptions import (
    BinarySoftmaxDescription,
    HammingLinearDescription,
    HeadDescription,
    LinearDescription,
    MlpDescription,
    PatchEmbedDescription,
    SoftmaxAttentionDescription,
)
from kernels_tvm.store import Kernel
from shiftaddvit_jax.bench import roofline
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.models import model_arguments

DENSE = LinearDescription("dense", 16, 48)
INT8 = LinearDescription("shift", 48, 16, 4, "int8")
MIXTURE = LinearDescription("moe", 16, 48, 4, "int8")
PROJ = LinearDescription("dense", 16, 16, precision="int8")
QKV = 10 * 16 * 48  # products of a layer from 16 to 48 channels, of 10 tokens


@pytest.mark.parametrize(
    ("name", "description", "batch", "expected"),
    [
        ("linear", DENSE, 10, {"float32": QKV}),
        ("linear", INT8, 10, {"int8": QKV}),
        ("linear", MIXTURE, 10, {"float32": QKV // 4, "int8": 3 * QKV // 4}),
        ("mlp", MlpDescription(DENSE, INT8, 1e-6, 10), 2, {"float32": 2 * QKV, "int8": 2 * QKV}),
        (
            "mlp",
            MlpDescription(DENSE, INT8, 1e-6, 10, (2, 5)),
            1,
            {"float32": QKV + 9 * 10 * 48, "int8": QKV},
        ),
        (
            "softmax_attention",
            SoftmaxAttentionDescription(DENSE, PROJ, 2, 10, 1e-6),
            1,
            {"float32": QKV + 2 * 10 * 10 * 16, "int8": 10 * 16 * 16},
        ),
        # Of 8 channels a head: a context and its product, and nine taps.
        (
            "hamming_linear",
            HammingLinearDescription(DENSE, PROJ, 2, 10, 1e-6, True),
            1,
            {"float32": QKV + 10 * 16 * (2 * 8 + 9), "int8": 10 * 16 * 16},
        ),
        (
            "binary_softmax",
            BinarySoftmaxDescription(DENSE, PROJ, 2, 10, 1e-6, True),
            1,
            {"float32": QKV + 10 * 10 * 16, "int8": 10 * 16 * 16},
        ),
        (
            "patch_embed",
            PatchEmbedDescription(LinearDescription("dense", 27, 16), 8, 12, 3, 3, 2, 1e-6),
            1,
            {"float32": 4 * 6 * 27 * 16},
        ),
        ("head", HeadDescription(DENSE, 10, 1e-6), 3, {"float32": 3 * 16 * 48}),
    ],
)
def test_products_equal_hand_counts(name, description, batch, expected):
    shapes = [((batch, 16), "float32")]
    counted = roofline.products(Kernel(name, description), shapes, shift_share=0.75)
    assert {number: count for number, count in counted.items() if count} == expected


@pytest.fixture
def measured(monkeypatch):
    """Every kernel takes 2 ms, a peak 1 ms, in int8 half of it, and the copy 1 ms."""

    def time_contestants(contestants, threads, rounds, seconds):
        times = {"int8 xla": 0.5, "int8 onnxruntime": 0.7}
        default = {"model_kernel": 2.0, "kernel": 1.0, "copy": 1.0}
        return [
            {"name": each.name, "median_ms": times.get(each.name, default[each.task["runtime"]])}
            for each in contestants
        ]

    monkeypatch.setattr(roofline, "time_contestants", time_contestants)


def test_a_bound_is_the_longer_of_products_and_bytes(measured):
    model = sav.create_model("deit_nano", mlp="shift", activations="int8", implementation="tvm")
    found = roofline.model_kernel_rows(model, batch=1, threads=1, rounds=1, shift_share=0.6)
    assert found["peaks"]["int8"] == pytest.approx(2 * found["peaks"]["float32"])
    assert found["peaks"]["float32"] == pytest.approx(2048**3 * 1e3)
    assert found["peaks"]["memory"] == pytest.approx(2 * roofline.COPIED_BYTES * 1e3)
    kernels = {row["name"].split(" ", 1)[1]: row for row in found["kernels"]}
    mlp = next(row for name, row in kernels.items() if name.startswith("mlp"))
    assert mlp["calls"] == model.depth
    compute = 1e3 * sum(count / found["peaks"][number] for number, count in mlp["products"].items())
    assert mlp["bound_ms"] == pytest.approx(max(compute, 1e3 * mlp["bytes"] / found["peaks"]["memory"]))
    assert mlp["of_bound"] == pytest.approx(mlp["bound_ms"] / 2.0)


def test_kernels_are_printed_with_their_bounds(measured, tmp_path, capsys):
    file = tmp_path / "kernels.json"
    command = ["bench", "pvt_v2_nano", "--kernels", "--activations", "int8", "--rounds", "1"]
    assert main([*command, "--json", str(file)]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 100
    names = [row["name"] for row in json.loads(file.read_text())["kernels"]]
    assert len(names) == 13
    assert all(word in table for name in names for word in name.split())


def test_a_kernel_runs_alone():
    model = sav.create_model("deit_nano", implementation="tvm")
    run = roofline.model_kernel(model_arguments(model), 1, 0)
    assert math.isfinite(float(run().sum()))
