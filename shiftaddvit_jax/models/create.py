"""From a variant's name to a model, and back to what describes it."""

import dataclasses
import inspect
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jaxtyping import Array, PyTree

from shiftaddvit_jax.models import pvt, pvt_v2, vit
from shiftaddvit_jax.nn import ATTENTION_KINDS, LINEAR_KINDS, Primitives, ShiftDense
from shiftaddvit_jax.ops.activations import Activations
from shiftaddvit_jax.ops.binarize import Threshold
from shiftaddvit_jax.ops.implementation import Implementation, check_implementation
from shiftaddvit_jax.ops.precision import PRECISIONS, Precision
from shiftaddvit_jax.validation import check_choice

# What runs once: compiling it quickly matters more than how fast it then is.
_COMPILE_QUICKLY = {"xla_backend_optimization_level": 0}


class Family(NamedTuple):
    """A model's class, the table of its variants, and the kinds of attention it can have."""

    model: type[nn.Module]
    variants: dict[str, dict[str, Any]]
    attention: tuple[str, ...]


FAMILIES = (
    Family(pvt.PyramidVisionTransformer, pvt.VARIANTS, ATTENTION_KINDS),
    Family(pvt_v2.PyramidVisionTransformerV2, pvt_v2.VARIANTS, ATTENTION_KINDS),
    Family(vit.VisionTransformer, vit.VARIANTS, vit.ATTENTION_KINDS),
)


def list_models() -> list[str]:
    """The names that `create_model` knows."""
    return [name for family in FAMILIES for name in family.variants]


def model_row(name: str) -> dict[str, Any]:
    """A variant's ``name``, number of ``parameters``, ``image_size`` and kinds of ``attention``.

    Raises:
      ValueError: an unknown name.
    """
    model = create_model(name)
    return {
        "name": name,
        "parameters": count_parameters(model),
        "image_size": model.image_size,
        "attention": _family(name).attention,
    }


def count_parameters(model: nn.Module) -> int:
    """How many numbers are trained."""
    return sum(leaf.size for leaf in jax.tree.leaves(variable_shapes(model)["params"]))


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
    layer_norm_eps: float | None = None,
    weight_bits: int = 5,
    activations: Activations = "float",
    threshold: Threshold = "sample",
    implementation: Implementation = None,
    dtype: Any = None,
    precision: Precision = "float32",
) -> nn.Module:
    """A model by its name, as a Flax module: ``init`` makes its variables, ``apply`` its logits.

    Args:
      name: one of `list_models`.
      num_classes: number of logits.
      image_size: side of the images in pixels; by default the variant's own.
      attention: kind of attention: one for all stages, or one for each. With one, the last stage of a pyramid
        keeps ``"msa"``, as in the paper, unless it is ``"sra"`` or ``"linear_sra"``. By default the original
        model's. ViT and DeiT have one stage.
      mlp: kind of the MLPs' linear layers, ``"dense"``, ``"shift"`` or ``"moe"``: one, or one a stage.
      projections: the same for the attentions' linear layers.
      dropout: rate in attentions and MLPs.
      drop_path: stochastic depth of the last block.
      weight_bits: bits of a power-of-two weight.
      layer_norm_eps: epsilon of every LayerNorm; by default the authors'. Those of PVT have two, and those of
        ViT and DeiT not the 1e-12 of transformers' configs.
      activations: number format of what is shifted: ``"float"``, ``"fixed_point"`` or ``"int8"``.
      threshold: where queries and keys are binarized: ``"zero"``, ``"sample"`` or ``"tensor"``.
      implementation: ``None``, ``"xla"`` or ``"tvm"``.
      dtype: dtype of the computation, such as ``jnp.bfloat16``; by default float32.
      precision: number format of what dense layers and convolutions over patches multiply: ``"float32"`` or
        ``"bfloat16"``, with sums in float32 all the same. Routers stay in float32.

    Raises:
      ValueError: an unknown name or kind (with the nearest known ones), or a number out of range.
    """
    check_choice("model", name, list_models())
    check_implementation(implementation)
    check_choice("precision", precision, PRECISIONS)
    if num_classes < 1:
        raise ValueError(f"num_classes must be at least 1, got {num_classes}")
    family = _family(name)
    row = family.variants[name]
    stages = len(row["attention"])
    row = row | {
        "image_size": row["image_size"] if image_size is None else image_size,
        "attention": stage_attention(name, row["attention"] if attention is None else attention),
    }
    return family.model(
        variant=name,
        num_classes=num_classes,
        mlp=stage_kinds("mlp", mlp, LINEAR_KINDS, stages),
        projections=stage_kinds("projections", projections, LINEAR_KINDS, stages),
        dropout=dropout,
        drop_path=drop_path,
        layer_norm_eps=layer_norm_eps,
        primitives=Primitives(weight_bits, activations, threshold, implementation, dtype, precision),
        **row,
    )


