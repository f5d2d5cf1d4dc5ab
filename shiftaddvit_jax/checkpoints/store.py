"""A model in a folder: ``model.json`` says what it is, ``variables/`` holds its arrays (Orbax).

``model.json`` has the model's arguments, the pixels that it expects, what else is known of it, and the
digests of the files in ``variables/``.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

import flax.linen as nn
from jaxtyping import PyTree

from shiftaddvit_jax.files import check_digests, file_digests, whole_folder, write_json
from shiftaddvit_jax.models import create_model, model_arguments, model_preprocessing
from shiftaddvit_jax.models.registry import model_task
from shiftaddvit_jax.models.variables import variable_shapes
from shiftaddvit_jax.nn.kernels import is_packed
from shiftaddvit_jax.pack import packed_shapes
from shiftaddvit_jax.reparameterize import check_variables

DESCRIPTION = "model.json"


def save_model(
    path: str | Path, model: nn.Module, variables: PyTree, about: dict[str, Any] | None = None
) -> None:
    """Write ``model`` and its variables into the folder ``path``, whole or not at all.

    Args:
      path: the folder; an existing checkpoint is replaced.
      model: from `create_model` or `reparameterize`.
      variables: the model's variables, packed (see `shiftaddvit_jax.pack`) or not.
      about: further facts in types that JSON can hold, such as ``class_names``, and ``preprocessing`` where
        it is not the one of the model's variant.

    Raises:
      ValueError: ``path`` exists and is not a checkpoint.
    """
    path = Path(path).resolve()
    if path.exists() and not (path / DESCRIPTION).is_file():
        raise ValueError(f"{path} exists and is not a checkpoint; choose another folder")
    description = {"model": model_arguments(model), **_pixels(model), **(about or {})}
    if is_packed(variables["params"]):
        description["packed"] = True
    with whole_folder(path) as temporary:
        with _checkpointer() as checkpointer:
            checkpointer.save(temporary / "variables", variables)
        description["digests"] = file_digests(temporary / "variables")
        write_json(temporary / DESCRIPTION, description)


def load_model(path: str | Path, model: nn.Module | None = None) -> tuple[nn.Module, PyTree, dict[str, Any]]:
    """Model, variables and description from a folder that `save_model` wrote.

    A classifier's description always has a ``preprocessing``: in folders of earlier versions, its variant's.

    Args:
      path: the folder.
      model: the model that is expected; by default the one that the folder describes.

    Raises:
      ValueError: no such checkpoint, files that are not what was written (with the first one's name), or
        parameters that are not the expected model's (with their names).
    """
    path = Path(path).absolute()
    try:
        description = json.loads((path / DESCRIPTION).read_text())
        saved = create_model(**description["model"])
    except FileNotFoundError:
        raise ValueError(
            f"no checkpoint at {path}: expected a folder with model.json and variables/, such as the demo's "
            "runs/demo/moe/model"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}/model.json does not describe a model: {error}") from None
    description = _pixels(saved) | description
    check_digests(path / "variables", description.pop("digests", {}))
    packed = description.get("packed", False)
    target = packed_shapes(saved) if packed else variable_shapes(saved)
    with _checkpointer() as checkpointer:
        try:
            variables = checkpointer.restore(path / "variables", target)
        except (FileNotFoundError, ValueError) as error:
            reason = str(error).splitlines()[0]
            advice = "; if an earlier version packed it, pack the original again" if packed else ""
            raise ValueError(
                f"{path}/variables does not hold what model.json describes{advice}: {reason}"
            ) from None
    if model is not None and packed and packed_shapes(model) != target:
        raise ValueError(f"{path} is packed for another model than the one expected; pack that one's own")
    if model is not None and not packed:
        check_variables(model, variables)
    return model or saved, variables, description


def _pixels(model):
    """The preprocessing of a classifier's variant, as descriptions have it."""
    if model_task(model) != "classification":
        return {}
    return {"preprocessing": dataclasses.asdict(model_preprocessing(model))}


def _checkpointer():
    """A checkpointer of this process alone, which waits for no others of a run."""
    import jax
    import orbax.checkpoint as ocp  # seconds

    if jax.process_count() == 1:
        return ocp.StandardCheckpointer()
    process = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(
        primary_host=process, active_processes={process}, barrier_sync_key_prefix=f"process{process}"
    )
    return ocp.StandardCheckpointer(multiprocessing_options=alone)
