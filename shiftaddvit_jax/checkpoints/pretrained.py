"""Weights that others trained, converted into ours, and ours written for others."""

import json
import logging
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree
from safetensors import SafetensorError
from safetensors.numpy import save_file

from shiftaddvit_jax.checkpoints.architectures import check_architecture, foreign_feature
from shiftaddvit_jax.checkpoints.configs import check_config
from shiftaddvit_jax.checkpoints.find import find_weights
from shiftaddvit_jax.checkpoints.layouts import (
    LAYOUTS,
    TRANSFORMERS,
    TRANSFORMERS_IN_MEMORY,
    Layout,
    export_parameter,
    import_parameter,
)
from shiftaddvit_jax.checkpoints.weights import (
    first_line,
    of_other_kind,
    printable,
    read_tensors,
)
from shiftaddvit_jax.files import read_object, whole_file
from shiftaddvit_jax.models.pyramid import SIDES
from shiftaddvit_jax.models.registry import linear_kinds
from shiftaddvit_jax.models.variables import HEADS, init_named, variable_shapes
from shiftaddvit_jax.models.vit import VisionTransformer
from shiftaddvit_jax.nn.kernels import is_packed
from shiftaddvit_jax.nn.position import resize_position_embeddings
from shiftaddvit_jax.pack import shift_layers

logger = logging.getLogger(__name__)

SOFTMAX_ATTENTION = ("msa", "sra", "linear_sra")
# What DistributedDataParallel, torch.compile and classes around a model put before its names.
_PREFIX = re.compile(r"([A-Za-z_]\w*[./])*")


def load_pretrained(
    model: nn.Module,
    path_or_name: str | Path,
    *,
    strict: bool = False,
    entry: str | None = None,
    trained_size: tuple[int, int] | None = None,
) -> PyTree:
    """``model``'s variables with the weights of a checkpoint that transformers, timm or the authors made.

    The names of the tensors tell the source, whatever prefix they share (``module.``, ``backbone.``, ...).
    Position embeddings of another image size are interpolated to the model's. A head for another number of
    classes is drawn anew, and so is one that the checkpoint lacks, with a warning. A model without a head
    leaves the checkpoint's alone.

    Transformers' DeiT without a teacher has a distillation token but one head alone. The model's two heads
    become twice that head and zero: the logits are the same.

    A ``config.json`` of transformers or timm beside the weights must not contradict the model.

    Args:
      model: the original, dense model from `create_model`; `reparameterize` comes after.
      path_or_name: a file of safetensors, of PyTorch (needs it; nothing but tensors is unpickled) or of
        Google's ViTs (``.npz``); an index of shards; a folder with ``model.safetensors`` or
        ``pytorch_model.bin``, whole or in shards; or a name to download, ``hf:ORG/NAME`` or ``timm:NAME``.
      strict: make another number of classes, or none, an error.
      entry: of a training checkpoint, the entry to take. By default that with the plain weights, or DINO's
        ``"teacher"``; an average (``"model_ema"``, ``"state_dict_ema"``) only if there is nothing else. The
        log says what lies beside it.
      trained_size: height and width in pixels of the images that the checkpoint was trained on. Position
        embeddings don't say it; by default their grid is taken for a square.

    Raises:
      ValueError: nothing that can be read or downloaded; a checkpoint of unknown source, of another family
        or with parts that the model lacks; a tensor that is missing, unexpected, of another shape or dtype,
        NaN or infinite (with its name); position embeddings of another grid; a config that says something
        else than the model (with the field).
    """
    weights = read_weights(path_or_name, entry=entry)
    path = weights.file.with_name("config.json")
    config = read_config(path)
    if config is not None and isinstance(model, weights.layout.model):
        check_config(config, model, path)
    return import_weights(model, weights, strict=strict, trained_size=trained_size)


class Weights(NamedTuple):
    """Tensors, recognised.

    Attributes:
      file: where they were read.
      layout: whose names they have.
      tensors: they by these names, without a prefix.
    """

    file: Path
    layout: Layout
    tensors: dict[str, np.ndarray]

    @property
    def num_classes(self) -> int:
        """The number of classes that a head of theirs is for; 0 without a head."""
        heads = ("classifier.bias", *(key for head in HEADS for key in self.layout.tensors(f"{head}/bias")))
        return next((len(self.tensors[key]) for key in heads if key in self.tensors), 0)


