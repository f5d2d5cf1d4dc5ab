"""GNT's own weights."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from shiftaddvit_jax.checkpoints.layouts import Layout, import_parameter
from shiftaddvit_jax.checkpoints.pretrained import check_tensors, expected_tensors
from shiftaddvit_jax.checkpoints.weights import read_tensors
from shiftaddvit_jax.models.gnt import GeneralizableNerfTransformer
from shiftaddvit_jax.models.registry import linear_kinds
from shiftaddvit_jax.models.variables import variable_shapes

# The entries of a training checkpoint (https://github.com/VITA-Group/GNT, gnt/model.py).
ENTRIES = ("net_coarse", "feature_net")

_VIEW, _RAY, _IMAGES = "net_coarse.view_crosstrans.{b}", "net_coarse.view_selftrans.{b}", "feature_net"
_BLOCK = {"norm1": "attn_norm", "norm2": "ff_norm", "mlp/fc1": "ff.fc1", "mlp/fc2": "ff.fc2"}
_VIEW_BLOCK = _BLOCK | {
    "attn/q": "attn.q_fc",
    "attn/k": "attn.k_fc",
    "attn/v": "attn.v_fc",
    "attn/position/fc1": "attn.pos_fc.0",
    "attn/position/fc2": "attn.pos_fc.2",
    "attn/score/fc1": "attn.attn_fc.0",
    "attn/score/fc2": "attn.attn_fc.2",
    "attn/proj": "attn.out_fc",
}
_RAY_BLOCK = _BLOCK | {"attn/qkv": tuple(f"attn.{part}_fc" for part in "qkv"), "attn/proj": "attn.out_fc"}
_LAYER = {
    "conv1/conv": "conv1",
    "norm1": "bn1",
    "conv2/conv": "conv2",
    "norm2": "bn2",
    "shortcut/conv": "downsample.0",
    "shortcut_norm": "downsample.1",
}
_NAMES = {
    "embed/fc1": "net_coarse.rgbfeat_fc.0",
    "embed/fc2": "net_coarse.rgbfeat_fc.2",
    **{f"block{{B}}/view/{ours}": f"{_VIEW}.{theirs}" for ours, theirs in _VIEW_BLOCK.items()},
    "block{B}/mix/fc1": "net_coarse.q_fcs.{b}.0",
    "block{B}/mix/fc2": "net_coarse.q_fcs.{b}.2",
    **{
        f"block{{B}}/ray/{ours}": tuple(
            f"{_RAY}.{name}" for name in ((theirs,) if isinstance(theirs, str) else theirs)
        )
        for ours, theirs in _RAY_BLOCK.items()
    },
    "norm": "net_coarse.norm",
    "head": "net_coarse.rgb_fc",
    "image_features/conv1/conv": f"{_IMAGES}.conv1",
    "image_features/norm1": f"{_IMAGES}.bn1",
    **{
        f"image_features/layer{{S}}_{{B}}/{ours}": f"{_IMAGES}.layer{{S}}.{{b}}.{theirs}"
        for ours, theirs in _LAYER.items()
    },
    "image_features/upconv{S}/conv/conv": f"{_IMAGES}.upconv{{S}}.conv.conv",
    "image_features/upconv{S}/norm": f"{_IMAGES}.upconv{{S}}.conv.bn",
    "image_features/iconv{S}/conv/conv": f"{_IMAGES}.iconv{{S}}.conv",
    "image_features/iconv{S}/norm": f"{_IMAGES}.iconv{{S}}.bn",
    "image_features/out": f"{_IMAGES}.out_conv",
}
_WITHOUT_BIAS = ("q_fc.bias", "k_fc.bias", "v_fc.bias")
LAYOUT = Layout("GNT", GeneralizableNerfTransformer, "net_coarse.rgbfeat_fc.0.weight", _NAMES)


def load_gnt(model: nn.Module, file: str | Path) -> PyTree:
    """``model``'s variables with the weights of a checkpoint that GNT's own code wrote.

    GNT's queries, keys and values have no biases; the model's become zeros.

    Args:
      model: ``gnt`` or ``gnt_single`` from `create_model`, dense and with softmax attention.
      file: a ``.pth`` file with the entries ``net_coarse`` and ``feature_net``; nothing but tensors is
        unpickled.

    Raises:
      ValueError: a file that can't be read or lacks an entry; a model with other layers; tensors that are
        missing, unexpected or of another shape (with their names).
    """
    if linear_kinds(model) != {"dense"} or model.attention != ("msa",):
        raise ValueError(
            f"GNT's weights are for dense models with softmax attention, but this {model.variant} has other "
            f"layers; load them into create_model({model.variant!r}), then reparameterize"
        )
    file = Path(file).expanduser()
    tensors = {
        f"{entry}.{name}": tensor
        for entry in ENTRIES
        for name, tensor in read_tensors(file, entry=entry).items()
    }
    leaves: dict[str, Any] = flatten_dict(variable_shapes(model)["params"], sep="/")
    shapes = {name: leaf.shape for name, leaf in leaves.items()}
    expected = expected_tensors(shapes, LAYOUT)
    for name in expected:
        if name.endswith(_WITHOUT_BIAS):
            tensors.setdefault(name, np.zeros(expected[name], np.float32))
    check_tensors(tensors, shapes, expected, (), LAYOUT, file, model)
    params = {
        name: jnp.asarray(
            import_parameter(name, shape, [tensors[key] for key in LAYOUT.tensors(name)], LAYOUT)
        )
        for name, shape in shapes.items()
    }
    return {"params": jax.tree.map(jnp.asarray, unflatten_dict(params, sep="/"))}
