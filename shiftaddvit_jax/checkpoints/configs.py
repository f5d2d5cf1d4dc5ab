"""What others write beside weights, in ``config.json``: the variant, its image size, its classes' names."""

import re
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn

from shiftaddvit_jax.models import pvt, pvt_v2, vit
from shiftaddvit_jax.models.registry import linear_kinds

IMAGENET_CLASSES = 1000


class Described(NamedTuple):
    """What a config says of a model.

    Attributes:
      arguments: those of `create_model` that the config settles, ``name`` among them.
      class_names: a name for each class, or None if the config has no names but numbers.
      image_size: height and width in pixels of the images that its position embeddings are for, if known.
    """

    arguments: dict[str, Any]
    class_names: tuple[str, ...] | None
    image_size: tuple[int, int] | None


@cache
def imagenet_classes() -> tuple[str, ...]:
    """The names of ImageNet-1k's 1,000 classes in the order of its labels: WordNet's lemmas.

    Two classes are WordNet's "crane"; a word in brackets tells them apart.
    """
    text = Path(__file__).with_name("imagenet_classes.txt").read_text()
    return tuple(text.splitlines())


class _Field(NamedTuple):
    """A field of a config: its default, and what our models have there: a value, or a column of the rows."""

    default: Any
    expected: Any = None
    column: str | None = None


_PYRAMID = {
    "hidden_sizes": _Field(None, column="embed_dims"),
    "depths": _Field((2, 2, 2, 2), column="depths"),
    "num_attention_heads": _Field((1, 2, 5, 8), column="num_heads"),
    "mlp_ratios": _Field((8, 8, 4, 4), column="mlp_ratios"),
    "strides": _Field((4, 2, 2, 2), (4, 2, 2, 2)),
    "num_encoder_blocks": _Field(4, 4),
    "num_channels": _Field(3, 3),
    "hidden_act": _Field("gelu", "gelu"),
    "qkv_bias": _Field(True, True),
}
_VIT = {
    "hidden_size": _Field(768, column="embed_dim"),
    "num_hidden_layers": _Field(12, column="depth"),
    "num_attention_heads": _Field(12, column="num_heads"),
    "intermediate_size": _Field(3072, column="hidden"),
    "patch_size": _Field(16, vit.PATCH_SIZE),
    "num_channels": _Field(3, 3),
    "hidden_act": _Field("gelu", "gelu"),
    "qkv_bias": _Field(True, True),
}


def _vit_rows(prefix, distilled):
    return {
        name: {**row, "hidden": 4 * row["embed_dim"]}
        for name, row in vit.VARIANTS.items()
        if name.startswith(prefix) and row["distilled"] == distilled
    }


def _pvt_v2_rows():
    return {name: {**row, "linear": row["mlp_relu"]} for name, row in pvt_v2.VARIANTS.items()}


# By transformers' model_type: the variants, and the fields of the config, with the defaults of its class
# (transformers 5, configuration_*.py). Its DeiT always has a distillation token.
_TRANSFORMERS = {
    "vit": (_vit_rows("vit", False), _VIT),
    "deit": (_vit_rows("deit", True), _VIT),
    "pvt": (
        pvt.VARIANTS,
        {
            **_PYRAMID,
            "hidden_sizes": _Field((64, 128, 320, 512), column="embed_dims"),
            "sequence_reduction_ratios": _Field((8, 4, 2, 1), column="sr_ratios"),
            "patch_sizes": _Field((4, 2, 2, 2), (4, 2, 2, 2)),
        },
    ),
    "pvt_v2": (
        _pvt_v2_rows(),
        {
            **_PYRAMID,
            "hidden_sizes": _Field((32, 64, 160, 256), column="embed_dims"),
            "sr_ratios": _Field((8, 4, 2, 1), column="sr_ratios"),
            "patch_sizes": _Field((7, 3, 3, 3), (7, 3, 3, 3)),
            "linear_attention": _Field(False, column="linear"),
        },
    ),
}
_EPSILONS = {"vit": 1e-12, "deit": 1e-12, "pvt": 1e-6, "pvt_v2": 1e-6}

