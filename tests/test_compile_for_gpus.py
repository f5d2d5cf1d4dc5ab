import hashlib
import json
import shutil

import pytest

from shiftaddvit_jax.cli import main
from shiftaddvit_jax.compile import kernels_of
from shiftaddvit_jax.models import create_model


def test_a_model_has_other_kernels_on_a_gpu():
    model = create_model("pvt_v2_nano", attention="hamming_linear", mlp="moe", implementation="tvm")
    names = {kernel.name for kernel in kernels_of(model, for_gpu=True)}
    assert names == {"binarize", "matadd", "depthwise_conv", "linear"}
    assert "mlp" in {kernel.name for kernel in kernels_of(model)}


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on the PATH (CUDA toolkit 13)")
def test_a_models_libraries_are_those_of_the_manifest(tmp_path, capsys):
    command = ["compile", "pvt_v2_nano", "--attention", "msa", "--mlp", "dense", "--target", "cuda-sm_75"]
    assert main([*command, "--output", str(tmp_path / "libraries")]) == 0
    assert "kernels for cuda-sm_75" in capsys.readouterr().out
    manifest = json.loads((tmp_path / "libraries" / "manifest.json").read_text())
    assert manifest["target"] == "cuda-sm_75"
    assert "apache-tvm" in manifest["versions"]
    files = {path.name for path in (tmp_path / "libraries").glob("*.so")}
    assert files == {entry["file"] for entry in manifest["kernels"]}
    for entry in manifest["kernels"]:
        content = (tmp_path / "libraries" / entry["file"]).read_bytes()
        assert hashlib.sha256(content).hexdigest() == entry["sha256"]
        assert b"\x7fELF" in content[4:]  # the cubin
        assert all(launch["spills"] == 0 for launch in entry["launches"].values())


def test_an_unknown_target_is_answered_with_the_list(capsys):
    assert main(["compile", "pvt_v2_nano", "--target", "cuda-sm_99", "--output", "x"]) == 2
    assert "choose among cuda-sm_75, cuda-sm_80, cuda-sm_86" in capsys.readouterr().err


def test_a_target_needs_a_folder(capsys):
    assert main(["compile", "pvt_v2_nano", "--target", "cuda-sm_86"]) == 2
    assert "--target and --output come together" in capsys.readouterr().err
