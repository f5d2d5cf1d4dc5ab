"""Weights that others trained: finding, reading and converting them, and writing ours for others."""

import json
import logging
import math
import pickle
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree
from safetensors import SafetensorError
from safetensors.flax import load_file
from safetensors.numpy import save_file

from shiftaddvit_jax.checkpoints.layouts import (
    LAYOUTS,
    TRANSFORMERS,
    Layout,
    export_parameter,
    import_parameter,
)
from shiftaddvit_jax.files import whole_file
from shiftaddvit_jax.models.position import resize_position_embeddings
from shiftaddvit_jax.models.variables import init_named, variable_shapes
from shiftaddvit_jax.optional import require

logger = logging.getLogger(__name__)

FILES = ("model.safetensors", "pytorch_model.bin")
SOFTMAX_ATTENTION = ("msa", "sra", "linear_sra")
HEADS = ("head", "head_dist")


def load_pretrained(model: nn.Module, path_or_name: str | Path, *, strict: bool = False) -> PyTree:
    """``model``'s variables with the weights of a checkpoint that transformers, timm or the authors made.

    The names of the tensors tell the source. Position embeddings of another image size are interpolated to
    the model's. A head for another number of classes is drawn anew, with a warning.

    Transformers' DeiT without a teacher has a distillation token but one head alone. The model's two heads
    become twice that head and zero: the logits are the same.

    Args:
      model: the original, dense model from `create_model`; `reparameterize` comes after.
      path_or_name: a ``.safetensors`` file; a PyTorch file (``.pth``, ``.pt``, ``.bin``; needs PyTorch, and
        nothing but tensors is unpickled); a folder with ``model.safetensors`` or ``pytorch_model.bin``; or a
        name to download, ``hf:ORG/NAME`` or ``timm:NAME``.
      strict: make another number of classes an error.

    Raises:
      ValueError: nothing that can be read or downloaded; a checkpoint of unknown source or of another
        family; a tensor that is missing, unexpected or of another shape (with its name).
    """
    _check_dense(model)
    file = find_weights(path_or_name)
    tensors = read_tensors(file)
    layout = _recognise(tensors, file)
    if not isinstance(model, layout.model):
        raise ValueError(
            f"{file} holds a {layout.model.__name__} ({layout.source}), but {model.variant} is a "
            f"{type(model).__name__}; create a model of that family"
        )
    _warn_of_epsilon(model, file)
    leaves: dict[str, Any] = flatten_dict(variable_shapes(model)["params"], sep="/")
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    tensors = _prepare(tensors, model, shapes, layout)
    anew = [] if strict else _heads_to_draw(tensors, shapes, layout)
    _check_tensors(tensors, shapes, anew, layout, file)
    params = {
        name: import_parameter(name, shape, [tensors[key] for key in layout.tensors(name)])
        for name, shape in shapes.items()
        if name not in anew
    }
    if anew:
        logger.warning("%s has another number of classes: %s drawn anew", file, ", ".join(anew))
        drawn = init_named(model, [f"params/{name}" for name in anew], jax.random.key(0))
        params |= {name.removeprefix("params/"): value for name, value in drawn.items()}
    return {"params": jax.tree.map(jax.numpy.asarray, unflatten_dict(params, sep="/"))}


def save_safetensors(variables: PyTree, path: str | Path) -> None:
    """Write a dense model's parameters whole or not at all, as ``.safetensors`` with transformers' names.

    Weights alone: the numbers of layers and heads are in no tensor, so other tools need their own config.

    Raises:
      ValueError: parameters that transformers' models do not have, or a path that cannot be written.
    """
    params = {name: np.asarray(leaf) for name, leaf in flatten_dict(variables["params"], sep="/").items()}
    lacking = [[name for name in params if not layout.tensors(name)] for layout in TRANSFORMERS]
    layout, foreign = min(zip(TRANSFORMERS, lacking, strict=True), key=lambda pair: len(pair[1]))
    foreign += [name for name in variables if name != "params"]
    if foreign:
        shown = ", ".join(foreign[:4]) + (", ..." if len(foreign) > 4 else "")
        raise ValueError(
            f"transformers' models have no {shown}; only dense models with softmax attention can be written"
        )
    tensors = {}
    for name, value in params.items():
        tensors |= export_parameter(name, value, layout)
    tensors = {key: np.ascontiguousarray(tensor) for key, tensor in tensors.items()}
    try:
        with whole_file(path) as temporary:
            save_file(tensors, temporary, metadata={"format": "pt"})
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be written: {_first_line(error)}") from None


def find_weights(path_or_name: str | Path) -> Path:
    """The file that ``path_or_name`` stands for, see `load_pretrained`; downloaded if need be."""
    name = str(path_or_name)
    for prefix, repository in (("hf:", "{}"), ("timm:", "timm/{}")):
        if name.startswith(prefix):
            return _download(repository.format(name.removeprefix(prefix)))
    path = Path(path_or_name).expanduser()
    if path.is_file():
        return path
    if path.is_dir():
        found = [path / file for file in FILES if (path / file).is_file()]
        if found:
            return found[0]
        raise ValueError(f"{path} has neither {' nor '.join(FILES)}; name the file itself")
    raise ValueError(f"no file or folder {path}; to download weights, write hf:ORG/NAME or timm:NAME")