def read_weights(path_or_name: str | Path, *, entry: str | None = None) -> Weights:
    """The weights that ``path_or_name`` stands for; arguments and errors are those of `load_pretrained`."""
    file = find_weights(path_or_name)
    return Weights(file, *_recognise(read_tensors(file, entry=entry), file))


def import_weights(
    model: nn.Module,
    weights: Weights,
    *,
    strict: bool = False,
    trained_size: tuple[int, int] | None = None,
) -> PyTree:
    """``model``'s variables with ``weights``; arguments and errors are those of `load_pretrained`."""
    _check_dense(model)
    file, layout, tensors = weights
    if not isinstance(model, layout.model):
        raise ValueError(
            f"{file} holds a {layout.model.__name__} ({layout.source}), but {model.variant} is a "
            f"{type(model).__name__}; create a model of that family"
        )
    leaves: dict[str, Any] = flatten_dict(variable_shapes(model)["params"], sep="/")
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    tensors = _join_heads(_double_head(tensors), model, layout, file)
    if not model.num_classes:
        heads = {
            key for head in HEADS for leaf in ("kernel", "bias") for key in layout.tensors(f"{head}/{leaf}")
        }
        tensors = {key: tensor for key, tensor in tensors.items() if key not in heads}
    expected = expected_tensors(shapes, layout)
    check_architecture(tensors, expected, model, layout, file)
    for name in expected.keys() & tensors.keys():
        if tensors[name].dtype != np.float32:
            raise ValueError(of_other_kind(name, tensors[name].dtype, file))
    tensors = _fit_positions(tensors, model, shapes, layout, trained_size, file)
    anew, why = ([], "") if strict else _heads_to_draw(tensors, shapes, expected, layout)
    check_tensors(tensors, shapes, expected, anew, layout, file, model)
    params = {
        name: import_parameter(name, shape, [tensors[key] for key in layout.tensors(name)], layout)
        for name, shape in shapes.items()
        if name not in anew
    }
    if anew:
        logger.warning("%s has %s: %s drawn anew", file, why, ", ".join(anew))
        drawn = init_named(model, [f"params/{name}" for name in anew], jax.random.key(0))
        params |= {name.removeprefix("params/"): value for name, value in drawn.items()}
    return {"params": jax.tree.map(jax.numpy.asarray, unflatten_dict(params, sep="/"))}


def save_safetensors(model: nn.Module, variables: PyTree, path: str | Path) -> None:
    """Write a model's parameters whole or not at all, as ``.safetensors`` with transformers' names.

    Transformers' models with these weights have the model's logits: those of shift layers are written as the
    powers of two that the model computes with. Weights alone: the numbers of layers and heads are in no
    tensor, so other tools need their own config.

    Args:
      model: of dense and shift layers, with softmax attention.
      variables: its variables, not packed.
      path: where the file goes.

    Raises:
      ValueError: mixtures of experts, other attentions, quantized activations, or parameters that
        transformers' models do not have; packed variables; or a path that cannot be written.
    """
    _check_writable(model, variables)
    flat: dict[tuple[str, ...], Any] = flatten_dict(variables["params"])
    if "shift" in linear_kinds(model):
        for layer, shift in shift_layers(model).items():
            params = {"kernel": flat[(*layer, "kernel")]}
            flat[(*layer, "kernel")] = shift.apply({"params": params}, method="weight")
    params = {"/".join(path): np.asarray(leaf) for path, leaf in flat.items()}
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
        raise ValueError(f"{path} cannot be written: {first_line(error)}") from None


def _check_writable(model, variables):
    kinds = linear_kinds(model)
    foreign = [
        f"attention {kind}" for kind in dict.fromkeys(model.attention) if kind not in SOFTMAX_ATTENTION
    ]
    foreign += ["mixtures of experts (moe)"] if "moe" in kinds else []
    activations = model.primitives.activations
    foreign += [f"{activations} activations"] if "shift" in kinds and activations != "float" else []
    if foreign:
        raise ValueError(
            f"transformers has no {', '.join(foreign)}, as this {model.variant} has; only dense and shift "
            "layers with softmax attention can be written, and save_model writes every model"
        )
    if is_packed(variables["params"]):
        raise ValueError("the variables are packed; write those that they were packed from")


def _check_dense(model):
    kinds = linear_kinds(model)
    if kinds != {"dense"} or not set(model.attention) <= set(SOFTMAX_ATTENTION):
        raise ValueError(
            f"pretrained weights are for dense models with softmax attention, but this {model.variant} has "
            f"attention {', '.join(model.attention)} and {', '.join(sorted(kinds))} layers; load them into "
            f"create_model({model.variant!r}), then reparameterize"
        )


