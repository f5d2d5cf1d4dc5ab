"""Whole models, and the tables of their variants."""

from shiftaddvit_jax.models.inspect import features
from shiftaddvit_jax.models.outputs import Outputs
from shiftaddvit_jax.models.preprocessing import Preprocessing
from shiftaddvit_jax.models.pvt import PyramidVisionTransformer
from shiftaddvit_jax.models.pvt_v2 import PyramidVisionTransformerV2
from shiftaddvit_jax.models.registry import (
    create_model,
    list_models,
    model_arguments,
    model_preprocessing,
    model_row,
)
from shiftaddvit_jax.models.variables import count_parameters, init_variables
from shiftaddvit_jax.models.vit import VisionTransformer

__all__ = [
    "Outputs",
    "Preprocessing",
    "PyramidVisionTransformer",
    "PyramidVisionTransformerV2",
    "VisionTransformer",
    "count_parameters",
    "create_model",
    "features",
    "init_variables",
    "list_models",
    "model_arguments",
    "model_preprocessing",
    "model_row",
]