def read_tensors(file: Path) -> dict[str, np.ndarray]:
    """The tensors of a ``.safetensors`` or PyTorch file by their names, in float32.

    Raises:
      ValueError: a file that is damaged or holds something else, or PyTorch missing where it is needed.
    """
    if file.suffix == ".safetensors":
        try:
            tensors = load_file(file)
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} is not a whole safetensors file: {_first_line(error)}") from None
        return {name: np.asarray(tensor, np.float32) for name, tensor in tensors.items()}
    require("peers", f"{file} is a PyTorch file, no .safetensors one; reading it", "torch")
    import torch

    try:
        found = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, EOFError, RuntimeError, pickle.UnpicklingError) as error:
        raise ValueError(
            f"{file} is not a whole PyTorch file of tensors alone: {_first_line(error)}"
        ) from None
    for wrapper in ("model", "state_dict"):  # DeiT's authors, and timm's training script
        if isinstance(found, dict) and isinstance(found.get(wrapper), dict):
            found = found[wrapper]
    if not isinstance(found, dict) or not all(isinstance(value, torch.Tensor) for value in found.values()):
        raise ValueError(f"{file} does not hold a dictionary of tensors; save the model's state_dict() alone")
    return {name: tensor.float().numpy() for name, tensor in found.items()}


def _download(repository: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    for file in FILES:
        try:
            return Path(hf_hub_download(repository, file))
        except LocalEntryNotFoundError:
            raise ValueError(
                f"cannot download {repository}: no connection to the Hub, and the cache does not have it; "
                "download it elsewhere and name the folder"
            ) from None
        except RepositoryNotFoundError:
            raise ValueError(f"there is no public repository {repository}; check its spelling") from None
        except EntryNotFoundError:
            continue
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ValueError(f"cannot download {repository}: {_first_line(error)}") from None
    raise ValueError(
        f"{repository} has neither {' nor '.join(FILES)}; download another file of it and name that"
    )


def _check_dense(model):
    kinds = {*model.mlp, *model.projections}
    if kinds != {"dense"} or not set(model.attention) <= set(SOFTMAX_ATTENTION):
        raise ValueError(
            f"pretrained weights are for dense models with softmax attention, but this {model.variant} has "
            f"attention {', '.join(model.attention)} and {', '.join(sorted(kinds))} layers; load them into "
            f"create_model({model.variant!r}), then reparameterize"
        )


def _recognise(tensors: dict[str, np.ndarray], file: Path) -> Layout:
    for layout in LAYOUTS:
        if layout.marker in tensors:
            return layout
    shown = ", ".join(sorted(tensors)[:3])
    raise ValueError(
        f"{file} is no PVT, PVTv2, ViT or DeiT classifier of transformers, timm or the authors; its tensors: "
        f"{shown}, ..."
    )


def _warn_of_epsilon(model, file):
    config = file.with_name("config.json")
    try:
        epsilon = json.loads(config.read_text()).get("layer_norm_eps")
    except (OSError, ValueError, AttributeError):
        return
    mine = model.layer_norm_eps or 1e-6
    if isinstance(epsilon, float) and epsilon != mine:
        logger.warning(
            "%s says layer_norm_eps %g and the model has %g; for equal logits, "
            "create_model(..., layer_norm_eps=%g)",
            config,
            epsilon,
            mine,
            epsilon,
        )


def _prepare(tensors, model, shapes, layout):
    """``tensors`` with a head for each of the model's, and position embeddings of the model's size."""
    tensors = dict(tensors)
    if "deit.embeddings.distillation_token" in tensors and "classifier.weight" in tensors:
        for leaf in ("weight", "bias"):
            head = tensors.pop(f"classifier.{leaf}")
            tensors[f"cls_classifier.{leaf}"] = 2 * head
            tensors[f"distillation_classifier.{leaf}"] = np.zeros_like(head)
    for name, shape in shapes.items():
        if not name.endswith("pos_embed"):
            continue
        (key,) = layout.tensors(name)
        found = tensors.get(key)
        if found is None or found.ndim != 3 or found.shape[-1] != shape[-1]:
            continue
        # A square grid, and at most two tokens before it.
        side, new_side = math.isqrt(found.shape[1]), math.isqrt(shape[0])
        if found.shape[1] - side**2 == shape[0] - new_side**2:
            resized = resize_position_embeddings(
                found[0], (side, side), (new_side, new_side), model.interpolation
            )
            tensors[key] = np.asarray(resized)[None]
    return tensors


def _heads_to_draw(tensors, shapes, layout):
    """The parameters of our heads whose tensors are for another number of classes."""
    return [
        name
        for name, shape in shapes.items()
        if name.split("/")[0] in HEADS
        and any(len(tensors[key]) != shape[-1] for key in layout.tensors(name) if key in tensors)
    ]


def _check_tensors(tensors, shapes, anew, layout, file):
    """Raise a ``ValueError`` that names the tensors that are missing, unexpected or of another shape."""
    expected = {}
    for name, shape in shapes.items():
        blank = np.broadcast_to(np.float32(0), shape)
        expected |= {key: tensor.shape for key, tensor in export_parameter(name, blank, layout).items()}
    ignored = {key for name in anew for key in layout.tensors(name)}
    differences = [f"nothing there is the model's {name}" for name in shapes if not layout.tensors(name)]
    differences += [f"{key} is missing" for key in expected if key not in tensors]
    differences += [f"{key} is unexpected" for key in tensors if key not in expected]
    differences += [
        f"{key} has shape {tensors[key].shape} instead of {shape}"
        for key, shape in expected.items()
        if key in tensors and key not in ignored and tensors[key].shape != shape
    ]
    if differences:
        shown = "; ".join(differences[:4]) + ("; ..." if len(differences) > 4 else "")
        raise ValueError(f"{len(differences)} tensors of {file} do not fit: {shown}")


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