def _recognise(tensors: dict[str, np.ndarray], file: Path) -> tuple[Layout, dict[str, np.ndarray]]:
    """The layout that ``tensors`` have, and they by its names, without what all models around it add."""
    found: dict[str, Layout] = {}
    base = ""
    for layout in LAYOUTS:
        for prefix in _prefixes(layout.marker, tensors):
            found.setdefault(prefix, layout)
    # Transformers' models without a head lack what those with one call them.
    for layout in () if found else (*TRANSFORMERS, *TRANSFORMERS_IN_MEMORY):
        for prefix in _prefixes(layout.marker.partition(".")[2], tensors):
            distilled = f"{prefix}embeddings.distillation_token" in tensors
            if layout.model is not VisionTransformer or distilled == ("dist_token" in layout.names):
                found.setdefault(prefix, layout)
    if not found:
        foreign = foreign_feature(tensors)
        shown = ", ".join(printable(name) for name in sorted(tensors)[:3])
        raise ValueError(
            f"{file} is no PVT, PVTv2, ViT or DeiT classifier of transformers, timm or the authors"
            + (f": it has {foreign}" if foreign else "")
            + f"; its tensors: {shown}, ..."
        )
    if len(found) > 1:
        shown = " and ".join(f"{prefix}*" for prefix in sorted(found))
        raise ValueError(
            f"{file} holds {len(found)} models, {shown}; name one: "
            f"load_pretrained(..., entry={max(found)[:-1]!r})"
        )
    ((prefix, layout),) = found.items()
    if f"{prefix}{layout.marker}" not in tensors:
        base = layout.marker.partition(".")[0] + "."
    if prefix:
        logger.info("%s: took %s from the names of its tensors", file, prefix)
    renamed: dict[str, np.ndarray] = {}
    for name, tensor in tensors.items():
        ours = base + name.removeprefix(prefix) if name.startswith(prefix) else name
        # The pooler that transformers' models without a head have, for which no classifier has a use.
        if base and re.fullmatch(r"\w+\.pooler\.dense\.(weight|bias)", ours):
            continue
        if ours in renamed:
            raise ValueError(f"{file} has {printable(ours)} with and without {prefix}; keep one of them")
        renamed[ours] = tensor
    return layout, renamed


def _prefixes(marker: str, tensors: Mapping[str, np.ndarray]) -> list[str]:
    """What comes before ``marker`` in the names of ``tensors``."""
    starts = [name.removesuffix(marker) for name in tensors if name.endswith(marker)]
    return [start for start in starts if _PREFIX.fullmatch(start)]


