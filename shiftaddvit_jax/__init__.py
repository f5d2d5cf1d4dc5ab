"""ShiftAddViT in JAX: pretrained vision transformers reparameterized into shifts and adds."""

from shiftaddvit_jax.checkpoints import load_model, load_pretrained, save_model, save_onnx, save_safetensors
from shiftaddvit_jax.models import create_model, init_variables, list_models
from shiftaddvit_jax.pack import pack
from shiftaddvit_jax.reparameterize import (
    learn_hashes,
    redraw_features,
    reparameterization_report,
    reparameterize,
)

__version__ = "0.1.0"

__all__ = [
    "create_model",
    "init_variables",
    "learn_hashes",
    "list_models",
    "load_model",
    "load_pretrained",
    "pack",
    "redraw_features",
    "reparameterization_report",
    "reparameterize",
    "save_model",
    "save_onnx",
    "save_safetensors",
]
