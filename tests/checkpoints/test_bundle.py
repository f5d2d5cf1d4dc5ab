"""Bundles: written here, opened where there is no compiler, refused when they are not what was written."""

import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

import shiftaddvit_jax as sav
from kernels_tvm.cpu.targets import host_target
from shiftaddvit_jax.checkpoints import describe_source, export_bundle, open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)

# What a machine has that has neither TVM's compiler, nor torch, nor Orbax.
LEAN = """
import sys
import numpy as np
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("tvm", "torch", "orbax"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
sys.meta_path.insert(0, Absent())
import importlib.util
found = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name.split(".")[0] == "tvm" else found(name, *rest)
import shiftaddvit_jax as sav
from kernels_tvm.cpu import library
classifier = sav.from_pretrained(sys.argv[1])
pixels = np.load(sys.argv[2])
logits = classifier.logits(np.stack([classifier.preprocess(pixels)] * 3))
np.save(sys.argv[3], logits)
print(library.is_provided(), classifier.source.program is not None, *classifier.source.notes, sep="|")
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint") / "model"
    model = sav.create_model("pvt_v2_nano", num_classes=3, attention="hamming_linear", mlp="shift")
    about = {"class_names": ["cat", "dog", "bird"], "top1": 0.75}
    sav.save_model(folder, model, sav.init_variables(model, jax.random.key(0)), about)
    return open_source(folder)


@pytest.fixture(scope="module")
def bundle(source, tmp_path_factory):
    """Without kernels."""
    folder = tmp_path_factory.mktemp("bundle") / "bundle"
    export_bundle(folder, source.model, source.variables, describe_source(source), stablehlo=True)
    return folder


@pytest.fixture
def copied(bundle, tmp_path):
    return shutil.copytree(bundle, tmp_path / "copied")


def logits_of(source):
    inputs = np.stack([sav.Classifier(source).preprocess(PIXELS)] * 3)
    return np.asarray(jax.jit(source.model.apply)(source.variables, inputs))


def run_lean(bundle, folder, **environment):
    """What such a process prints, and the logits that it computes."""
    np.save(folder / "pixels.npy", PIXELS)
    script = [sys.executable, "-c", LEAN, bundle, folder / "pixels.npy", folder / "logits.npy"]

    run = subprocess.run(
        list(map(str, script)),
        capture_output=True,
        text=True,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache"), **environment},
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    return run.stdout.strip(), np.load(folder / "logits.npy")


def test_a_bundle_holds_the_model_and_what_is_known_of_it(source, bundle):
    opened = open_source(bundle)
    assert opened.model == source.model
    assert opened.class_names == ("cat", "dog", "bird")
    assert opened.preprocessing == source.preprocessing
    assert opened.about["top1"] == 0.75
    found = sav.Classifier(opened).logits(np.stack([sav.Classifier(source).preprocess(PIXELS)] * 3))
    np.testing.assert_allclose(found, logits_of(source), atol=1e-5)


def test_a_bundle_answers_without_compiler_torch_and_orbax(source, bundle, tmp_path):
    printed, logits = run_lean(bundle, tmp_path)
    assert printed == "False|True"
    np.testing.assert_allclose(logits, logits_of(source), atol=1e-5)


@pytest.mark.slow
@pytest.mark.skipif(host_target() is None, reason="no kernel runs on this machine")
def test_a_bundles_kernels_answer_where_there_is_no_compiler(source, tmp_path):
    target = host_target().name
    folder = tmp_path / "bundle"
    command = [sys.executable, "-m", "shiftaddvit_jax", "export", source.name, "--output", folder]
    subprocess.run([*command, "--kernels", target, "--threads", "2", "--stablehlo", "--onnx"], check=True)
    made = json.loads((folder / "manifest.json").read_text())
    assert "model.onnx" in made["files"]
    assert set(made["program"]["calls"]) == set(made["kernels"]["targets"][target])
    for environment, expected in (
        ({}, "True|True"),
        ({"TVM_NUM_THREADS": "3"}, "False|False|the bundle's kernels are not used: they are for 2 threads"),
    ):
        printed, logits = run_lean(folder, tmp_path, **environment)
        assert printed.startswith(expected)
        np.testing.assert_allclose(logits, logits_of(source), atol=1e-5)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["kernels"]["made_by"]["source"] = "another"
    (folder / "manifest.json").write_text(json.dumps(manifest))
    printed, logits = run_lean(folder, tmp_path)
    assert printed == "False|False|the bundle's kernels are not used: other versions made them"
    np.testing.assert_allclose(logits, logits_of(source), atol=1e-5)


def edited(folder, **fields):
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps(manifest | fields))


def flipped(file):
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda folder: flipped(folder / "model.safetensors"), r"model\.safetensors is damaged"),
        (lambda folder: flipped(folder / "config.json"), r"config\.json is damaged"),
        (lambda folder: flipped(folder / "program.stablehlo"), r"program\.stablehlo is damaged"),
        (lambda folder: (folder / "model.safetensors").unlink(), r"model\.safetensors is missing"),
        (lambda folder: (folder / "manifest.json").write_text('{"format"'), "is not whole"),
        (
            lambda folder: edited(folder, version=2),
            "is of version 2 of the format, and .* reads up to 1; update",
        ),
        (lambda folder: edited(folder, version="1"), "is of version 1 of the format"),
        (lambda folder: edited(folder, format="other"), "is not a bundle of this project"),
        (lambda folder: edited(folder, files={}), "is not whole"),
        (
            lambda folder: edited(folder, files={"config.json": "", "model.safetensors": "", "../x": ""}),
            "damaged|outside",
        ),
    ],
)
def test_what_is_not_what_was_written_is_refused_in_one_line(copied, damage, message):
    damage(copied)
    with pytest.raises(ValueError, match=message) as error:
        open_source(copied)
    assert "\n" not in str(error.value)


def test_another_folders_manifest_is_none_of_a_bundle(tmp_path):
    (tmp_path / "manifest.json").write_text('{"name": "a web page"}')
    with pytest.raises(ValueError, match=r"has neither model\.safetensors nor"):
        open_source(tmp_path)


def test_weights_of_another_model_are_refused_by_name(source, bundle, tmp_path):
    """Without a manifest, as on the Hub."""
    for name in ("config.json", "model.safetensors"):
        shutil.copy(bundle / name, tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["model"]["num_classes"] = 4
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=r"does not hold what config\.json describes: params/head/bias"):
        open_source(tmp_path)


def test_a_file_outside_of_the_bundle_is_refused(copied):
    manifest = json.loads((copied / "manifest.json").read_text())
    edited(copied, files={"../x": "0", **manifest["files"]})
    with pytest.raises(ValueError, match="which is outside of it"):
        open_source(copied)


def test_an_existing_folder_of_something_else_is_kept(source, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists and is not a bundle"):
        export_bundle(tmp_path, source.model, source.variables, describe_source(source))
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_an_unknown_target_is_refused_by_name(source, tmp_path):
    with pytest.raises(ValueError, match=r"unknown target 'avx3'; choose among .*avx2"):
        export_bundle(tmp_path / "x", source.model, source.variables, {}, targets=["avx3"])


def test_one_bit_of_a_checkpoint_is_noticed(source, tmp_path):
    folder = tmp_path / "model"
    sav.save_model(folder, source.model, source.variables)
    largest = max((folder / "variables").rglob("*"), key=lambda file: file.stat().st_size)
    content = bytearray(largest.read_bytes())
    for position in np.random.default_rng(0).integers(0, len(content), 20):
        changed = content.copy()
        changed[position] ^= 1 << position % 8
        largest.write_bytes(changed)
        with pytest.raises(ValueError, match=f"{largest.name} is damaged: its digest"):
            sav.load_model(folder)
    largest.write_bytes(content)
    sav.load_model(folder)
