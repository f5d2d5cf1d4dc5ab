"""What a run begins with: the whole config, a model with its variables and pixels, and a teacher."""

import dataclasses
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import ml_collections
from jaxtyping import PRNGKeyArray, PyTree

from shiftaddvit_jax.checkpoints.source import Source, is_named, open_source, our_folder
from shiftaddvit_jax.data.identity import class_difference
from shiftaddvit_jax.files import read_latencies, read_layers
from shiftaddvit_jax.heads import replace_head
from shiftaddvit_jax.models import (
    Preprocessing,
    create_model,
    init_variables,
    model_arguments,
    model_preprocessing,
)
from shiftaddvit_jax.models.kinds import parse_kinds
from shiftaddvit_jax.nn.kernels import is_packed
from shiftaddvit_jax.reparameterize import reparameterize
from shiftaddvit_jax.train.config import DEFAULTS, check_config, filled, is_file

logger = logging.getLogger(__name__)

KINDS = ("attention", "mlp", "projections")
DRAWN = ("performer_features", "rotation")  # settings of what is drawn at random, and is not trained
ORIGINAL = ("msa", "sra", "linear_sra", "dense")  # kinds of models before they are reparameterized


@dataclass(frozen=True)
class Start:
    """What a run begins with.

    Attributes:
      config: with nothing left open.
      model: what is trained.
      variables: its own before the first step; None where they are in the run's checkpoints.
      preprocessing: the pixels that it expects; None of a model that renders views.
    """

    config: ml_collections.ConfigDict
    model: nn.Module
    variables: PyTree
    preprocessing: Preprocessing | None

    def describe(self) -> dict[str, Any]:
        """What `resume` needs of it, in types that JSON can hold."""
        return {
            "model": model_arguments(self.model),
            "preprocessing": {} if self.preprocessing is None else dataclasses.asdict(self.preprocessing),
        }


def begin(config: ml_collections.ConfigDict, class_names: tuple[str, ...]) -> Start:
    """The start of a new run: random, or what ``init_from`` names, reparameterized as the config says.

    Raises:
      ValueError: nothing that can be read there, or another model than the config and the data describe.
    """
    key = jax.random.key(config.seed)
    if not config.init_from:
        config = filled(config, DEFAULTS)
        model = _model(config, class_names)
        return Start(config, model, init_variables(model, key), model_preprocessing(model))
    teacher = _open(config.init_from, "init_from", config.model.name)
    settings = {**model_settings(teacher.model), "data.image_size": teacher.model.image_size}
    config = filled(filled(config, settings), DEFAULTS)
    model, variables = _with_head(teacher, config, class_names, key)
    asked = _model(config, class_names)
    for field in ("variant", "num_classes", "image_size"):
        if getattr(model, field) != getattr(asked, field):
            raise ValueError(
                f"the checkpoint {config.init_from} has {field} {getattr(model, field)}, but the config "
                f"asks for {getattr(asked, field)}"
            )
    _warn_of_changes_back(model, asked)
    student, variables = as_asked(config, asked, model, variables, key)
    return Start(config, student, variables, teacher.preprocessing)


def as_asked(
    config: ml_collections.ConfigDict,
    asked: nn.Module,
    model: nn.Module,
    variables: PyTree,
    key: PRNGKeyArray,
) -> tuple[nn.Module, PyTree]:
    """``model``, reparameterized to the kinds and with the settings that ``asked`` has from the config."""
    kept = {name: getattr(model.primitives, name) for name in ("dtype", "layers", *DRAWN)}
    rates = {name: getattr(asked, name) for name in ("dropout", "drop_path") if hasattr(asked, name)}
    model = model.clone(primitives=dataclasses.replace(asked.primitives, **kept), **rates)
    drawn: dict[str, Any] = {name: config.model[name] for name in DRAWN}
    layers = dict(config.model.layers) or None
    return reparameterize(model, variables, **_kinds(config), **drawn, layers=layers, key=key)


def resume(config: ml_collections.ConfigDict, began: Mapping[str, Any]) -> Start:
    """The start of a run from what `Start.describe` said of it, without variables.

    Raises:
      ValueError: it is no such description.
    """
    try:
        model, pixels = create_model(**began["model"]), Preprocessing.from_dict(began["preprocessing"])
    except (TypeError, KeyError) as error:
        raise ValueError(f"the workdir's run.json does not describe a model: {error}") from None
    return Start(config, model, None, pixels)