def _family(name: str) -> Family:
    return next(family for family in FAMILIES if name in family.variants)


def stage_attention(name: str, attention: str | Sequence[str]) -> tuple[str, ...]:
    """The kind of attention of each stage of the variant ``name``, as `create_model` reads it.

    Raises:
      ValueError: an unknown kind, one that the family does not have, or another number of them.
    """
    family = _family(name)
    stages = len(family.variants[name]["attention"])
    if isinstance(attention, str) and attention not in ("sra", "linear_sra") and stages > 1:
        attention = (attention,) * (stages - 1) + ("msa",)
    kinds = stage_kinds("attention", attention, ATTENTION_KINDS, stages)
    for kind in kinds:
        if kind not in family.attention:
            raise ValueError(f"{name} has no attention {kind!r}; choose among {', '.join(family.attention)}")
    return kinds


def stage_kinds(what: str, kinds: str | Sequence[str], known: Sequence[str], stages: int) -> tuple[str, ...]:
    """``kinds`` for each stage: one for all, or as many as there are stages.

    Raises:
      ValueError: unknown kinds, or another number of them.
    """
    kinds = (kinds,) * stages if isinstance(kinds, str) else tuple(kinds)
    if len(kinds) != stages:
        raise ValueError(f"{what} must be one kind or {stages}, one a stage; got {len(kinds)}: {kinds}")
    for kind in kinds:
        check_choice(f"kind of {what}", kind, known)
    return kinds


def model_arguments(model: nn.Module) -> dict[str, Any]:
    """Name and arguments with which `create_model` makes ``model`` again, as JSON can hold them."""
    primitives = dataclasses.asdict(model.primitives)
    arguments = {
        name: primitives[name] if name in primitives else getattr(model, name)
        for name in inspect.signature(create_model).parameters
        if name != "name"
    }
    if arguments["dtype"] is not None:
        arguments["dtype"] = jnp.dtype(arguments["dtype"]).name
    return {"name": model.variant, **arguments}


def init_function(model: nn.Module) -> Callable[[Array], PyTree]:
    """The function from a random key to ``model``'s variables, at the model's own image size."""
    return lambda key: model.init(key, jnp.zeros((1, model.image_size, model.image_size, 3), jnp.float32))


def variable_shapes(model: nn.Module) -> PyTree:
    """The shapes and dtypes of ``model``'s variables, which no implementation changes.

    Raises:
      ValueError: an image size that does not fit the model.
    """
    on_xla = model.clone(primitives=dataclasses.replace(model.primitives, implementation="xla"))
    with nn.intercept_methods(_skip_shift_products):
        return jax.eval_shape(init_function(on_xla), jax.eval_shape(jax.random.key, 0))


def _skip_shift_products(call, arguments, keywords, context):
    # Rounding and packing weights takes a third of the time to trace, and changes no shape.
    if isinstance(context.module, ShiftDense):
        if context.method_name == "weight":
            return None
        if context.method_name == "project":
            return jnp.zeros((*arguments[0].shape[:-1], context.module.features), context.module.dtype)
    return call(*arguments, **keywords)


def init_variables(model: nn.Module, key: Array) -> PyTree:
    """``model``'s variables, drawn from ``key``."""
    # Under jit the forward pass is dead code.
    return jax.jit(init_function(model), compiler_options=_COMPILE_QUICKLY)(key)


def init_named(model: nn.Module, names: Collection[str], key: Array) -> dict[str, Array]:
    """Some of ``model``'s variables, drawn from ``key``: those of ``names``, as in ``params/head/bias``."""

    # As in `init_variables`: what the names do not need is dead code.
    @partial(jax.jit, compiler_options=_COMPILE_QUICKLY)
    def make(key):
        flat = flatten_dict(init_function(model)(key), sep="/")
        return {name: flat[name] for name in names}

    return make(key)


def stage_of(path: Sequence[str]) -> int:
    """The index of the stage to which the variable at ``path`` (collection first) belongs; 0 in a ViT."""
    stage = path[1].removeprefix("stage")
    return int(stage) - 1 if stage.isdigit() else 0
