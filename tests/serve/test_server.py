"""The command and its process: what is said at the start, and how it ends."""

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import jax
import pytest
from conftest import NAMES, image_bytes
from starlette.testclient import TestClient

import shiftaddvit_jax as sav
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.cli.serve import name_of
from shiftaddvit_jax.serve import server

# A server whose model takes half a second a batch; it prints where it answers.
PROGRAM = """
import time, numpy as np
from types import SimpleNamespace
from shiftaddvit_jax.classifier import Classifier
from shiftaddvit_jax.models import Preprocessing
from shiftaddvit_jax.serve import server
from shiftaddvit_jax.serve.app import create_app
from shiftaddvit_jax.serve.service import Settings

model = SimpleNamespace(num_classes=2, mlp=(), projections=())
pixels = Preprocessing(32, 32)
source = SimpleNamespace(model=model, variables={}, preprocessing=pixels, class_names=("a", "b"))

class Slow(Classifier):
    def logits(self, inputs):
        time.sleep(0.5)
        return np.stack([inputs.mean((1, 2, 3)), np.zeros(len(inputs))], axis=1, dtype=np.float32)

with server.bind("127.0.0.1", 0) as listener:
    app = create_app(Slow(source, 1), Settings("slow", max_batch=1))
    server.run(app, listener, 20, server.address(listener))
print("ended", flush=True)
"""


def fails(capsys, *arguments):
    """The one line on standard error of a command that must fail."""
    try:
        code = main(["serve", *map(str, arguments)])
    except SystemExit as stop:
        code = stop.code
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert code == 2
    return error


@pytest.fixture
def process():
    environment = os.environ | {"PYTHONPATH": str(Path(sav.__file__).parents[1])}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-c", PROGRAM], env=environment, **pipes)
    yield process
    process.kill()
    process.communicate()


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_server_once_it_has_answered(process, sent):
    url = process.stdout.readline().strip()
    answers = []

    def send():
        content = {"content": image_bytes(), "headers": {"content-type": "image/png"}}
        answers.append(httpx.post(f"{url}/predict", timeout=30, **content).status_code)

    threads = [threading.Thread(target=send) for _ in range(4)]
    for thread in threads:
        thread.start()
    while "held_images 4" not in httpx.get(f"{url}/metrics").text:
        time.sleep(0.01)
    process.send_signal(sent)
    time.sleep(0.5)  # of the two seconds that the four take
    with pytest.raises(httpx.ConnectError):
        httpx.get(f"{url}/healthz")
    assert process.poll() is None
    for thread in threads:
        thread.join()
    assert answers == [200] * 4
    said, errors = process.communicate(timeout=10)
    assert (process.returncode, said, errors) == (0, "ended\n", "")


def test_the_command_serves_a_checkpoint(tmp_path, capsys, monkeypatch, classifiers_on_xla):
    model = sav.create_model("pvt_v2_nano", num_classes=10, attention="linear")
    folder = tmp_path / "nano" / "model"
    sav.save_model(folder, model, sav.init_variables(model, jax.random.key(0)), {"class_names": NAMES})
    answers = []

    def run(app, listener, seconds, said):
        with TestClient(app) as client:
            answers.append(client.post("/predict", files={"image": image_bytes()}).json())
        print(said)

    monkeypatch.setattr(server, "run", run)
    assert main(["serve", str(folder), "--port", "0", "--host", "0.0.0.0", "--max-batch", "1"]) == 0
    warning, said = capsys.readouterr().out.splitlines()
    assert "without TLS or authentication" in warning
    assert re.fullmatch(r"nano answers at http://0\.0\.0\.0:\d+ \(Ctrl-C ends it\)", said)
    (answer,) = answers
    assert answer["model"] == "nano"
    assert len(answer["results"][0]["classes"]) == 5


def test_a_port_in_use_is_refused(capsys):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        error = fails(capsys, "runs/none", "--port", port)
    assert f"127.0.0.1, port {port}, can't be listened on: Address already in use" in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: SOURCE"),
        (["a", "--port", "http"], "invalid int value: 'http'"),
        (["a", "--port", "99999"], "port must be from 0 to 65535, got 99999"),
        (["a", "--host", "256.0.0.1"], "256.0.0.1, port 8000, can't be listened on"),
        (["a", "--max-batch", "0"], "max_batch must be at least 1, got 0"),
        (["a", "--workers", "2"], "unknown option '--workers'"),
        (["there/is/none", "--port", "0"], "there/is/none"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message, capsys):
    assert message in fails(capsys, *arguments)


def test_a_missing_extra_is_named(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert "serving needs uvicorn: pip install 'shiftaddvit-jax[serve]'" in fails(capsys, "a")


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("runs/demo/moe/model", "moe"),
        ("hf:ORG/pvt_v2_b0", "pvt_v2_b0"),
        ("timm:deit_tiny", "deit_tiny"),
        ("./a b/", "a-b"),
        (".", "model"),
    ],
)
def test_the_name_of_a_source(source, name):
    assert name_of(source) == name


def test_an_address_of_ipv6_has_brackets():
    try:
        listener = server.bind("::1", 0)
    except ValueError:
        pytest.skip("there is no IPv6 here")
    with listener:
        assert re.fullmatch(r"http://\[::1\]:\d+", server.address(listener))
        assert server.is_loopback(listener)
