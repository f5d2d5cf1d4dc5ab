"""The page, in a real browser; and where mixtures send tokens, which it shows."""

import base64
import io
import re

import numpy as np
import pytest
from conftest import NAMES, SIZE, image_bytes, make_classifier, serving
from devtools import Page
from PIL import Image

from shiftaddvit_jax.data.preprocessing import crop
from shiftaddvit_jax.pictures import routed_tokens

LAYERS = ["stage1/block1/mlp/fc1", "stage1/block1/mlp/fc2"]
SHOWN = "!document.getElementById('{}').hidden"


@pytest.fixture(scope="module")
def mixture():
    return make_classifier(("moe", "shift", "shift", "shift"))


@pytest.fixture(scope="module")
def mixture_client(mixture):
    with serving(mixture) as (client, _):
        yield client


@pytest.fixture
def page(tmp_path):
    page = Page(tmp_path, 360, 1400)
    yield page
    page.close()


@pytest.fixture
def photo(tmp_path):
    file = tmp_path / "<b>photo.png"
    file.write_bytes(image_bytes(size=(48, 40)))
    return file


def test_routing_is_that_of_the_model(mixture_client, mixture):
    data = image_bytes(size=(48, 40))
    answer = mixture_client.post("/routing", files={"image": data}).json()
    image = mixture.preprocess(data)
    expected = routed_tokens(mixture.model, mixture.variables, image[None])
    assert [layer["name"] for layer in answer["layers"]] == LAYERS
    for layer in answer["layers"]:
        (tokens,) = expected[layer["name"]]
        assert layer["shift"] == "".join("01"[int(token)] for token in tokens)
        assert layer["side"] ** 2 == len(tokens)
        assert layer["shift_share"] == pytest.approx(tokens.mean())
    square = Image.open(io.BytesIO(base64.b64decode(answer["image"].partition(",")[2])))
    pixels = np.asarray(Image.open(io.BytesIO(data)))
    np.testing.assert_array_equal(np.asarray(square), crop(pixels, mixture.preprocessing))
    assert square.size == (SIZE, SIZE)


def test_a_model_without_mixtures_has_no_routing(client):
    assert client.post("/routing", files={"image": image_bytes()}).json() == {"layers": []}


def test_the_page_needs_nothing_from_elsewhere(client):
    answer = client.get("/")
    policy = answer.headers["content-security-policy"]
    assert policy.startswith("default-src 'none'; script-src 'sha256-")
    assert "unsafe" not in policy
    assert not re.search(r"(src|href)=\"(?!data:,)", answer.text)
    assert "https:" not in answer.text


def test_the_page_shows_classes_and_maps_of_an_image(page, mixture_client, mixture, photo):
    page("Page.navigate", url=str(mixture_client.base_url))
    page.wait("document.readyState === 'complete' && !!document.getElementById('file')")
    page.choose(photo)
    page.wait(SHOWN.format("routing"))
    shown = page.run("[...document.querySelectorAll('#classes .name')].map(each => each.textContent)")
    expected = mixture(photo.read_bytes())
    assert shown == [f"{NAMES[each.index]}{100 * each.probability:.1f} %" for each in expected]
    assert page.run("document.getElementById('said').textContent") == photo.name
    maps = page.run("[...document.querySelectorAll('canvas')].map(each => each.getAttribute('aria-label'))")
    assert [each.partition(":")[0] for each in maps] == LAYERS
    colors = page.run(
        "new Set(document.querySelector('canvas').getContext('2d').getImageData(0, 0, 224, 224).data).size"
    )
    assert colors > 2  # it is drawn
    assert page.run("document.documentElement.scrollWidth") <= 360
    assert page.complaints == []


def test_an_image_can_be_dropped_and_another_after_one_that_is_none(page, client, photo):
    page("Page.navigate", url=str(client.base_url))
    page.wait("document.readyState === 'complete' && !!document.getElementById('file')")
    drop = """(() => {
        const files = new DataTransfer();
        files.items.add(new File([Uint8Array.from(atob("%s"), c => c.charCodeAt(0))], "%s"));
        const settings = {dataTransfer: files, bubbles: true, cancelable: true};
        document.body.dispatchEvent(new DragEvent("drop", settings));
    })()"""
    page.run(drop % (base64.b64encode(b"<svg onload=alert(1)>").decode(), "none.png"))
    assert "none.png: the image cannot be read" in page.wait(
        "document.querySelector('#said.error')?.textContent"
    )
    page.run(drop % (base64.b64encode(photo.read_bytes()).decode(), "photo.png"))
    page.wait(SHOWN.format("answer"))
    page.wait("document.getElementById('said').textContent === 'photo.png'")
    assert page.run("document.querySelectorAll('#classes li').length") == 5
    assert page.run("document.querySelectorAll('canvas').length") == 0
    assert page.run("document.getElementById('routing').hidden")


def test_the_keyboard_reaches_the_field(page, client):
    page("Page.navigate", url=str(client.base_url))
    page.wait("document.readyState === 'complete' && !!document.getElementById('file')")
    for kind in ("keyDown", "keyUp"):
        page("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab", windowsVirtualKeyCode=9)
    assert page.wait("document.activeElement.id") == "file"
    assert page.run("getComputedStyle(document.getElementById('drop')).outlineStyle") == "solid"
