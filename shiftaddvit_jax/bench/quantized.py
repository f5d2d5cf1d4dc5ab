"""Dense models in int8, quantized after training by the tools of other runtimes.

Both calibrate on images with the spectrum of photographs, the same in every run.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from shiftaddvit_jax.bench.synthetic import natural_images, random_examples
from shiftaddvit_jax.models.inspect import Examples, by_name

CALIBRATION_IMAGES = 32  # at least, and two batches

Shapes = Mapping[str, Sequence[int]]


def runtime_inputs(examples: Examples) -> dict[str, np.ndarray]:
    """A model's examples by the names of a file's inputs, images with channels first."""
    inputs = {name: np.asarray(value) for name, value in by_name(examples).items()}
    if "images" in inputs:
        inputs["images"] = np.ascontiguousarray(inputs["images"].transpose(0, 3, 1, 2))
    return inputs


def calibration_batches(shapes: Shapes) -> Iterator[dict[str, np.ndarray]]:
    """What a runtime calibrates on, batch by batch; of rays, the one batch that is timed."""
    if "images" not in shapes:
        yield runtime_inputs(random_examples(shapes))
        return
    batch, size, *_ = shapes["images"]
    for seed in range(max(2, -(-CALIBRATION_IMAGES // batch))):
        yield runtime_inputs(natural_images(batch, size, seed))


def quantize_for_onnxruntime(file: str, quantization: str, shapes: Shapes) -> str:
    """The ONNX ``file`` with int8 products, by ONNX Runtime's tools; written beside it.

    ``"dynamic"`` scales activations in each run, as its documentation recommends for transformers;
    ``"static"`` by calibration, with QuantizeLinear and DequantizeLinear around products (QDQ).
    """
    from onnxruntime.quantization import (
        CalibrationDataReader,
        QuantFormat,
        QuantType,
        quantize_dynamic,
        quantize_static,
    )

    output = str(Path(file).with_suffix(f".{quantization}.onnx"))
    batches = calibration_batches(shapes)

    class Reader(CalibrationDataReader):
        def get_next(self) -> Any:
            return next(batches, None)

    with _without_advice():
        if quantization == "dynamic":
            quantize_dynamic(file, output, weight_type=QuantType.QInt8)
        else:
            quantize_static(
                file,
                output,
                Reader(),
                quant_format=QuantFormat.QDQ,
                per_channel=True,
                activation_type=QuantType.QUInt8,
                weight_type=QuantType.QInt8,
            )
    return output


@contextmanager
def _without_advice():
    """The root logger, which the tools write advice on preprocessing to, at level ERROR for a while."""
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.ERROR)
    try:
        yield
    finally:
        root.setLevel(level)


def quantize_for_openvino(file: str, shapes: Shapes) -> Any:
    """The ONNX ``file`` as OpenVINO's model with int8 products, by NNCF's settings for transformers."""
    import nncf  # pyrefly: ignore[missing-import]
    import openvino

    batches = list(calibration_batches(shapes))
    dataset = nncf.Dataset(batches)
    model = openvino.Core().read_model(file)
    return nncf.quantize(model, dataset, model_type=nncf.ModelType.TRANSFORMER, subset_size=len(batches))
