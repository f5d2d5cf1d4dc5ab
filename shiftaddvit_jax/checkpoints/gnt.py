"""GNT's own weights."""

from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from shiftaddvit_jax.checkpoints.layouts import Layout, import_parameter, within
from shiftaddvit_jax.checkpoints.pretrained import check_tensors, expected_tensors
from shiftaddvit_jax.checkpoints.weights import read_tensors
from shiftaddvit_jax.models.gnt import GeneralizableNerfTransformer
from shiftaddvit_jax.models.registry import linear_kinds
from shiftaddvit_jax.models.variables import variable_shapes

# The entries of a training checkpoint (https://github.com/VITA-Group/GNT, gnt/model.py).
ENTRIES = ("net_coarse", "feature_net")

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
_ENCODER = {
    "conv1/conv": "conv1",
    "norm1": "bn1",
    "upconv{S}/conv/conv": "upconv{S}.conv.conv",
    "upconv{S}/norm": "upconv{S}.conv.bn",
    "iconv{S}/conv/conv": "iconv{S}.conv",
    "iconv{S}/norm": "iconv{S}.bn",
    "out": "out_conv",
}
_NAMES = {
    "embed/fc1": "net_coarse.rgbfeat_fc.0",
    "embed/fc2": "net_coarse.rgbfeat_fc.2",
    **within("block{B}/view", "net_coarse.view_crosstrans.{b}", _VIEW_BLOCK),
    "block{B}/mix/fc1": "net_coarse.q_fcs.{b}.0",
    "block{B}/mix/fc2": "net_coarse.q_fcs.{b}.2",
    **within("block{B}/ray", "net_coarse.view_selftrans.{b}", _RAY_BLOCK),
    "norm": "net_coarse.norm",
    "head": "net_coarse.rgb_fc",
    **within("image_features", "feature_net", _ENCODER),
    **within("image_features/layer{S}_{B}", "feature_net.layer{S}.{b}", _LAYER),
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
        name: import_parameter(name, shape, [tensors[key] for key in LAYOUT.tensors(name)], LAYOUT)
        for name, shape in shapes.items()
    }
    return {"params": jax.tree.map(jnp.asarray, unflatten_dict(params, sep="/"))}