def read_config(file: Path) -> dict[str, Any] | None:
    """The object of JSON in ``file``, None if there is no such file.

    Raises:
      ValueError: a file that is damaged or holds something else.
    """
    try:
        return read_object(file)
    except FileNotFoundError:
        return None
    except (OSError, UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{file} is not a whole JSON file: {first_line(error)}") from None


def expected_tensors(shapes: Mapping[str, tuple[int, ...]], layout: Layout) -> dict[str, tuple[int, ...]]:
    """The shapes of ``layout``'s tensors for our parameters."""
    expected = {}
    for name, shape in shapes.items():
        blank = np.broadcast_to(np.float32(0), shape)
        expected |= {key: tensor.shape for key, tensor in export_parameter(name, blank, layout).items()}
    return expected


def _double_head(tensors):
    """``tensors`` with two heads where transformers' DeiT has one, see `load_pretrained`."""
    tensors = dict(tensors)
    if "deit.embeddings.distillation_token" in tensors:
        for leaf in ("weight", "bias"):
            head = tensors.pop(f"classifier.{leaf}", None)
            if head is not None:
                tensors[f"cls_classifier.{leaf}"] = 2 * head
                tensors[f"distillation_classifier.{leaf}"] = np.zeros_like(head)
    return tensors


def _join_heads(tensors, model, layout, file):
    """``tensors`` with one axis for the heads and their channels, which Flax's attentions have apart."""
    if not layout.flax:
        return tensors
    joined = {}
    for name, tensor in tensors.items():
        found = re.search(r"MultiHeadDotProductAttention_\d/(query|key|value|out)/(kernel|bias)$", name)
        at = 0 if found and (found[1] == "out" or found[2] == "bias") else 1
        if found and tensor.ndim == {"kernel": 3, "bias": 2}[found[2]]:
            if tensor.shape[at] != model.num_heads:
                raise ValueError(
                    f"{file} has {tensor.shape[at]} heads ({name} has shape {tensor.shape}), but "
                    f"{model.variant} has {model.num_heads}; create the variant that it is for"
                )
            tensor = tensor.reshape(*tensor.shape[:at], -1, *tensor.shape[at + 2 :])
        joined[name] = tensor
    return joined


def _fit_positions(tensors, model, shapes, layout, trained_size, file):
    """``tensors`` with position embeddings of the model's size."""
    if trained_size is not None and (len(trained_size) != 2 or min(trained_size) < 1):
        raise ValueError(f"trained_size must be (height, width) in pixels, got {trained_size}")
    tensors = dict(tensors)
    for name, shape in shapes.items():
        if not name.endswith("pos_embed"):
            continue
        (key,) = layout.tensors(name)
        found = tensors.get(key)
        if found is None or found.ndim != 3 or found.shape[0] != 1 or found.shape[-1] != shape[-1]:
            continue
        stage = re.match(r"stage(\d)", name)
        pixels = SIDES[int(stage[1]) - 1] if stage else model.patch_size
        side = model.image_size // pixels
        others = shape[0] - side**2
        grid = _trained_grid(found.shape[1], others, pixels, trained_size, f"{key} of {file}")
        resized = resize_position_embeddings(found[0], grid, (side, side), model.interpolation)
        tensors[key] = np.asarray(resized)[None]
    return tensors


def _trained_grid(tokens, others, pixels, trained_size, what):
    """Rows and columns of position embeddings for ``tokens``, ``others`` of them before the grid."""
    if trained_size is None:
        grid = (math.isqrt(max(tokens - others, 0)),) * 2
        size, remedy = (
            "a square image",
            "name the size it was trained on: load_pretrained(..., trained_size=(H, W))",
        )
    else:
        grid = (trained_size[0] // pixels, trained_size[1] // pixels)
        size, remedy = f"{trained_size[0]} x {trained_size[1]} pixels", "check trained_size"
    if math.prod(grid) + others == tokens:
        return grid
    if others and math.isqrt(tokens) ** 2 == tokens:
        remedy = "position embeddings that leave out the class token are of another architecture"
    raise ValueError(
        f"{what} is for {tokens} tokens, and {size} has {math.prod(grid)} and {others} before them; {remedy}"
    )


def _heads_to_draw(tensors, shapes, expected, layout):
    """The parameters of our heads that the checkpoint lacks or has for another number of classes, and why."""
    heads = [name for name in shapes if name.split("/")[0] in HEADS]
    keys = [key for name in heads for key in layout.tensors(name)]
    if not any(key in tensors for key in keys):
        # Tensors without a place may be a head of another name.
        return (heads, "no head") if tensors.keys() <= expected.keys() else ([], "")
    classes = -1 if layout.flax else 0
    found = {tensors[key].shape[classes] if key in tensors and tensors[key].ndim else None for key in keys}
    wanted = {shapes[name][-1] for name in heads}
    # Tensors that don't agree are no head, and are told one by one.
    return (
        (heads, "another number of classes")
        if len(found) == 1 and found not in (wanted, {None})
        else ([], "")
    )


def check_tensors(
    tensors: Mapping[str, np.ndarray],
    shapes: Mapping[str, tuple[int, ...]],
    expected: Mapping[str, tuple[int, ...]],
    anew: Sequence[str],
    layout: Layout,
    file: Path,
    model: nn.Module,
) -> None:
    """Raise a ``ValueError`` that names the tensors that are missing, unexpected or of another shape."""
    ignored = {key for name in anew for key in layout.tensors(name)}
    differences = [f"nothing there is the model's {name}" for name in shapes if not layout.tensors(name)]
    differences += [f"{key} is missing" for key in expected if key not in tensors and key not in ignored]
    differences += [f"{printable(key)} is unexpected" for key in tensors if key not in expected]
    differences += [
        f"{key} has shape {tensors[key].shape} instead of {shape}"
        for key, shape in expected.items()
        if key in tensors and key not in ignored and tensors[key].shape != shape
    ]
    if differences:
        shown = "; ".join(differences[:4]) + ("; ..." if len(differences) > 4 else "")
        raise ValueError(
            f"{len(differences)} tensors of {file} do not fit: {shown}; expected the weights of a "
            f"{model.variant}, all of them and no others"
        )
