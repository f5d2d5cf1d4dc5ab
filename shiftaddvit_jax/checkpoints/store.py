"""A model in a folder: ``model.json`` says what it is, ``variables/`` holds its arrays (Orbax)."""

import json
from pathlib import Path
from typing import Any

import flax.linen as nn
from jaxtyping import PyTree

from shiftaddvit_jax.files import whole_folder, write_json
from shiftaddvit_jax.models import create_model, model_arguments
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
      about: further facts in types that JSON can hold, such as ``class_names``.

    Raises:
      ValueError: ``path`` exists and is not a checkpoint.
    """
    import orbax.checkpoint as ocp  # seconds

    path = Path(path).absolute()
    if path.exists() and not (path / DESCRIPTION).is_file():
        raise ValueError(f"{path} exists and is not a checkpoint; choose another folder")
    description = {"model": model_arguments(model), **(about or {})}
    if is_packed(variables["params"]):
        description["packed"] = True
    with whole_folder(path) as temporary:
        write_json(temporary / DESCRIPTION, description)
        with ocp.StandardCheckpointer() as checkpointer:
            checkpointer.save(temporary / "variables", variables)


def load_model(path: str | Path, model: nn.Module | None = None) -> tuple[nn.Module, PyTree, dict[str, Any]]:
    """Model, variables and description from a folder that `save_model` wrote.

    Args:
      path: the folder.
      model: the model that is expected; by default the one that the folder describes.

    Raises:
      ValueError: no such checkpoint, or parameters that are not the expected model's (with their names).
    """
    import orbax.checkpoint as ocp

    path = Path(path).absolute()
    try:
        description = json.loads((path / DESCRIPTION).read_text())
        saved = create_model(**description["model"])
    except FileNotFoundError:
        raise ValueError(
            f"no checkpoint at {path}: expected a folder with model.json and variables/"
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError) as error:
        raise ValueError(f"{path}/model.json does not describe a model: {error}") from None
    packed = description.get("packed", False)
    target = packed_shapes(saved) if packed else variable_shapes(saved)
    with ocp.StandardCheckpointer() as checkpointer:
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
