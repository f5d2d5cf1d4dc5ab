"""The table of all variants: from a name to a model, and from a model to what describes it."""

import dataclasses
import inspect
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, get_args

import flax.linen as nn
import jax.numpy as jnp

from shiftaddvit_jax.models import gnt, pvt, pvt_v2, vit
from shiftaddvit_jax.models.kinds import stage_attention, stage_kinds
from shiftaddvit_jax.models.preprocessing import Preprocessing
from shiftaddvit_jax.models.variables import count_parameters, linear_layers, stage_of
from shiftaddvit_jax.names import ATTENTION_PRECISIONS, PERFORMER_FEATURES, PRECISIONS, ROTATIONS
from shiftaddvit_jax.nn import ATTENTION_KINDS, LINEAR_KINDS, Primitives
from shiftaddvit_jax.nn.primitives import LAYER_CHOICES, AttentionPrecision, PerformerFeatures, Rotation
from shiftaddvit_jax.ops.activations import Activations
from shiftaddvit_jax.ops.binarize import Threshold
from shiftaddvit_jax.ops.implementation import Implementation, check_implementation
from shiftaddvit_jax.ops.power_of_two import check_weight_terms
from shiftaddvit_jax.ops.precision import Precision
from shiftaddvit_jax.validation import check_choice

Task = Literal["classification", "novel_views"]


class Family(NamedTuple):
    """A model's class, the table of its variants, the kinds of attention it can have, and what it is for."""

    model: type[nn.Module]
    variants: dict[str, dict[str, Any]]
    attention: tuple[str, ...]
    task: Task = "classification"


FAMILIES = (
    Family(pvt.PyramidVisionTransformer, pvt.VARIANTS, ATTENTION_KINDS),
    Family(pvt_v2.PyramidVisionTransformerV2, pvt_v2.VARIANTS, ATTENTION_KINDS),
    Family(vit.VisionTransformer, vit.VARIANTS, vit.ATTENTION_KINDS),
    Family(gnt.GeneralizableNerfTransformer, gnt.VARIANTS, gnt.ATTENTION_KINDS, "novel_views"),
)


def model_family(name: str) -> Family:
    """The family of the variant ``name``."""
    return next(family for family in FAMILIES if name in family.variants)


def model_task(model: nn.Module) -> Task:
    """What ``model`` is for."""
    return model_family(model.variant).task


def check_classifier(model: nn.Module, what: str) -> None:
    """Raise a ``ValueError`` unless ``model`` is a classifier, which ``what`` is for."""
    if model_task(model) != "classification":
        raise ValueError(f"{what} is for classifiers, and {model.variant} renders views")


def list_models(task: Task = "classification") -> list[str]:
    """The names that `create_model` knows of models for ``"classification"`` or ``"novel_views"``.

    Raises:
      ValueError: another task.
    """
    check_choice("task", task, get_args(Task))
    return [name for family in FAMILIES if family.task == task for name in family.variants]


def model_row(name: str) -> dict[str, Any]:
    """A variant's ``name``, number of ``parameters``, ``image_size`` and kinds of ``attention``.

    What renders views has None as ``image_size``.

    Raises:
      ValueError: an unknown name.
    """
    model = create_model(name)
    return {
        "name": name,
        "parameters": count_parameters(model),
        "image_size": getattr(model, "image_size", None),
        "attention": model_family(name).attention,
    }


def model_preprocessing(model: nn.Module) -> Preprocessing:
    """What the published weights of ``model``'s variant expect, at the model's own image size.

    Raises:
      ValueError: a model that is no classifier.
    """
    if model_task(model) != "classification":
        raise ValueError(f"{model.variant} renders views; it takes photographs as they are, of any size")
    preprocessing = model_family(model.variant).variants[model.variant]["preprocessing"]
    return preprocessing.at_size(model.image_size)


