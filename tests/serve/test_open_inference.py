"""The Open Inference Protocol: https://github.com/kserve/open-inference-protocol."""

import base64
import json

import numpy as np
import pytest
from conftest import CLASSES, NAMES, SIZE, image_bytes, reason

from shiftaddvit_jax.classifier import softmax
from shiftaddvit_jax.serve.open_inference import read_inference

MODEL = "/v2/models/nano"
SHAPE = [2, SIZE, SIZE, 3]


def tensor(**changes):
    """An input of pixels, with changes."""
    pixels = np.random.default_rng(0).standard_normal(SHAPE, np.float32)
    return {
        "name": "pixels",
        "datatype": "FP32",
        "shape": SHAPE,
        "data": pixels.reshape(-1).tolist(),
    } | changes


def files_tensor(length, *data):
    """An input of files."""
    return {"name": "images", "datatype": "BYTES", "shape": [length], "data": data}


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/v2/health/live", {"live": True}),
        ("/v2/health/ready", {"ready": True}),
        (f"{MODEL}/ready", {"name": "nano", "ready": True}),
        ("/healthz", {"live": True}),
    ],
)
def test_health(client, path, expected):
    assert client.get(path).json() == expected


def test_the_server_says_what_it_is(client):
    assert client.get("/v2").json().keys() == {"name", "version", "extensions"}


def test_the_model_says_what_it_takes_and_returns(client, classifier):
    found = client.get(MODEL).json()
    assert {"name", "versions", "platform", "inputs", "outputs"} <= found.keys()
    assert found["inputs"] == [
        {"name": "pixels", "datatype": "FP32", "shape": [-1, SIZE, SIZE, 3]},
        {"name": "images", "datatype": "BYTES", "shape": [-1]},
    ]
    assert [output["shape"] for output in found["outputs"]] == [[-1, CLASSES], [-1, CLASSES], [-1]]
    assert found["parameters"]["preprocessing"]["mean"] == list(classifier.preprocessing.mean)


@pytest.mark.parametrize("nested", [False, True])
def test_pixels_are_computed(client, classifier, nested):
    pixels = np.array(tensor()["data"], np.float32).reshape(SHAPE)
    request = {"id": "7", "parameters": {"who": "a test"}}
    request["inputs"] = [tensor(data=pixels.tolist()) if nested else tensor()]
    answer = client.post(f"{MODEL}/infer", json=request).json()
    assert answer["model_name"] == "nano"
    assert (answer["id"], answer["parameters"]) == ("7", {"who": "a test"})
    outputs = {output["name"]: output for output in answer["outputs"]}
    expected = classifier.logits(pixels)
    for name, values in (("logits", expected), ("probabilities", softmax(expected))):
        assert (outputs[name]["datatype"], outputs[name]["shape"]) == ("FP32", [2, CLASSES])
        np.testing.assert_allclose(outputs[name]["data"], values.reshape(-1), rtol=1e-4, atol=1e-5)
    assert (outputs["labels"]["datatype"], outputs["labels"]["shape"]) == ("BYTES", [2])
    assert outputs["labels"]["data"] == [NAMES[index] for index in expected.argmax(axis=1)]


def test_files_are_decoded(client, classifier):
    files = [image_bytes(seed) for seed in range(3)]
    data = [base64.b64encode(file).decode() for file in files]
    request = {"inputs": [files_tensor(3, *data)], "outputs": [{"name": "probabilities"}]}
    answer = client.post(f"{MODEL}/infer", json=request).json()
    assert answer.keys() == {"model_name", "outputs"}
    (output,) = answer["outputs"]
    expected = classifier.probabilities(files)
    np.testing.assert_allclose(output["data"], expected.reshape(-1), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        ([], "must be an object"),
        ({}, "a list of one tensor"),
        ({"inputs": [tensor(), tensor()]}, "a list of one tensor"),
        ({"id": 7, "inputs": [tensor()]}, "id must be a string"),
        ({"parameters": 7, "inputs": [tensor()]}, "parameters of the request must be an object"),
        ({"inputs": [tensor(name="x")]}, "the input must be pixels of FP32 or images of BYTES, got 'x'"),
        ({"inputs": [tensor(datatype="FP16")]}, "got 'pixels' of 'FP16'"),
        ({"inputs": [tensor(shape=[2, 3, SIZE, SIZE])]}, r"must be \[-1, 32, 32, 3\]"),
        ({"inputs": [tensor(shape=[0, SIZE, SIZE, 3], data=[])]}, "for the number of images"),
        ({"inputs": [tensor(shape=[True, SIZE, SIZE, 3])]}, "the shape of pixels"),
        ({"inputs": [tensor(shape=[])]}, "the shape of pixels"),
        ({"inputs": [tensor(shape=[10**12, SIZE, SIZE, 3])]}, r"has the shape \[6144\], not"),
        ({"inputs": [tensor(data=[1.0])]}, r"has the shape \[1\], not"),
        ({"inputs": [tensor(data=[[1.0], [1.0, 2.0]])]}, "must be numbers"),
        ({"inputs": [tensor(data=["1"] * 6144)]}, "must be numbers"),
        ({"inputs": [tensor(data=[True] * 6144)]}, "must be numbers"),
        ({"inputs": [tensor(data=[1e39] * 6144)]}, "not finite"),
        ({"inputs": [tensor(data=[float("nan")] * 6144)]}, "not finite"),
        ({"inputs": [tensor(data="AAAA")]}, "must be a list"),
        ({"inputs": [tensor(parameters={"binary_data_size": 24576})]}, "asks for binary data"),
        ({"parameters": {"binary_data_output": True}, "inputs": [tensor()]}, "asks for binary data"),
        ({"inputs": [tensor()], "outputs": [{"name": "scores"}]}, "no output 'scores'; there are logits"),
        ({"inputs": [tensor()], "outputs": "logits"}, "outputs must be a list"),
        ({"inputs": [files_tensor(2, "AAAA")]}, "has 1 elements, not 2"),
        ({"inputs": [files_tensor(1, "?")]}, "in base64"),
        ({"inputs": [files_tensor(1, 7)]}, "in base64"),
    ],
)  # fmt: skip
def test_what_is_no_request_is_refused(request_, message):
    with pytest.raises(ValueError, match=message):
        read_inference(json.dumps(request_).encode(), SIZE)


@pytest.mark.parametrize("body", [b"", b"{", b"\xff", b"[" * 100_000, b'{"id": ' + b"9" * 5000 + b"}"])
def test_what_is_no_json_is_refused(body):
    with pytest.raises(ValueError, match=r"the body is not JSON|id must be"):
        read_inference(body, SIZE)


@pytest.mark.parametrize(
    ("settings", "status", "why"),
    [
        ({"json": {"inputs": [tensor(shape=[2])]}}, 400, "the shape of pixels"),
        ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415, "is not application/json"),
        ({"content": b"{}", "headers": {"inference-header-content-length": "2"}}, 415, "binary tensors"),
        (
            {"json": {"inputs": [files_tensor(1, "AAAA")]}},
            422,
            "image 0: the image cannot",
        ),
        ({"json": {"inputs": [files_tensor(65, *["AAAA"] * 65)]}}, 413, "64"),
    ],
)  # fmt: skip
def test_refusals_over_http(client, settings, status, why):
    assert why in reason(client.post(f"{MODEL}/infer", **settings), status)
