"""The server's paths: what is asked for, and what is answered."""

import asyncio
import base64
import dataclasses
import hashlib
import logging
import re
import time
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import ExitStack, asynccontextmanager
from html import escape
from importlib.resources import files

import numpy as np
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

import shiftaddvit_jax
from shiftaddvit_jax.classifier import Classifier, softmax
from shiftaddvit_jax.serve.bodies import File, media_type, read_body, read_images
from shiftaddvit_jax.serve.metrics import CONTENT_TYPE, Metrics
from shiftaddvit_jax.serve.open_inference import inference_response, model_metadata, read_inference
from shiftaddvit_jax.serve.routing import describe_maps, has_mixtures
from shiftaddvit_jax.serve.service import Service, Settings

LOG = logging.getLogger(__name__)
LONGEST_REASON = 300  # characters
TOP_K = 5

# What a path answers to a body. Places in the queue that it takes are given back once it has answered.
Answer = Callable[[Request, bytes, ExitStack], Awaitable[Response]]


def create_app(classifier: Classifier, settings: Settings) -> Starlette:
    """The server of a classifier as an ASGI application, with its `Service` in ``state.service``."""
    service = Service(classifier, settings)
    paths = Paths(service)
    model = f"/v2/models/{settings.name}"
    routes = {
        "/": ("GET", paths.page),
        "/predict": ("POST", paths.answered(paths.predict)),
        "/routing": ("POST", paths.answered(paths.routing)),
        "/healthz": ("GET", paths.live),
        "/metrics": ("GET", paths.metrics),
        "/v2": ("GET", paths.server),
        "/v2/health/live": ("GET", paths.live),
        "/v2/health/ready": ("GET", paths.ready),
        model: ("GET", paths.model),
        f"{model}/ready": ("GET", paths.model_ready),
        f"{model}/infer": ("POST", paths.answered(paths.infer)),
    }

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        yield
        await asyncio.to_thread(service.close)

    app = Starlette(
        routes=[Route(path, answer, methods=[method]) for path, (method, answer) in routes.items()],
        middleware=[Middleware(Measured, metrics=service.metrics, paths=frozenset(routes))],
        exception_handlers={HTTPException: refused},
        lifespan=lifespan,
    )
    app.router.redirect_slashes = False
    app.state.service = service
    return app


class Paths:
    """What each path answers."""

    def __init__(self, service: Service) -> None:
        self._service = service
        self._page, self._policy = render_page(service.settings.name)

    def answered(self, answer: Answer) -> Callable[[Request], Awaitable[Response]]:
        """An endpoint that reads the body and answers to it, within the limits."""
        settings = self._service.settings

        async def endpoint(request: Request) -> Response:
            with ExitStack() as places:
                places.enter_context(self._service.hold(1))
                body = await read_body(request, settings.max_body, settings.body_timeout)
                try:
                    async with asyncio.timeout(settings.timeout):
                        return await answer(request, body, places)
                except TimeoutError:
                    reason = f"there was no answer within {settings.timeout:g} s; try again"
                    raise HTTPException(503, reason, headers={"Retry-After": "1"}) from None

        return endpoint

    async def page(self, request: Request) -> Response:
        """The page on which images are dropped."""
        headers = {
            "Content-Security-Policy": self._policy,
            "Referrer-Policy": "no-referrer",
            "X-Content-Type-Options": "nosniff",
        }
        return HTMLResponse(self._page, headers=headers)

    async def predict(self, request: Request, body: bytes, places: ExitStack) -> Response:
        """The most probable classes of each image of a body."""
        classifier = self._service.classifier
        top_k = _top_k(request, len(classifier.class_names))
        images = await self._images(request, body, places)
        logits = await self._service.logits(await self._service.inputs(images))
        ranked = classifier.rank(softmax(logits), top_k)
        results = [
            {"file": image.name or None, "classes": [answer._asdict() for answer in answers]}
            for image, answers in zip(images, ranked, strict=True)
        ]
        return JSONResponse({"model": self._service.settings.name, "results": results})

    async def routing(self, request: Request, body: bytes, places: ExitStack) -> Response:
        """Where each MoE layer sends an image's tokens, and the square that the model sees."""
        image, *others = await self._images(request, body, places)
        if others:
            raise HTTPException(422, f"expected one image, got {1 + len(others)}")
        if not has_mixtures(self._service.classifier.model):
            return JSONResponse({"layers": []})
        maps, square = await self._service.routing(image)
        picture = f"data:image/png;base64,{base64.b64encode(square).decode()}"
        return JSONResponse({"image": picture, "layers": describe_maps(maps)})

    async def infer(self, request: Request, body: bytes, places: ExitStack) -> Response:
        """The answer to a request of the Open Inference Protocol."""
        if "inference-header-content-length" in request.headers:
            raise HTTPException(
                415, "binary tensors are an extension that this server does not have; use JSON"
            )
        if media_type(request) not in ("", "application/json"):
            raise HTTPException(415, f"the content type {media_type(request)} is not application/json")
        service, classifier = self._service, self._service.classifier
        try:
            asked = await service.beside(read_inference, body, classifier.preprocessing.size)
        except ValueError as error:
            raise HTTPException(400, str(error)) from None
        self._hold(len(asked.images), places)
        inputs = asked.images
        if isinstance(inputs, list):
            inputs = await service.inputs([File(f"image {index}", data) for index, data in enumerate(inputs)])
        logits = await service.logits(inputs)
        labels = [classifier.class_names[index] for index in logits.argmax(axis=-1)]
        outputs = {"logits": logits, "probabilities": softmax(logits), "labels": np.array(labels, object)}
        return JSONResponse(inference_response(service.settings.name, asked, outputs))

    async def metrics(self, request: Request) -> Response:
        """What was counted."""
        return Response(self._service.describe_metrics(), headers={"Content-Type": CONTENT_TYPE})

    async def live(self, request: Request) -> Response:
        """Whether the process can still answer."""
        return self._state({"live": self._service.ready})

    async def ready(self, request: Request) -> Response:
        """Whether requests are answered at once."""
        return self._state({"ready": self._service.ready})

    async def model_ready(self, request: Request) -> Response:
        """Whether the model answers."""
        return self._state({"name": self._service.settings.name, "ready": self._service.ready})

    async def server(self, request: Request) -> Response:
        """What the server is."""
        version = shiftaddvit_jax.__version__
        return JSONResponse({"name": "shiftaddvit_jax", "version": version, "extensions": []})

    async def model(self, request: Request) -> Response:
        """What the model takes and returns."""
        classifier, name = self._service.classifier, self._service.settings.name
        preprocessing = dataclasses.asdict(classifier.preprocessing)
        size, classes = classifier.preprocessing.size, len(classifier.class_names)
        return JSONResponse(model_metadata(name, size, classes, {"preprocessing": preprocessing}))

    def _state(self, state):
        return JSONResponse(state, 200 if self._service.ready else 503)

    async def _images(self, request, body, places):
        images = await read_images(request, body, self._service.settings.queue)
        self._hold(len(images), places)
        return images

    def _hold(self, images, places):
        """Hold places for the images beside the first, which has its own."""
        limit = self._service.settings.queue
        if images > limit:
            raise HTTPException(413, f"the request has {images} images; at most {limit} are taken")
        places.enter_context(self._service.hold(images - 1))


