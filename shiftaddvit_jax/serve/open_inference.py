"""The Open Inference Protocol, version 2, in JSON: tensors from requests, tensors for answers."""

import base64
import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float

PIXELS, IMAGES = "pixels", "images"
OUTPUTS = ("logits", "probabilities", "labels")
Json = dict[str, Any]


class Inference(NamedTuple):
    """What a request asks for.

    Attributes:
      images: preprocessed pixels, or the bytes of image files.
      outputs: which outputs are wanted.
      echoed: what the answer repeats: ``id`` and ``parameters``, if given.
    """

    images: Float[np.ndarray, "batch size size 3"] | list[bytes]
    outputs: tuple[str, ...]
    echoed: Json


def read_inference(body: bytes, size: int) -> Inference:
    """What the body of a request asks of a model whose images have sides of ``size``.

    Raises:
      ValueError: no such request; it says where, in one line.
    """
    try:
        request = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the body is not JSON: {error}") from None
    if not isinstance(request, dict):
        raise ValueError("the body must be an object of JSON")
    echoed = {name: request[name] for name in ("id", "parameters") if name in request}
    if not isinstance(echoed.get("id", ""), str):
        raise ValueError("id must be a string")
    _check_parameters("the request", request)
    inputs = request.get("inputs")
    if not isinstance(inputs, list) or len(inputs) != 1 or not isinstance(inputs[0], dict):
        raise ValueError(f"inputs must be a list of one tensor, {PIXELS} or {IMAGES}")
    return Inference(_read_input(inputs[0], size), _read_outputs(request.get("outputs", [])), echoed)


def _check_parameters(what, tensor):
    parameters = tensor.get("parameters", {})
    if not isinstance(parameters, dict):
        raise ValueError(f"the parameters of {what} must be an object")
    if any(parameters.get(name) for name in ("binary_data", "binary_data_size", "binary_data_output")):
        raise ValueError(
            f"{what} asks for binary data, an extension that this server does not have; use JSON"
        )


def _read_input(tensor, size):
    name, datatype = tensor.get("name"), tensor.get("datatype")
    if (name, datatype) not in ((PIXELS, "FP32"), (IMAGES, "BYTES")):
        raise ValueError(
            f"the input must be {PIXELS} of FP32 or {IMAGES} of BYTES, got {name!r} of {datatype!r}"
        )
    _check_parameters(f"the input {name}", tensor)
    shape, data = tensor.get("shape"), tensor.get("data")
    expected = [-1, size, size, 3] if name == PIXELS else [-1]
    if (
        not isinstance(shape, list)
        or not all(type(length) is int for length in shape)
        or shape[1:] != expected[1:]
        or not shape
        or shape[0] < 1
    ):
        raise ValueError(
            f"the shape of {name} must be {expected} with -1 for the number of images, got {shape}"
        )
    if not isinstance(data, list):
        raise ValueError(f"the data of {name} must be a list")
    return _read_pixels(data, shape) if name == PIXELS else _read_files(data, shape)


def _read_pixels(data, shape):
    try:
        values = np.asarray(data)
    except ValueError:
        values = np.asarray(None)  # of uneven lists
    if values.dtype.kind not in "iuf":
        raise ValueError(f"the data of {PIXELS} must be numbers, in one list or nested evenly")
    if list(values.shape) != shape and (values.ndim != 1 or len(values) != math.prod(shape)):
        raise ValueError(f"the data of {PIXELS} has the shape {list(values.shape)}, not {shape}")
    with np.errstate(over="ignore"):
        values = values.astype(np.float32).reshape(shape)
    if not np.isfinite(values).all():
        raise ValueError(f"the data of {PIXELS} has numbers that are not finite in float32")
    return values


def _read_files(data, shape):
    if len(data) != shape[0]:
        raise ValueError(f"the data of {IMAGES} has {len(data)} elements, not {shape[0]}")
    try:
        return [base64.b64decode(text, validate=True) for text in data]
    except (TypeError, ValueError):
        raise ValueError(f"the data of {IMAGES} must be image files in base64") from None


def _read_outputs(outputs):
    if not isinstance(outputs, list) or not all(isinstance(output, dict) for output in outputs):
        raise ValueError("outputs must be a list of objects")
    for output in outputs:
        if output.get("name") not in OUTPUTS:
            raise ValueError(f"there is no output {output.get('name')!r}; there are {', '.join(OUTPUTS)}")
        _check_parameters(f"the output {output['name']}", output)
    return tuple(output["name"] for output in outputs) or OUTPUTS


def inference_response(name: str, asked: Inference, outputs: Mapping[str, np.ndarray]) -> Json:
    """The answer to a request, with those of ``outputs`` that it asked for."""
    tensors = [
        {
            "name": output,
            "datatype": "FP32" if outputs[output].dtype == np.float32 else "BYTES",
            "shape": list(outputs[output].shape),
            "data": outputs[output].reshape(-1).tolist(),
        }
        for output in asked.outputs
    ]
    return {"model_name": name, **asked.echoed, "outputs": tensors}


def model_metadata(name: str, size: int, classes: int, parameters: Json) -> Json:
    """What the protocol's metadata of a model says; a request has one of the two inputs."""
    return {
        "name": name,
        "versions": [],
        "platform": "shiftaddvit_jax",
        "inputs": [
            {"name": PIXELS, "datatype": "FP32", "shape": [-1, size, size, 3]},
            {"name": IMAGES, "datatype": "BYTES", "shape": [-1]},
        ],
        "outputs": [
            {"name": "logits", "datatype": "FP32", "shape": [-1, classes]},
            {"name": "probabilities", "datatype": "FP32", "shape": [-1, classes]},
            {"name": "labels", "datatype": "BYTES", "shape": [-1]},
        ],
        "parameters": {
            "inputs": f"one of two: {IMAGES}, files in base64; or {PIXELS}, preprocessed by `preprocessing`",
            "labels": "the most probable class of each image",
            **parameters,
        },
    }