# timm's architectures that are ours (timm 1.0, vision_transformer.py, deit.py, pvt_v2.py), without the size.
_TIMM = {
    **{
        f"{family}_{size}_patch16": f"{family}_{size}"
        for family in ("vit", "deit")
        for size in ("tiny", "small", "base")
    },
    **{f"deit_{size}_distilled_patch16": f"deit_{size}_distilled" for size in ("tiny", "small", "base")},
    **{name: name for name in pvt_v2.VARIANTS if name != "pvt_v2_nano"},
}
# Arguments of timm's models that change what they compute, with the values that ours have.
_TIMM_ARGUMENTS = {
    "in_chans": 3,
    "patch_size": vit.PATCH_SIZE,
    "qkv_bias": True,
    "qk_norm": False,
    "init_values": None,
    "class_token": True,
    "no_embed_class": False,
    "reg_tokens": 0,
    "pre_norm": False,
    "fc_norm": None,
    "act_layer": (None, "gelu"),
    "norm_layer": None,
    "mlp_layer": None,
    "block_fn": None,
}
# Those that change nothing after training, or are read elsewhere.
_TIMM_IGNORED = (
    "num_classes",
    "img_size",
    "global_pool",
    "drop_rate",
    "pos_drop_rate",
    "patch_drop_rate",
    "proj_drop_rate",
    "attn_drop_rate",
    "drop_path_rate",
    "weight_init",
    "fix_init",
    "dynamic_img_size",
    "dynamic_img_pad",
)


def describe_transformers(config: Mapping[str, Any], where: str | Path) -> Described:
    """What transformers' ``config.json`` says.

    Args:
      config: the file.
      where: its path, for messages.

    Raises:
      ValueError: another architecture, by the name of the field that says so.
    """
    kind = config.get("model_type")
    if kind not in _TRANSFORMERS:
        raise ValueError(f"{where}: model_type {kind!r} is none of {', '.join(_TRANSFORMERS)}")
    rows, fields = _TRANSFORMERS[kind]
    differing = {name: _differing(config, fields, row) for name, row in rows.items()}
    variant = min(differing, key=lambda name: len(differing[name]))
    if differing[variant]:
        _refuse(config, fields, rows[variant], f"the nearest known model, {variant}, has", where)
    arguments = {"name": variant, "layer_norm_eps": _epsilon(config)}
    names = _transformers_names(config, where)
    return Described(arguments, names, _sides(config.get("image_size", 224), "image_size", where))


def check_config(config: Mapping[str, Any], model: nn.Module, where: str | Path) -> None:
    """Raise a ``ValueError`` if ``config``, of transformers or timm, contradicts ``model``, naming the field.

    Of transformers' configs all fields count that change what is computed, of timm's the architecture.
    """
    if "architecture" in config:
        described = describe_timm(config, where)
        if described.arguments["name"] != model.variant:
            raise ValueError(f"{where} describes a {described.arguments['name']}, not a {model.variant}")
    if config.get("model_type") not in _TRANSFORMERS:
        return
    _, fields = _TRANSFORMERS[config["model_type"]]
    row = _row_of(model, fields)
    if _differing(config, fields, row):
        _refuse(config, fields, row, "the model has", where)
    epsilon, mine = _epsilon(config), model.layer_norm_eps
    # By default, ViT and DeiT have 1e-6 everywhere, and the pyramids in most places alone.
    if mine != epsilon and not (
        mine is None and epsilon == 1e-6 and isinstance(model, vit.VisionTransformer)
    ):
        had = "its authors' own" if mine is None else f"{mine:g}"
        raise ValueError(
            f"{where}: layer_norm_eps is {epsilon:g}, and the model has {had}; "
            f"create_model(..., layer_norm_eps={epsilon:g})"
        )


def transformers_config(model: nn.Module, class_names: Sequence[str]) -> dict[str, Any] | None:
    """The ``config.json`` of the model of transformers that computes the same; None if it has none.

    It has dense models with their variant's own attention and one epsilon for all LayerNorms. Its ViT serves
    for DeiT without a distillation token, too.
    """
    is_vit = isinstance(model, vit.VisionTransformer)
    families: dict[tuple[type[nn.Module], bool], tuple[str, str]] = {
        (vit.VisionTransformer, False): ("vit", "ViTForImageClassification"),
        (vit.VisionTransformer, True): ("deit", "DeiTForImageClassificationWithTeacher"),
        (pvt.PyramidVisionTransformer, False): ("pvt", "PvtForImageClassification"),
        (pvt_v2.PyramidVisionTransformerV2, False): ("pvt_v2", "PvtV2ForImageClassification"),
    }
    kind, architecture = families[type(model), getattr(model, "distilled", False)]
    epsilon = model.layer_norm_eps or (1e-6 if is_vit else None)
    original = {**pvt.VARIANTS, **pvt_v2.VARIANTS, **vit.VARIANTS}[model.variant]["attention"]
    if linear_kinds(model) != {"dense"} or model.attention != original or epsilon is None:
        return None
    _, fields = _TRANSFORMERS[kind]
    row = _row_of(model, fields)
    labels = {str(index): name for index, name in enumerate(class_names)}
    return {
        "model_type": kind,
        "architectures": [architecture],
        **{name: _allowed(field, row)[0] for name, field in fields.items()},
        "image_size": model.image_size,
        "layer_norm_eps": epsilon,
        "id2label": labels,
        "label2id": {name: int(index) for index, name in labels.items()},
    }


