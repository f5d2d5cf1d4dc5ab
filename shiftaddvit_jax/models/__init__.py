"""Whole models, and the tables of their variants."""

from shiftaddvit_jax.models.create import (
    create_model,
    init_variables,
    list_models,
    model_arguments,
)
from shiftaddvit_jax.models.pvt_v2 import PyramidVisionTransformerV2

__all__ = [
    "PyramidVisionTransformerV2",
    "create_model",
    "init_variables",
    "list_models",
    "model_arguments",
]