def open_teacher(
    config: ml_collections.ConfigDict, start: Start, class_names: tuple[str, ...]
) -> Source | None:
    """What the run distills from; None if the config names nothing.

    Raises:
      ValueError: nothing that can be read there, or a teacher of other classes or pixels.
    """
    settings = config.distillation
    if not settings.teacher:
        return None
    teacher = _open(settings.teacher, "distillation.teacher")
    if found := _class_difference(teacher, class_names):
        raise ValueError(f"the teacher {settings.teacher} knows other classes than the data's: {found}")
    if teacher.preprocessing != start.preprocessing:
        raise ValueError(
            f"the teacher {settings.teacher} expects other pixels than the student: {teacher.preprocessing}, "
            f"not {start.preprocessing}"
        )
    return teacher


def with_files_read(config: ml_collections.ConfigDict) -> ml_collections.ConfigDict:
    """``config`` with files of latencies and layers replaced by what they hold, which a resumed run keeps."""
    read = {("train", "latencies"): read_latencies, ("model", "layers"): read_layers}
    named = [(group, name) for group, name in read if is_file(config[group][name])]
    if not named:
        return config
    config = config.copy_and_resolve_references()
    for group, name in named:
        config[group][name] = tuple(read[group, name](config[group][name][0]).items())
    check_config(config)
    return config


def _open(name, key, variant=""):
    """What ``name`` names; weights with nothing beside them are of ``variant``."""
    source = open_source(name, model=None if our_folder(name) else variant or None)
    if is_packed(source.variables["params"]):
        raise ValueError(f"the checkpoint {name} is packed, for inference; config.{key} needs the original")
    return source


def _with_head(teacher, config, class_names, key):
    """The teacher's model and variables, with a new head where the config asks for one."""
    if config.model.new_head:
        return replace_head(teacher.model, teacher.variables, len(class_names), key)
    found = _class_difference(teacher, class_names)
    if found:
        raise ValueError(
            f"the checkpoint {config.init_from} was trained on other classes than the data's: {found}; "
            "rename the class folders, or give it a new head by config.model.new_head=True"
        )
    return teacher.model, teacher.variables


def _class_difference(teacher, class_names):
    """What became of the teacher's classes; where it does not name them, the log says what is assumed."""
    if not is_named(teacher):
        if len(teacher.class_names) == len(class_names):
            logger.warning("%s does not name its classes; taken for those of the data", teacher.name)
            return None
        return f"{len(teacher.class_names)} without names, and {len(class_names)} in the data"
    return class_difference(teacher.class_names, class_names)


def _model(config, class_names):
    """The model that the config describes, for the data's classes."""
    settings = asked_settings(config)
    return create_model(**settings, num_classes=len(class_names), image_size=config.data.image_size)


def asked_settings(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The arguments of `create_model` that the config has."""
    settings: dict[str, Any] = {**config.model.to_dict(), **_kinds(config)}
    del settings["new_head"]
    settings["layers"] = dict(settings["layers"])
    return settings


def model_settings(model: nn.Module) -> dict[str, Any]:
    """What a config leaves open, by its keys, as ``model`` has it."""
    primitives = (
        "weight_bits",
        "weight_terms",
        "activations",
        "threshold",
        "precision",
        "attention_precision",
        *DRAWN,
    )
    return {
        "model.name": model.variant,
        **{f"model.{kinds}": ",".join(getattr(model, kinds)) for kinds in KINDS},
        **{f"model.{name}": getattr(model.primitives, name) for name in primitives},
    }


def _warn_of_changes_back(teacher, student):
    """Say where the config undoes what a reparameterization has done."""
    for name in KINDS:
        stages = zip(getattr(teacher, name), getattr(student, name), strict=True)
        undone = sorted({f"{old} to {new}" for old, new in stages if old not in ORIGINAL and new in ORIGINAL})
        if undone:
            logger.warning(
                "config.model.%s changes the checkpoint's model back: %s; leave it open to keep its kinds",
                name,
                ", ".join(undone),
            )


def _kinds(config) -> dict[str, Any]:
    return {name: parse_kinds(config.model[name]) for name in KINDS}
