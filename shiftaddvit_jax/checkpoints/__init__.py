"""Models on disk: this project's, and those that others trained."""

from shiftaddvit_jax.checkpoints.pretrained import load_pretrained, save_safetensors
from shiftaddvit_jax.checkpoints.store import load_model, save_model

__all__ = ["load_model", "load_pretrained", "save_model", "save_safetensors"]
