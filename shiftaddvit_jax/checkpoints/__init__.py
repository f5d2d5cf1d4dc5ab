"""Models on disk: this project's, and those that others trained."""

from shiftaddvit_jax.checkpoints.bundle import export_bundle
from shiftaddvit_jax.checkpoints.hub import push_to_hub, save_pretrained
from shiftaddvit_jax.checkpoints.preprocessing import from_timm, from_transformers
from shiftaddvit_jax.checkpoints.pretrained import load_pretrained, save_safetensors
from shiftaddvit_jax.checkpoints.published import list_pretrained
from shiftaddvit_jax.checkpoints.source import Source, describe_source, open_source
from shiftaddvit_jax.checkpoints.store import load_model, save_model
from shiftaddvit_jax.checkpoints.to_onnx import save_onnx

__all__ = [
    "Source",
    "describe_source",
    "export_bundle",
    "from_timm",
    "from_transformers",
    "list_pretrained",
    "load_model",
    "load_pretrained",
    "open_source",
    "push_to_hub",
    "save_model",
    "save_onnx",
    "save_pretrained",
    "save_safetensors",
]