def create_model(
    name: str,
    *,
    num_classes: int | None = None,
    image_size: int | None = None,
    attention: str | Sequence[str] | None = None,
    mlp: str | Sequence[str] = "dense",
    projections: str | Sequence[str] = "dense",
    dropout: float = 0.0,
    drop_path: float = 0.0,
    layer_norm_eps: float | None = None,
    weight_bits: int = 5,
    weight_terms: int = 1,
    activations: Activations = "float",
    threshold: Threshold = "sample",
    implementation: Implementation = None,
    dtype: Any = None,
    precision: Precision = "float32",
    attention_precision: AttentionPrecision = "float32",
    performer_features: PerformerFeatures = "gaussian",
    rotation: Rotation = "none",
    layers: Mapping[str, str] | None = None,
) -> nn.Module:
    """A model by its name, as a Flax module: ``init`` makes its variables, ``apply`` its logits.

    Args:
      name: one of `list_models`, of any task. What renders novel views has neither classes nor an image size
        of its own, and no stochastic depth.
      num_classes: number of logits, by default 1000; 0 for a model without a head. Its result is what the
        head would get, float32 [batch, channels]: PVTv2's mean of all tokens; PVT's and ViT's class token;
        the mean of distilled DeiT's class and distillation tokens. All are taken after the last LayerNorm, as
        in timm.
      image_size: side of the images in pixels; by default the variant's own.
      attention: kind of attention, one for all stages or one for each; by default the original model's. One
        kind leaves ``"msa"`` in the last stage of a pyramid, as in the paper; ``"sra"`` and ``"linear_sra"``
        are for the last stage too. ViT and DeiT have one stage.
      mlp: kind of the MLPs' linear layers, ``"dense"``, ``"shift"`` or ``"moe"``: one, or one a stage.
      projections: the same for the attentions' linear layers.
      dropout: rate in attentions and MLPs.
      drop_path: stochastic depth of the last block.
      weight_bits: bits of a power of two in a shift layer's weights.
      weight_terms: powers of two in a weight: 1, or 2 for their sum or difference, see `two_powers_of_two`.
      layer_norm_eps: epsilon of every LayerNorm; by default the authors': 1e-6, and in patch embeddings and
        spatial reductions 1e-5. Transformers' configs of ViT and DeiT say 1e-12 instead.
      activations: number format of MatShift's activations: ``"float"``, ``"fixed_point"`` or ``"int8"``.
      threshold: at which queries and keys are binarized: ``"zero"``, ``"sample"`` or ``"tensor"``.
      implementation: ``None``, ``"xla"``, ``"tvm"`` or ``"tvm_shift"``, see `shiftaddvit_jax.ops`.
      dtype: dtype of the computation, such as ``jnp.bfloat16``; by default float32.
      precision: number format of the factors in dense layers and convolutions over patches: ``"float32"``,
        ``"bfloat16"``, or ``"int8"`` with a scale for each row and each output. Sums are in float32, with
        int8 in int32; routers stay in float32.
      attention_precision: number format of the probabilities and values of attention ``"binary_softmax"``:
        ``"float32"``; ``"int8"``, 8-bit numbers, scaled to the largest value of each image and head; or
        ``"clipped_int8"``, the same with values clipped at 2 and -2, as BinaryAttention trains.
      performer_features: random features that attention ``"performer"`` draws: ``"gaussian"``; or
        ``"hadamard"``, of length sqrt(head_dim), which needs a head_dim that `hadamard` takes.
      rotation: what ``"hamming_linear"``, ``"hamming_quadratic"`` and ``"binary_softmax"`` put queries and
        keys through before they binarize them: ``"none"``; ``"hadamard"``, two rounds of random signs and the
        Hadamard transform, by additions; ``"hadamard_2x"`` and ``"hadamard_4x"``, two and four such rotations
        side by side, for codes of 2 and 4 times head_dim. Their products are divided by as much.
      layers: what single linear layers of blocks are, instead of what ``mlp`` and ``projections`` say, by
        path, such as ``{"stage1/block1/mlp/fc1": "shift"}``: ``"dense"``, ``"dense_int8"``, ``"shift"``,
        ``"shift_two_terms"`` or ``"moe"``.

    Raises:
      ValueError: an unknown name, kind or layer (with the nearest known ones), or a number out of range.
    """
    check_choice("model", name, [variant for family in FAMILIES for variant in family.variants])
    check_implementation(implementation)
    check_choice("precision", precision, PRECISIONS)
    check_weight_terms(weight_terms)
    check_choice("attention_precision", attention_precision, ATTENTION_PRECISIONS)
    check_choice("performer_features", performer_features, PERFORMER_FEATURES)
    check_choice("rotation", rotation, ROTATIONS)
    if num_classes is not None and num_classes < 0:
        raise ValueError(f"num_classes must be at least 0, got {num_classes}")
    family = model_family(name)
    row = dict(family.variants[name])
    stages = len(row["attention"])
    attention = row["attention"] if attention is None else attention
    row |= {"attention": stage_attention(name, attention, family.attention, stages)}
    if family.task == "classification":
        preprocessing = row.pop("preprocessing")
        row |= {
            "num_classes": 1000 if num_classes is None else num_classes,
            "image_size": preprocessing.size if image_size is None else image_size,
            "drop_path": drop_path,
        }
    else:
        given = {"num_classes": num_classes, "image_size": image_size, "drop_path": drop_path or None}
        foreign = [argument for argument, value in given.items() if value is not None]
        if foreign:
            raise ValueError(f"{name} renders views and has no {', '.join(foreign)}; leave them out")
    primitives = Primitives(
        weight_bits,
        activations,
        threshold,
        implementation,
        dtype,
        precision,
        weight_terms=weight_terms,
        attention_precision=attention_precision,
        performer_features=performer_features,
        rotation=rotation,
    )
    model = family.model(
        variant=name,
        mlp=stage_kinds("mlp", mlp, LINEAR_KINDS, stages),
        projections=stage_kinds("projections", projections, LINEAR_KINDS, stages),
        dropout=dropout,
        layer_norm_eps=layer_norm_eps,
        primitives=primitives,
        **row,
    )
    return with_layers(model, layers) if layers else model


