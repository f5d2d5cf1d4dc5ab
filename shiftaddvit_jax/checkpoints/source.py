"""A model from anywhere: one of ours, or weights of others with what lies beside them."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
from jaxtyping import PyTree

from shiftaddvit_jax.checkpoints.bundle import is_bundle, is_portable, open_bundle, read_portable
from shiftaddvit_jax.checkpoints.configs import (
    IMAGENET_CLASSES,
    Described,
    describe_timm,
    describe_transformers,
    imagenet_classes,
)
from shiftaddvit_jax.checkpoints.find import find_weights
from shiftaddvit_jax.checkpoints.preprocessing import from_timm, from_transformers
from shiftaddvit_jax.checkpoints.pretrained import import_weights, read_config, read_weights
from shiftaddvit_jax.checkpoints.published import SHIPPED, shipped_models
from shiftaddvit_jax.checkpoints.store import DESCRIPTION, load_model
from shiftaddvit_jax.checkpoints.weights import weight_files
from shiftaddvit_jax.models import Preprocessing, create_model, model_preprocessing
from shiftaddvit_jax.models.registry import model_task

OWN = ("model", "packed")  # what `save_model` says by itself


@dataclass(frozen=True)
class Source:
    """A model, and what it takes to use it on images.

    Attributes:
      name: what was opened.
      model: the model.
      variables: its variables, packed or not.
      preprocessing: the pixels that it expects.
      class_names: a name for each class; numbers where nobody named them.
      notes: what could not be known and was taken from a table, a line each.
      about: what one of our checkpoints says of itself, such as ``top1``.
      program: a bundle's compiled program, a function of packed variables and images; None without.
      place: the folder, or the file of weights, that it was read from; None if it was not.
    """

    name: str
    model: nn.Module
    variables: PyTree
    preprocessing: Preprocessing
    class_names: tuple[str, ...]
    notes: tuple[str, ...] = ()
    about: Mapping[str, Any] | None = None
    program: Callable | None = None
    place: Path | None = None


def open_source(
    source: str | Path,
    *,
    model: str | None = None,
    num_classes: int | None = None,
    image_size: int | None = None,
    layer_norm_eps: float | None = None,
) -> Source:
    """The model that ``source`` names, with its preprocessing and the names of its classes.

    Args:
      source: one of our checkpoints or the run around it; the name of a model that comes with the package (a
        folder of that name comes first); or weights of transformers, timm or the authors, as in
        `load_pretrained`, whose ``config.json`` and ``preprocessor_config.json`` are read where they lie.
      model: the variant, needed where no ``config.json`` tells it.
      num_classes: by default, the weights' own; for another number the head is drawn anew.
      image_size: side in pixels; by default, the weights' own.
      layer_norm_eps: where no ``config.json`` tells it; by default the authors'.

    Raises:
      ValueError: nothing that can be read; a config that contradicts the architecture, the weights or an
        argument (with the field); or no variant given where nothing tells it.
    """
    asked = {"num_classes": num_classes, "image_size": image_size, "layer_norm_eps": layer_norm_eps}
    asked = {name: value for name, value in asked.items() if value is not None}
    folder = our_folder(source)
    if folder is None:
        return _open_others(source, model, asked)
    if model is not None or asked:
        given = ", ".join(["model"] * (model is not None) + list(asked))
        raise ValueError(f"{folder} says itself what model it holds; leave out {given}")
    return _open_ours(folder)


def open_model(
    source: str | Path, **settings: Any
) -> tuple[nn.Module, PyTree, dict[str, Any], tuple[str, ...]]:
    """A model for any task, its variables, what `save_model` is to say of it, and notes.

    Arguments and errors are those of `open_source`, which classifiers are opened with.
    """
    folder = our_folder(source)
    if folder is not None and (folder / DESCRIPTION).is_file():
        model, variables, about = load_model(folder)
        if model_task(model) != "classification":
            return model, variables, {name: about[name] for name in about if name not in OWN}, ()
    found = open_source(source, **settings)
    return found.model, found.variables, describe_source(found), found.notes


def describe_source(source: Source) -> dict[str, Any]:
    """What `save_model` and `export_bundle` are to say of a model made from ``source``."""
    about = {name: value for name, value in (source.about or {}).items() if name not in OWN}
    if is_named(source):
        about["class_names"] = source.class_names
    return about | {"preprocessing": asdict(source.preprocessing)}


def is_named(source: Source) -> bool:
    """Whether the classes have names, be they numbers that one of our checkpoints says."""
    is_said = (source.about or {}).get("class_names") is not None
    return is_said or source.class_names != _numbers(len(source.class_names))


def stored_bytes(source: Source) -> int | None:
    """How many bytes the files have that a model was read from: a folder's, or those with weights."""
    if source.place is None:
        return None
    files = source.place.rglob("*") if source.place.is_dir() else weight_files(source.place)
    return sum(file.stat().st_size for file in files if file.is_file())


