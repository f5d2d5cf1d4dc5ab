"""Models on disk."""

from shiftaddvit_jax.checkpoints.store import load_model, save_model

__all__ = ["load_model", "save_model"]
