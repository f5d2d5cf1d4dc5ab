"""The subject of reports, pictures and pages: a model, its variables, and what its folder says of it."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import flax.linen as nn
import numpy as np
from jaxtyping import Float, PyTree, UInt8

from shiftaddvit_jax.checkpoints import load_model
from shiftaddvit_jax.data import decode_file, load_dataset
from shiftaddvit_jax.data.preprocessing import crop, normalize_as
from shiftaddvit_jax.files import read_metrics
from shiftaddvit_jax.models import Preprocessing, model_preprocessing
from shiftaddvit_jax.models.inspect import on_xla
from shiftaddvit_jax.models.registry import check_classifier, linear_kinds
from shiftaddvit_jax.pack import inference_variables

Pixels = UInt8[np.ndarray, "batch side side 3"]


@dataclass(frozen=True)
class Subject:
    """A model and what is known of it.

    Attributes:
      name: its name for people.
      model: from `create_model` or `reparameterize`.
      variables: its variables, packed or not.
      is_trained: whether the variables are more than random numbers.
      description: what was saved with the model, such as ``top1`` and ``class_names``.
      history: what its training logged; empty without a log.
      data: ``source`` and ``path`` of the data that it was trained on; None if unknown.
    """

    name: str
    model: nn.Module
    variables: PyTree
    is_trained: bool = True
    description: Mapping[str, Any] | None = None
    history: Sequence[Mapping[str, float]] = ()
    data: tuple[str, str] | None = None

    @property
    def top1(self) -> float | None:
        """Its accuracy on held-out images, a share; None if unknown."""
        return (self.description or {}).get("top1")

    @property
    def preprocessing(self) -> Preprocessing:
        """The pixels that it expects: those saved with it, or its variant's."""
        saved = (self.description or {}).get("preprocessing")
        return Preprocessing.from_dict(saved) if saved else model_preprocessing(self.model)

    def for_inference(self) -> tuple[nn.Module, PyTree]:
        """Model and variables as inference runs them fastest: shift layers packed."""
        if not linear_kinds(self.model) & {"shift", "moe"}:
            return self.model, self.variables
        return self.model, inference_variables(self.model, self.variables, for_kernels=True)

    def on_xla(self) -> tuple[nn.Module, PyTree]:
        """Model and variables as XLA runs them, whatever kernels there are."""
        return on_xla(self.model), inference_variables(self.model, self.variables, for_kernels=False)


def load_subject(folder: str | Path) -> Subject:
    """The subject in ``folder``, which is a checkpoint's folder or that of the run around it.

    Raises:
      ValueError: neither is there.
    """
    folder = Path(folder).absolute()
    if not (folder / "model.json").is_file() and (folder / "model" / "model.json").is_file():
        folder = folder / "model"
    model, variables, description = load_model(folder)
    run, data, history = folder.parent, training_data(folder), ()
    if data is not None:
        history = read_metrics(run)
    return Subject(
        run.name if folder.name == "model" else folder.name,
        model,
        variables,
        description=description,
        history=history,
        data=data,
    )


def training_data(folder: str | Path) -> tuple[str, str] | None:
    """``source`` and ``path`` of the data that the model in a run was trained on; None if unknown."""
    folder = Path(folder).absolute()
    run = folder.parent if folder.name == "model" else folder
    if not (run / "model" / "model.json").is_file() or not (run / "config.json").is_file():
        return None
    config = json.loads((run / "config.json").read_text())["data"]
    return config["source"], config["path"]


def distinct_names(subjects: Sequence[Subject]) -> list[Subject]:
    """``subjects``; of those with the same name, all after the first get a number behind it."""
    renamed: dict[str, Subject] = {}
    for subject in subjects:
        names = (subject.name, *(f"{subject.name} ({number})" for number in range(2, len(subjects) + 1)))
        name = next(name for name in names if name not in renamed)
        renamed[name] = replace(subject, name=name)
    return list(renamed.values())


def example_pixels(subject: Subject, count: int, files: Sequence[str | Path] = ()) -> Pixels:
    """Images of the subject's size: ``files``, or without any the first held-out one of each class.

    Raises:
      ValueError: no files for a subject of unknown data, or files that are no images.
    """
    check_classifier(subject.model, "a picture of images")
    if files:
        return np.stack([crop(decode_file(file), subject.preprocessing) for file in files])
    if subject.data is None:
        raise ValueError(f"{subject.name} does not say what it was trained on; give images with --images")
    examples = load_dataset(*subject.data).test
    first = {int(label): index for index, label in reversed(list(enumerate(examples.labels)))}
    chosen = [first[label] for label in sorted(first)][:count]
    return np.stack([crop(examples[index]["image"], subject.preprocessing) for index in chosen])


def as_inputs(subject: Subject, pixels: Pixels) -> Float[np.ndarray, "batch side side 3"]:
    """``pixels`` as the subject's model takes them."""
    return normalize_as(pixels, subject.preprocessing)