def with_layers(model: nn.Module, layers: Mapping[str, str]) -> nn.Module:
    """``model`` with these choices for single linear layers and no others, see `create_model`.

    Raises:
      ValueError: a layer that the model does not have, or an unknown choice (with the nearest known ones).
    """
    if layers:
        known = linear_layers(model)
        for path, choice in layers.items():
            check_choice("linear layer", path, known)
            check_choice(f"choice for {path}", choice, tuple(LAYER_CHOICES))
    return model.clone(primitives=model.primitives.choosing(layers))


def linear_kinds(model: nn.Module) -> set[str]:
    """The kinds of linear layer that ``model`` has, by stage or by single layers' choices."""
    chosen = (LAYER_CHOICES[choice][0] for _, choice in model.primitives.layers)
    return {*model.mlp, *model.projections, *chosen}


def linear_layer(model: nn.Module, path: Sequence[str]) -> tuple[str, Primitives]:
    """The kind and the settings of the linear layer at ``path``, such as ``("block1", "mlp", "fc1")``."""
    kinds = model.projections if path[-2] == "attn" else model.mlp
    return model.primitives.of_layer("/".join(path), kinds[stage_of(("params", *path))])


def model_arguments(model: nn.Module) -> dict[str, Any]:
    """The name and arguments from which `create_model` makes ``model`` again, in types that JSON can hold."""
    primitives = dataclasses.asdict(model.primitives)
    arguments = {
        name: primitives[name] if name in primitives else getattr(model, name)
        for name in inspect.signature(create_model).parameters
        if name in primitives or (name != "name" and hasattr(model, name))
    }
    arguments["layers"] = dict(arguments["layers"]) or None
    if arguments["dtype"] is not None:
        arguments["dtype"] = jnp.dtype(arguments["dtype"]).name
    return {**arguments, "name": model.variant}