def _row_of(model, fields):
    """What ``model`` has in the columns of ``fields``."""
    row = {field.column: getattr(model, field.column, None) for field in fields.values() if field.column}
    return row | {"hidden": 4 * getattr(model, "embed_dim", 0), "linear": getattr(model, "mlp_relu", False)}


def _differing(config, fields, row):
    """The names of the fields whose values are not those of ``row``, or of all our models."""
    return [
        name
        for name, field in fields.items()
        # With linear attention, the reductions' ratios are ignored.
        if not (name == "sr_ratios" and row.get("linear", False))
        and _value(config, name, field) not in _allowed(field, row)
    ]


def _refuse(config, fields, row, who, where):
    name = _differing(config, fields, row)[0]
    field = fields[name]
    who = who if field.column else "this architecture has"
    expected = _allowed(field, row)[0]
    raise ValueError(
        f"{where}: {name} is {_shown(_value(config, name, field))}, and {who} {_shown(expected)} there"
    )


def _value(config, name, field):
    return _plain(config.get(name, field.default))


def _allowed(field, row):
    expected = _plain(row[field.column]) if field.column else field.expected
    return (expected,) if field.column or isinstance(expected, tuple) else (expected, (expected, expected))


def _epsilon(config):
    return float(config.get("layer_norm_eps", _EPSILONS[config["model_type"]]))


def describe_timm(config: Mapping[str, Any], where: str | Path) -> Described:
    """What timm's ``config.json`` says; arguments as in `describe_transformers`.

    Raises:
      ValueError: another architecture, by the name of the field that says so.
    """
    architecture = str(config.get("architecture", ""))
    stem = re.sub(r"_\d+$", "", architecture.split(".")[0])
    variant = _TIMM.get(stem)
    if variant is None:
        known = ", ".join(_TIMM)
        raise ValueError(
            f"{where}: architecture {architecture!r} is none of these, with any image size: {known}"
        )
    arguments = config.get("model_args") or {}
    for name, value in arguments.items():
        if name in _TIMM_IGNORED:
            continue
        expected = _TIMM_ARGUMENTS.get(name, ...)
        if expected is ... or value not in (expected if isinstance(expected, tuple) else (expected,)):
            said = "" if expected is ... else f", and {variant} has {_shown(expected)} there"
            raise ValueError(f"{where}: model_args has {name} {_shown(value)}{said}")
    pooling = "token" if variant in vit.VARIANTS else "avg"
    if config.get("global_pool", pooling) != pooling:
        raise ValueError(
            f"{where}: global_pool is {config['global_pool']!r}, and {variant} has {pooling!r} there"
        )
    pretrained = config.get("pretrained_cfg") or {}
    size = arguments.get("img_size") or tuple(pretrained.get("input_size", (3, 224, 224)))[1:]
    classes = config.get("num_classes", pretrained.get("num_classes", IMAGENET_CLASSES))
    names = _timm_names({**pretrained, **config}, classes, where)
    return Described({"name": variant}, names, _sides(size, "img_size", where))


def _transformers_names(config, where):
    names = config.get("id2label")
    if not isinstance(names, Mapping) or not names:
        return None
    if {str(index) for index in range(len(names))} != set(map(str, names)):
        raise ValueError(f"{where}: id2label must name the classes from 0 to {len(names) - 1}, each once")
    ordered = tuple(str(names[key]) for key in sorted(names, key=int))
    # What transformers writes when nobody named them.
    return None if all(re.fullmatch(r"LABEL_\d+", name) for name in ordered) else ordered


def _timm_names(config, classes, where):
    """The names of timm's classes; it takes 1,000 classes for ImageNet's too (timm/data/imagenet_info.py)."""
    names = config.get("label_names")
    if not names:
        return imagenet_classes() if classes == IMAGENET_CLASSES else None
    if isinstance(names, Mapping):
        names = [names.get(str(index), names.get(index)) for index in range(classes)]
    if len(names) != classes or None in names:
        raise ValueError(f"{where}: label_names has {len(names)} names, and num_classes is {classes}")
    descriptions = config.get("label_descriptions") or {}
    return tuple(str(descriptions.get(name, name)) for name in names)


def _plain(value):
    return tuple(value) if isinstance(value, Sequence) and not isinstance(value, str) else value


def _sides(size, name, where):
    """Height and width in pixels."""
    sides = tuple(size.values()) if isinstance(size, Mapping) else _plain(size)
    sides = sides if isinstance(sides, tuple) else (sides, sides)
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"{where}: {name} must be one or two whole numbers, got {_shown(sides)}")
    return sides


def _shown(value):
    return " ".join(map(str, value)) if isinstance(value, tuple) else repr(value)