def _open_others(source, variant, asked):
    file = find_weights(source)
    if is_portable(file.parent):  # downloaded
        return _open_ours(file.parent)
    weights = read_weights(file)
    config = file.parent / "config.json"
    described, preprocessing = _read_configs(file)
    notes = []
    if described is None:
        if variant is None:
            raise ValueError(
                f"no config.json beside {file} says what model this is; give its name, one of those that "
                "`shiftaddvit models` lists (model=..., or --model)"
            )
        described = Described({"name": variant}, None, None)
        notes.append(
            f"no config.json beside the weights: taken for {variant} with its authors' LayerNorm epsilons"
        )
    known = {
        "model": described.arguments["name"],
        "layer_norm_eps": described.arguments.get("layer_norm_eps"),
    }
    for name, value in {"model": variant, "layer_norm_eps": asked.get("layer_norm_eps")}.items():
        if None not in (value, known[name]) and value != known[name]:
            raise ValueError(f"{config} says {name} {known[name]}, not {value}; leave out {name}")
    names = described.class_names
    if names is not None and weights.num_classes not in (0, len(names)):
        raise ValueError(
            f"{config} names {len(names)} classes, and {file} has a head for {weights.num_classes}"
        )
    created = create_model(**({"num_classes": weights.num_classes} | described.arguments | asked))
    if preprocessing is None:
        preprocessing = model_preprocessing(created)
        notes.append(
            f"nothing beside the weights says what pixels they expect: taken are those of {created.variant}"
        )
    size = _image_size(created, preprocessing, described.image_size, asked.get("image_size"), file)
    created = created.clone(image_size=size)
    if size != preprocessing.size:
        preprocessing = preprocessing.at_size(size)
    variables = import_weights(created, weights, trained_size=described.image_size)
    names, note = _class_names(names, created.num_classes)
    return Source(str(source), created, variables, preprocessing, names, (*notes, *note), place=file)


def our_folder(source: str | Path) -> Path | None:
    """The folder of one of our checkpoints or bundles that ``source`` is, holds or names, or None."""
    path = Path(source).expanduser()
    shipped = SHIPPED / path.name if str(source) in shipped_models() else None
    folders = (path, path / "model", shipped)
    return next((folder for folder in folders if folder is not None and is_ours(folder)), None)


def is_ours(folder: Path) -> bool:
    """Whether a folder holds one of our checkpoints or bundles."""
    return (folder / DESCRIPTION).is_file() or is_bundle(folder) or is_portable(folder)


def _open_ours(folder):
    program = None
    if is_bundle(folder):
        model, variables, about, program, notes = open_bundle(folder)
    elif (folder / DESCRIPTION).is_file():
        (model, variables, about), notes = load_model(folder), ()
    else:
        (model, variables, about), notes = read_portable(folder), ()
    if model_task(model) != "classification":
        raise ValueError(
            f"{folder} holds a {model.variant}, which renders views; use it with `shiftaddvit nvs`"
        )
    names = about.get("class_names")
    if names is not None and len(names) != model.num_classes:
        raise ValueError(f"{folder} names {len(names)} classes, and its model has {model.num_classes}")
    names, note = _class_names(names and tuple(map(str, names)), model.num_classes)
    preprocessing = Preprocessing.from_dict(about["preprocessing"])
    notes = (*notes, *note)
    return Source(str(folder), model, variables, preprocessing, names, notes, about, program, folder)


def _read_configs(file):
    """What ``config.json`` and ``preprocessor_config.json`` beside ``file`` say; None for what lacks."""
    path, processor = (file.parent / name for name in ("config.json", "preprocessor_config.json"))
    config = read_config(path)
    preprocessing = None
    found = read_config(processor)
    if found is not None:
        preprocessing = from_transformers(found)
    if config is None:
        return None, preprocessing
    if "preprocessing" in config:  # ours, and exact
        preprocessing = Preprocessing.from_dict(config["preprocessing"])
    if "architecture" in config:
        pretrained = config.get("pretrained_cfg")
        if preprocessing is None and pretrained:
            preprocessing = from_timm(pretrained)
        return describe_timm(config, path), preprocessing
    if "model_type" in config:
        return describe_transformers(config, path), preprocessing
    raise ValueError(
        f"{path} is neither transformers' (model_type) nor timm's (architecture); move it away, and name the "
        "model"
    )


def _image_size(model, preprocessing, described_size, asked_size, file):
    """The side of the model's images: what was asked for, or what the preprocessing makes."""
    has_positions = described_size is not None and hasattr(model, "interpolation")
    if asked_size is not None:
        return asked_size
    if has_positions and described_size != (preprocessing.size,) * 2:
        height, width = described_size
        raise ValueError(
            f"{file.parent}: config.json has position embeddings for {height} x {width} pixels, and the "
            f"preprocessing makes {preprocessing.size} x {preprocessing.size}; choose with image_size"
        )
    return preprocessing.size


def _class_names(names, classes):
    """``names`` if there is one for each class, else ImageNet's or numbers; and a note on that."""
    if not classes:
        return (), ()
    if names is not None and len(names) == classes:
        return tuple(names), ()
    if classes == IMAGENET_CLASSES:
        return imagenet_classes(), ("nothing names the 1,000 classes: taken for ImageNet's",)
    return _numbers(classes), ("nothing names the classes: numbers",)


def _numbers(classes):
    return tuple(map(str, range(classes)))
