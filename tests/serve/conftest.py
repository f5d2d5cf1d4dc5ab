import contextlib
import io
import threading
import time

import httpx
import jax
import numpy as np
import pytest
import uvicorn
from PIL import Image

import shiftaddvit_jax as sav
from shiftaddvit_jax.checkpoints.source import Source
from shiftaddvit_jax.classifier import Classifier
from shiftaddvit_jax.models import model_preprocessing
from shiftaddvit_jax.serve import server
from shiftaddvit_jax.serve.app import create_app
from shiftaddvit_jax.serve.service import Settings

SIZE, CLASSES, MAX_BATCH = 32, 10, 4
NAMES = tuple(f"<i>{label}</i> & co" for label in range(CLASSES))  # a page must not take them for markup


def make_classifier(mlp="shift"):
    """The smallest model, on XLA, of random weights."""
    model = sav.create_model(
        "pvt_v2_nano", num_classes=CLASSES, attention="linear", mlp=mlp, implementation="xla"
    )
    variables = sav.init_variables(model, jax.random.key(0))
    return Classifier(Source("nano", model, variables, model_preprocessing(model), NAMES), MAX_BATCH)


def image_bytes(seed=0, kind="PNG", size=(40, 30)):
    pixels = np.random.default_rng(seed).integers(0, 256, (*size[::-1], 3), np.uint8)
    data = io.BytesIO()
    Image.fromarray(pixels).save(data, kind)
    return data.getvalue()


@contextlib.contextmanager
def serving(classifier, **settings):
    """A client of a server in a thread of this process, and the server's `Service`."""
    settings = {"name": "nano", "max_batch": MAX_BATCH, "max_wait_ms": 1} | settings
    with server.bind("127.0.0.1", 0) as listener:
        app = create_app(classifier, Settings(**settings))
        running = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=5))
        thread = threading.Thread(target=running.run, args=([listener],))
        thread.start()
        while not running.started:
            time.sleep(0.01)
        try:
            with httpx.Client(base_url=server.address(listener), timeout=60) as client:
                yield client, app.state.service
        finally:
            running.should_exit = True
            thread.join()


@pytest.fixture(scope="session")
def classifier():
    return make_classifier()


@pytest.fixture(scope="session")
def client(classifier):
    with serving(classifier) as (client, _):
        yield client


@pytest.fixture
def gate(classifier, monkeypatch):
    """Nothing is computed until this event is set."""
    event, logits = threading.Event(), Classifier.logits

    def later(inputs):
        event.wait(30)
        return logits(classifier, inputs)

    monkeypatch.setattr(classifier, "logits", later)
    yield event
    event.set()


def reason(response, status):
    """The reason of a refusal: one line of JSON."""
    assert response.status_code == status, response.text
    (text,) = response.json().values()
    assert "\n" not in text
    assert "Traceback" not in text
    return text
