"""ShiftAddViT in JAX: pretrained vision transformers reparameterized into shifts and adds."""

from shiftaddvit_jax.models import create_model, init_variables, list_models

__version__ = "0.1.0"

__all__ = ["create_model", "init_variables", "list_models"]
