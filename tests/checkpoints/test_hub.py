"""Folders for the Hub, read by transformers and by us; uploads and downloads against a small Hub of ours."""

import base64
import json
import os
import subprocess
import sys
import threading
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import ClassVar

import jax
import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from sklearn.datasets import load_sample_images

import shiftaddvit_jax as sav
from shiftaddvit_jax.checkpoints import Source, open_source, save_pretrained
from shiftaddvit_jax.models import Preprocessing

NAMES = ("cat", "dog", "bird")


pytestmark = pytest.mark.usefixtures("classifiers_on_xla")


def made(name, preprocessing, **settings):
    model = sav.create_model(name, num_classes=3, image_size=preprocessing.size, **settings)
    variables = sav.init_variables(model, jax.random.key(0))
    return Source(name, model, variables, preprocessing, NAMES, about={"top1": 0.5})


DENSE = {
    "pvt_v2_nano": lambda: made(
        "pvt_v2_nano", Preprocessing(32, 40, crop_rounding="down"), attention="sra", layer_norm_eps=1e-6
    ),
    "deit_tiny": lambda: made("deit_tiny", Preprocessing(32, 32, "exact", "bilinear", "down")),
}


@pytest.mark.parametrize("name", DENSE)
def test_a_dense_model_loads_in_transformers_with_its_pixels_and_classes(name, tmp_path):
    source = DENSE[name]()
    save_pretrained(source, tmp_path / "model")
    original = transformers.AutoModelForImageClassification.from_pretrained(tmp_path / "model").eval()
    config = json.loads((tmp_path / "model" / "preprocessor_config.json").read_text())
    kind = config.pop("image_processor_type")
    processor = {
        "ViTImageProcessor": transformers.models.vit.image_processing_pil_vit.ViTImageProcessorPil,
        "CLIPImageProcessor": transformers.models.clip.image_processing_pil_clip.CLIPImageProcessorPil,
    }[kind](**config)
    image = Image.fromarray(load_sample_images().images[0])
    with torch.no_grad():
        expected = original(processor(image, return_tensors="pt")["pixel_values"]).logits.numpy()
    classifier = sav.Classifier(source)
    np.testing.assert_allclose(classifier.logits(classifier.preprocess(image)[None]), expected, atol=1e-4)
    assert tuple(original.config.id2label.values()) == NAMES


@pytest.mark.parametrize(
    "source",
    [
        *DENSE.values(),
        lambda: made("pvt_v2_nano", Preprocessing(32, 40), attention="hamming_linear", mlp="shift"),
        lambda: made("pvt_v2_nano", Preprocessing(32, 40, channels="bgr"), attention="sra"),
    ],
)
def test_what_was_saved_comes_back(source, tmp_path):
    source = source()
    sav.Classifier(source).save_pretrained(tmp_path / "model")
    opened = open_source(tmp_path / "model")
    assert (opened.class_names, opened.preprocessing) == (NAMES, source.preprocessing)
    inputs = np.random.default_rng(0).normal(size=(2, 32, 32, 3)).astype(np.float32)
    found, expected = (jax.jit(one.model.apply)(one.variables, inputs) for one in (opened, source))
    np.testing.assert_allclose(found, expected, atol=1e-5)
    card = (tmp_path / "model" / "README.md").read_text()
    assert "cat, dog, bird" in card
    assert "50.00%" in card


def test_a_model_card_of_ones_own_is_kept(tmp_path):
    source = DENSE["pvt_v2_nano"]()
    save_pretrained(source, tmp_path / "model")
    (tmp_path / "model" / "README.md").write_text("mine")
    save_pretrained(source, tmp_path / "model")
    assert (tmp_path / "model" / "README.md").read_text() == "mine"


def test_a_folder_of_other_files_is_kept(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match=r"has other files, such as notes\.txt"):
        save_pretrained(DENSE["pvt_v2_nano"](), tmp_path)


class Hub(BaseHTTPRequestHandler):
    """What the Hub answers to an upload and a download of small files."""

    files: ClassVar[dict[str, bytes]] = {}
    COMMIT = "0" * 40

    def log_message(self, *arguments):
        pass

    def answer(self, value, status=200, **headers):
        body = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(text))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        if self.path == "/api/repos/create":
            self.answer({"url": f"http://{self.headers['Host']}/me/model", "name": "me/model"})
        elif "/preupload/" in self.path:
            listed = json.loads(body)["files"]
            self.answer(
                {
                    "files": [
                        {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                        for file in listed
                    ]
                }
            )
        elif "/commit/" in self.path:
            for line in body.splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            url = f"http://{self.headers['Host']}/me/model/commit/{self.COMMIT}"
            self.answer({"success": True, "commitOid": self.COMMIT, "commitUrl": url, "hookOutput": ""})
        else:
            self.answer({})

    def do_GET(self):
        if "/resolve/" not in self.path:
            self.answer({"id": "me/model", "sha": self.COMMIT, "siblings": []})
            return
        content = self.files.get(self.path.split("?")[0].split("/", 5)[-1])
        facts = {"X_Repo_Commit": self.COMMIT}
        if content is None:
            self.answer({"error": "Entry not found"}, 404, X_Error_Code="EntryNotFound", **facts)
        else:
            self.answer(content, ETag=f'"{sha256(content).hexdigest()}"', **facts)

    do_HEAD = do_GET


@pytest.fixture
def hub():
    Hub.files = {}
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


def run(script, folder, **environment):
    """A process with a home of its own; its exit code, and what it printed."""
    found = subprocess.run(
        [sys.executable, "-c", script, str(folder)],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(folder / "home"), "HF_TOKEN": "hf_stub", **environment},
        timeout=300,
    )
    return found.stdout + found.stderr


PUSH = """
import sys
import shiftaddvit_jax as sav
print(sav.from_pretrained(sys.argv[1] + "/model").push_to_hub("me/model"))
"""
PULL = """
import sys
import shiftaddvit_jax as sav
source = sav.open_source("hf:me/model")
print(source.class_names, source.model.mlp[0], source.preprocessing.resize_to)
"""


def test_a_model_goes_to_the_hub_and_comes_back_also_without_a_connection(hub, tmp_path):
    source = made("pvt_v2_nano", Preprocessing(32, 40), attention="msa", mlp="shift")
    about = {"class_names": NAMES, "preprocessing": sav.checkpoints.describe_source(source)["preprocessing"]}
    sav.save_model(tmp_path / "model", source.model, source.variables, about)
    printed = run(PUSH, tmp_path, HF_ENDPOINT=hub)
    assert f"{hub}/me/model/commit/" in printed
    assert set(Hub.files) == {"README.md", "config.json", "model.safetensors", "preprocessor_config.json"}
    expected = "('cat', 'dog', 'bird') shift 40"
    assert expected in run(PULL, tmp_path, HF_ENDPOINT=hub)
    assert expected in run(PULL, tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    refused = run(PUSH, tmp_path, HF_ENDPOINT=hub, HF_HUB_OFFLINE="1")
    assert "ValueError: me/model can't be uploaded: " in refused.splitlines()[-1]
