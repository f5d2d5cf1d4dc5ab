"""From a variant's name to a model, and back to what describes it."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jaxtyping import Array, PyTree

from shiftaddvit_jax.models.pvt_v2 import STAGES, VARIANTS, PyramidVisionTransformerV2
from shiftaddvit_jax.nn import ATTENTION_KINDS, LINEAR_KINDS, Primitives
from shiftaddvit_jax.ops.activations import Activations
from shiftaddvit_jax.ops.binarize import Threshold
from shiftaddvit_jax.ops.implementation import Implementation, check_implementation
from shiftaddvit_jax.validation import check_choice


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return list(VARIANTS)


def create_model(
    name: str,
    *,
    num_classes: int = 1000,
    image_size: int | None = None,
    attention: str | Sequence[str] | None = None,
    mlp: str | Sequence[str] = "dense",
    projections: str | Sequence[str] = "dense",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    weight_bits: int = 5,
    activations: Activations = "float",
    threshold: Threshold = "sample",
    implementation: Implementation = None,
    dtype: Any = None,
) -> nn.Module:
    """A model by its name, as a Flax module: ``init`` makes its variables, ``apply`` its logits.

    Args:
      name: one of `list_models`.
      num_classes: number of logits.
      image_size: side of the images in pixels; by default the variant's own.
      attention: kind of attention: one for all stages, or one for each. With one, other than ``"sra"``, the
        last stage keeps ``"msa"``, as in the paper. By default ``"sra"``, the original model's.
      mlp: kind of the MLPs' linear layers, ``"dense"``, ``"shift"`` or ``"moe"``: one, or one a stage.
      projections: the same for the attentions' linear layers.
      dropout: rate in attentions and MLPs.
      drop_path: stochastic depth of the last block.
      weight_bits: bits of a power-of-two weight.
      activations: number format of what is shifted: ``"float"``, ``"fixed_point"`` or ``"int8"``.
      threshold: where queries and keys are binarized: ``"zero"``, ``"sample"`` or ``"tensor"``.
      implementation: ``None``, ``"xla"`` or ``"tvm"``.
      dtype: dtype of the computation, such as ``jnp.bfloat16``; by default float32.

    Raises:
      ValueError: an unknown name or kind (with the nearest known ones), or a number out of range.
    """
    check_choice("model", name, list_models())
    check_implementation(name, implementation)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    row = dict(VARIANTS[name])
    row["image_size"] = image_size or row["image_size"]
    return PyramidVisionTransformerV2(
        variant=name,
        num_classes=num_classes,
        attention=stage_attention(attention or "sra"),
        mlp=stage_kinds("mlp", mlp, LINEAR_KINDS),
        projections=stage_kinds("projections", projections, LINEAR_KINDS),
        dropout=dropout,
        drop_path=drop_path,
        primitives=Primitives(weight_bits, activations, threshold, implementation, dtype),
        **row,
    )


def stage_attention(attention: str | Sequence[str]) -> tuple[str, ...]:
    """The kind of attention of each stage; one kind other than ``"sra"`` leaves ``"msa"`` to the last."""
    if isinstance(attention, str) and attention != "sra":
        attention = (attention,) * (STAGES - 1) + ("msa",)
    return stage_kinds("attention", attention, ATTENTION_KINDS)


def stage_kinds(what: str, kinds: str | Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """``kinds`` for each stage: one for all, or as many as there are stages.

    Raises:
      ValueError: unknown kinds, or another number of them.
    """
    kinds = (kinds,) * STAGES if isinstance(kinds, str) else tuple(kinds)
    if len(kinds) != STAGES:
        raise ValueError(f"{what} must be one kind or {STAGES}, one a stage; got {len(kinds)}: {kinds}")
    for kind in kinds:
        check_choice(f"kind of {what}", kind, known)
    return kinds


def model_arguments(model: nn.Module) -> dict[str, Any]:
    """Name and arguments with which `create_model` makes ``model`` again, as JSON can hold them."""
    arguments = {
        field.name: getattr(model, field.name)
        for field in dataclasses.fields(model)
        if field.name not in ("parent", "name", "variant", "primitives")
        and field.name not in VARIANTS[model.variant]
    }
    arguments |= dataclasses.asdict(model.primitives)
    if arguments["dtype"] is not None:
        arguments["dtype"] = jnp.dtype(arguments["dtype"]).name
    return {"name": model.variant, "image_size": model.image_size, **arguments}


def init_function(model: nn.Module) -> Callable[[Array], PyTree]:
    """The function from a random key to ``model``'s variables, at the model's own image size."""
    images = jnp.zeros((1, model.image_size, model.image_size, 3))
    return lambda key: model.init(key, images)


def init_variables(model: nn.Module, key: Array) -> PyTree:
    """``model``'s variables, drawn from ``key``."""
    # Under jit the forward pass is dead code. The rest runs once: compiling it quickly matters more than
    # how fast it then is.
    options = {"xla_backend_optimization_level": 0}
    return jax.jit(init_function(model), compiler_options=options)(key)


def stage_of(path: Sequence[str]) -> int:
    """The index of the stage to which the variable at ``path`` (collection first) belongs."""
    return int(path[1].removeprefix("stage")) - 1
