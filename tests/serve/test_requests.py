"""What is asked of a server, what it answers and what it refuses."""

import re
import socket
import struct
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from conftest import MAX_BATCH, NAMES, image_bytes, reason, serving

from shiftaddvit_jax.serve.service import Settings

RAW = {"content-type": "application/octet-stream"}
FORM = {"content-type": "multipart/form-data"}


def claimed_png(width, height):
    """A PNG that says how large it is, and has no pixels."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", b"") + chunk(b"IEND", b"")


def check_classes(found, expected):
    assert [each["index"] for each in found] == [answer.index for answer in expected]
    assert [each["label"] for each in found] == [NAMES[answer.index] for answer in expected]
    probabilities = [answer.probability for answer in expected]
    np.testing.assert_allclose([each["probability"] for each in found], probabilities, rtol=1e-4)


@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_bytes_are_classified_as_the_classifier_does(client, classifier, kind):
    data = image_bytes(kind=kind)
    answer = client.post("/predict", content=data, headers=RAW).json()
    assert answer["model"] == "nano"
    (result,) = answer["results"]
    assert result["file"] is None
    check_classes(result["classes"], classifier(data))


def test_several_images_are_answered_in_their_order(client, classifier):
    images = [image_bytes(seed) for seed in range(MAX_BATCH + 3)]
    form = [("image" if seed % 2 else "file", (f"{seed}.png", data)) for seed, data in enumerate(images)]
    results = client.post("/predict?top_k=3", files=form).json()["results"]
    assert [result["file"] for result in results] == [f"{seed}.png" for seed in range(len(images))]
    for result, expected in zip(results, classifier(images, top_k=3), strict=True):
        check_classes(result["classes"], expected)


def test_clients_at_the_same_time_get_their_own_answers(client, classifier):
    images = [image_bytes(seed) for seed in range(16)]
    with ThreadPoolExecutor(8) as pool:
        answers = list(
            pool.map(lambda data: client.post("/predict", content=data, headers=RAW).json(), images)
        )
    for answer, expected in zip(answers, classifier(images), strict=True):
        check_classes(answer["results"][0]["classes"], expected)


@pytest.mark.parametrize(
    ("method", "path", "settings", "status", "why"),
    [
        ("POST", "/predict", {"content": b"GIF89a?", "headers": RAW}, 422, "the image cannot be read"),
        ("POST", "/predict", {"content": image_bytes()[:300], "headers": RAW}, 422, "cannot be read"),
        ("POST", "/predict", {"files": {"image": ("a\nb.png", b"?")}}, 422, "b.png: the image cannot"),
        ("POST", "/predict", {"content": claimed_png(10_000, 5_000), "headers": RAW}, 422, "20,000,000 are"),
        ("POST", "/predict", {"content": b"", "headers": RAW}, 422, "the body is empty"),
        ("POST", "/predict", {"json": {}}, 415, "the content type application/json is none of"),
        ("POST", "/predict", {"data": {"image": "x"}}, 415, "x-www-form-urlencoded"),
        ("POST", "/predict", {"files": {"photo": b"x"}}, 400, "field 'photo' is no file in a field image or"),
        ("POST", "/predict", {"files": {"image": (None, "text")}}, 400, "field 'image' is no file"),
        ("POST", "/predict", {"content": b"-", "headers": FORM}, 400, "boundary"),
        ("POST", "/predict", {"files": [("image", b"x")] * 65}, 413, "at most 64"),
        ("POST", "/predict?top_k=0", {"content": b"x", "headers": RAW}, 400, "from 1 to 10, got '0'"),
        ("POST", "/predict?top_k=11", {"content": b"x", "headers": RAW}, 400, "from 1 to 10, got '11'"),
        ("POST", "/predict?top_k=five", {"content": b"x", "headers": RAW}, 400, "a whole number"),
        ("POST", "/routing", {"files": [("image", image_bytes())] * 2}, 422, "expected one image, got 2"),
        ("GET", "/predict", {}, 405, "/predict takes POST, not GET"),
        ("PUT", "/predict", {"content": bytes(10**6)}, 405, "/predict takes POST, not PUT"),
        ("DELETE", "/", {}, 405, "/ takes GET"),
        ("GET", "/predictions", {}, 404, "there is nothing at /predictions"),
        ("GET", "/v2/models/other", {}, 404, "there is nothing at /v2/models/other"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused_with_its_reason(client, method, path, settings, status, why):
    assert why in reason(client.request(method, path, **settings), status)


def test_a_body_that_is_too_long_is_refused(classifier):
    with serving(classifier, max_body=1000) as (client, _):
        for content in (bytes(10**6), iter([bytes(900)] * 1000)):  # with its length, and without
            assert "longer than 1,000 bytes" in reason(client.post("/predict", content=content), 413)
        assert client.get("/healthz").status_code == 200


def test_a_body_that_does_not_come_is_refused(classifier):
    with serving(classifier, body_timeout=0.2) as (client, _):
        with socket.create_connection((client.base_url.host, client.base_url.port)) as slow:
            slow.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx")
            answer = b"".join(iter(lambda: slow.recv(4096), b""))  # until the server closes
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"did not come within 0.2 s" in answer


def test_more_than_the_queue_holds_is_refused(classifier, gate):
    with serving(classifier, queue=MAX_BATCH) as (client, service), ThreadPoolExecutor(MAX_BATCH) as pool:
        send = lambda _=None: client.post("/predict", content=image_bytes(), headers=RAW)  # noqa: E731
        held = [pool.submit(send) for _ in range(MAX_BATCH)]
        while f"held_images {MAX_BATCH}" not in service.describe_metrics():
            time.sleep(0.01)
        refused = send()
        assert "the queue is full" in reason(refused, 503)
        assert refused.headers["retry-after"] == "1"
        assert client.get("/v2/health/ready").status_code == 200
        gate.set()
        assert [each.result().status_code for each in held] == [200] * MAX_BATCH
        assert send().status_code == 200


@pytest.mark.usefixtures("gate")
def test_an_answer_that_takes_too_long_is_given_up(classifier):
    with serving(classifier, timeout=0.2) as (client, service):
        answer = client.post("/predict", content=image_bytes(), headers=RAW)
        assert "no answer within 0.2 s" in reason(answer, 503)
        assert "held_images 0" in service.describe_metrics()


def test_an_error_is_logged_once_and_kept_from_clients(classifier, monkeypatch, caplog):
    def fail(inputs):
        raise ArithmeticError("of the weights")

    monkeypatch.setattr(classifier, "logits", fail)
    with serving(classifier) as (client, _):
        answer = client.post("/predict", content=image_bytes(), headers=RAW)
        assert reason(answer, 500) == "the server failed; its log says why"
        assert client.get("/healthz").json() == {"live": True}
        assert 'path="/predict",status="500"} 1' in client.get("/metrics").text
    (record,) = caplog.records
    assert record.getMessage() == "POST /predict failed"
    assert record.exc_info[0] is ArithmeticError


def test_metrics_count_requests_images_and_batches(classifier):
    with serving(classifier) as (client, _):
        client.post("/predict", files=[("image", image_bytes())] * MAX_BATCH)
        client.post("/predict", content=b"?", headers=RAW)
        client.get("/of/no/use")
        answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    found = dict(re.findall(r"^shiftaddvit_(\S+) (\S+)$", answer.text, re.MULTILINE))
    assert found['requests_total{path="/predict",status="200"}'] == "1"
    assert found['requests_total{path="/predict",status="422"}'] == "1"
    assert found['requests_total{path="other",status="404"}'] == "1"
    assert found['request_seconds_count{path="/predict"}'] == "2"
    assert found["images_total"] == str(MAX_BATCH)
    assert found["batch_size_sum"] == str(MAX_BATCH)
    assert found["queue_length"] == found["held_images"] == "0"


def test_a_client_that_goes_away_leaves_no_trace(classifier):
    with serving(classifier) as (client, service):
        with socket.create_connection((client.base_url.host, client.base_url.port)) as gone:
            gone.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nx")
            while "held_images 1" not in service.describe_metrics():
                time.sleep(0.01)
        while "held_images 0" not in service.describe_metrics():
            time.sleep(0.01)
        assert len(client.post("/predict", content=image_bytes(), headers=RAW).json()["results"]) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "a/b"}, "the name must be"),
        ({"max_batch": 0}, "max_batch must be at least 1, got 0"),
        ({"queue": 4}, "queue must be at least max_batch, 8, got 4"),
        ({"timeout": 0}, "timeout must be above 0, got 0"),
        ({"timeout": float("nan")}, "timeout must be above 0, got nan"),
        ({"max_wait_ms": -1}, "max_wait_ms must be at least 0, got -1"),
    ],
)
def test_settings_out_of_range_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        Settings(**{"name": "nano"} | settings)


def test_threads_end_with_the_server(classifier):
    before = threading.active_count()
    with serving(classifier) as (client, _):
        client.post("/predict", content=image_bytes(), headers=RAW)
    assert threading.active_count() <= before + 1