class Measured:
    """An application that counts and times the requests to another, and logs its errors.

    A client is told of an error that nobody expected, and keeps its connection.
    """

    def __init__(self, app: ASGIApp, metrics: Metrics, paths: frozenset[str]) -> None:
        self._app, self._metrics, self._paths = app, metrics, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer a request; paths that the server does not have are counted as one, ``other``."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        status, started, begin = 500, False, time.monotonic()

        async def noted(message: Message) -> None:
            nonlocal status, started
            status, started = message.get("status", status), True
            await send(message)

        path = scope["path"] if scope["path"] in self._paths else "other"
        try:
            await self._app(scope, receive, noted)
        except Exception:
            if started:
                raise
            LOG.exception("%s %s failed", scope["method"], path)
            failed = JSONResponse({"error": "the server failed; its log says why"}, 500)
            await failed(scope, receive, noted)
        finally:
            self._metrics.count("requests_total", path=path, status=str(status))
            self._metrics.observe("request_seconds", time.monotonic() - begin, path=path)


async def refused(request: Request, error: Exception) -> Response:
    """A refusal with its reason, in one line of JSON."""
    assert isinstance(error, HTTPException)
    reason = " ".join(error.detail.split())
    if error.status_code == 404:
        reason = f"there is nothing at {request.url.path}"
    elif error.status_code == 405:
        allowed = ", ".join(sorted((error.headers or {})["Allow"].split(", ")))  # Starlette's is of a set
        reason = f"{request.url.path} takes {allowed}, not {request.method}"
    return JSONResponse({"error": reason[:LONGEST_REASON]}, error.status_code, error.headers)


def render_page(model: str) -> tuple[str, str]:
    """The page of a model, and the policy that lets its own script and style run and nothing else."""
    page = files("shiftaddvit_jax.serve").joinpath("page.html").read_text("utf-8")
    allowed = {}
    for tag in ("script", "style"):
        (inside,) = re.findall(f"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        allowed[tag] = base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; script-src 'sha256-{allowed['script']}'; "
        f"style-src 'sha256-{allowed['style']}'; "
        "img-src blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'"
    )
    return page.replace("{{model}}", escape(model)), policy


def _top_k(request, classes):
    text = request.query_params.get("top_k", str(min(TOP_K, classes)))
    if not text.isascii() or not text.isdigit() or len(text) > 9 or not 1 <= int(text) <= classes:
        raise HTTPException(400, f"top_k must be a whole number from 1 to {classes}, got {text!r}")
    return int(text)
