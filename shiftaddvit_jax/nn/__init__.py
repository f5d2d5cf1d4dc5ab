"""Flax modules made of ops: shift and MoE layers, attentions, MLPs, and the block that joins them."""

from shiftaddvit_jax.nn.attention import ATTENTION_KINDS, make_attention
from shiftaddvit_jax.nn.block import Block, DropPath
from shiftaddvit_jax.nn.dense import Conv, Dense
from shiftaddvit_jax.nn.linear import LINEAR_KINDS, make_linear, make_patch_conv
from shiftaddvit_jax.nn.mlp import Mlp
from shiftaddvit_jax.nn.moe import MoEDense, latency_aware_loss, load_probabilities, routing_loss
from shiftaddvit_jax.nn.norm import make_layer_norm
from shiftaddvit_jax.nn.primitives import Primitives
from shiftaddvit_jax.nn.shift import ShiftDense
from shiftaddvit_jax.nn.view_attention import ReluBlock

__all__ = [
    "ATTENTION_KINDS",
    "LINEAR_KINDS",
    "Block",
    "Conv",
    "Dense",
    "DropPath",
    "Mlp",
    "MoEDense",
    "Primitives",
    "ReluBlock",
    "ShiftDense",
    "latency_aware_loss",
    "load_probabilities",
    "make_attention",
    "make_layer_norm",
    "make_linear",
    "make_patch_conv",
    "routing_loss",
]
