"""The keys of a config, with the values that train the demo's dense model on the digits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from shiftaddvit_jax.data import AUGMENTATIONS
from shiftaddvit_jax.data.augmentation import ERASING_MODES, INTERPOLATIONS, parse_policy
from shiftaddvit_jax.names import (
    ATTENTION_PRECISIONS,
    LAYER_CHOICES,
    PAPER_LATENCIES,
    PERFORMER_FEATURES,
    PRECISIONS,
    ROTATIONS,
    SCENE,
    SOURCES,
    TRAINING_DTYPES,
    WRITERS,
)
from shiftaddvit_jax.train.distillation import DISTILLATIONS
from shiftaddvit_jax.train.losses import LOSSES
from shiftaddvit_jax.train.optimizers import OPTIMIZERS
from shiftaddvit_jax.validation import check_choice

# Of sequences, as an error shows them.
EXAMPLES = {"rates": '("stage1/*", 0.1)', "optimizer_options": '("b2", 0.95)'}

# What a run has where neither the config nor the checkpoint that it starts from says it.
DEFAULTS = {
    "model.name": "pvt_v2_nano",
    "model.attention": "msa",
    "model.mlp": "dense",
    "model.projections": "dense",
    "model.weight_bits": 5,
    "model.weight_terms": 1,
    "model.activations": "float",
    "model.threshold": "sample",
    "model.precision": "float32",
    "model.attention_precision": "float32",
    "model.performer_features": "gaussian",
    "model.rotation": "none",
    "data.image_size": 32,
}
# Of `train`: lengths that can be said in epochs, where they are above 0, or in steps.
LENGTHS = ("", "warmup_", "cooldown_")


def default_config() -> ml_collections.ConfigDict:
    """The whole config of one run, locked: an unknown key is an error.

    ``attention``, ``mlp`` and ``projections`` are as in `shiftaddvit_jax.create_model`: one kind, or one a
    stage, separated by commas. ``init_from`` is what `shiftaddvit_jax.from_pretrained` takes; its model is
    reparameterized to the model described under ``model``. What is left open, ``""`` or None, is the
    checkpoint's, or without one that of `DEFAULTS`.
    """
    config = ml_collections.ConfigDict(
        {
            "seed": 0,
            "init_from": "",
            "model": {
                "name": "",
                "attention": "",
                "mlp": "",
                "projections": "",
                "dropout": 0.0,
                "drop_path": 0.0,
                "weight_bits": placeholder(int),
                "weight_terms": placeholder(int),  # powers of two in a shift layer's weight: 1 or 2
                "activations": "",
                "threshold": "",
                "precision": "",  # of dense layers' factors in training
                "attention_precision": "",  # of binary_softmax: float32, int8 or clipped_int8
                "performer_features": "",  # gaussian or hadamard
                "rotation": "",  # ahead of binarization: none, hadamard, hadamard_2x or hadamard_4x
                # What single layers are: pairs of a path and a choice, see `create_model`, or the name of a
                # file of `shiftaddvit search`. Empty: as the checkpoint has them.
                "layers": (),
                "new_head": False,  # for classes other than the checkpoint's
            },
            "data": {
                "source": "digits",
                "path": "",
                "image_size": placeholder(int),
                "batch_size": 64,  # images a step, or a scene's rays, on all devices together
                "augmentation": "affine",  # none, affine or crop_flip
                "repeats": 1,  # draws of an image one after another: repeated augmentation
                "workers": 0,  # processes that decode images; 0: threads of this one
                "near": 0.0,  # depths of a scene whose files don't say them; 0: they do
                "far": 0.0,
            },
            # What ``crop_flip`` does to each image, see `shiftaddvit_jax.data.Augmentation`; erasing is done
            # on the device, with any augmentation.
            "augment": {
                "scale": (0.08, 1.0),
                "ratio": (3 / 4, 4 / 3),
                "interpolation": "random",
                "flip": 0.5,
                "policy": "",  # RandAugment, such as "rand-m9-mstd0.5-inc1", or "3a"
                "color_jitter": 0.0,
                "erase": 0.0,
                "erase_mode": "const",
                "erase_count": 1,
            },
            # See `shiftaddvit_jax.train.Mixing`.
            "mixing": {
                "mixup_alpha": 0.0,
                "cutmix_alpha": 0.0,
                "probability": 1.0,
                "switch_probability": 0.5,
                "mode": "batch",
                "off_epoch": 0.0,  # from which nothing is mixed; 0: never
            },
            "train": {
                "steps": 1000,
                "epochs": 0.0,
                "loss": "cross_entropy",  # or binary_cross_entropy
                "loss_threshold": 0.0,  # of binary_cross_entropy: labels above it count as 1; 0: as they are
                "label_smoothing": 0.1,
                "optimizer": "adamw",
                "optimizer_options": (),  # pairs such as ("b2", 0.95), of Optax's own function
                "learning_rate": 2e-3,
                "learning_rate_batch_size": 0,  # for which it is meant, see `scaled_learning_rate`; 0: any
                "learning_rate_scaling": "",  # linear, sqrt, or timm's choice by the optimizer
                "learning_rate_by": "step",  # changed every step, or every epoch
                "warmup_steps": 100,
                "warmup_epochs": 0.0,
                "warmup_learning_rate": 0.0,  # of the first step
                "cooldown_steps": 0,
                "cooldown_epochs": 0.0,
                "final_learning_rate": 0.0,
                "weight_decay": 0.05,
                "layer_decay": 1.0,
                "rates": (),  # pairs of a pattern of parameters' names and a factor of the learning rate
                "frozen": (),  # patterns of parameters' names
                "clip_norm": 1.0,  # of the gradients together; 0: no clipping
                "clip_value": 0.0,  # of each gradient; 0: no clipping
                "accumulate": 1,  # parts that a batch is computed in, one after another
                "ema_decay": 0.0,  # of an average of parameters, evaluated beside them; 0: none
                "ema_warmup": False,
                "stochastic_rounding": False,  # of shift weights
                "redraw_every": 0,  # steps after which Performer's features are drawn anew; 0: never
                "dtype": "",  # of activations and products: float32 or bfloat16; parameters are float32
                "remat": False,  # blocks are computed again for gradients: less memory, more time
                # The latency-aware load-balancing loss: its weight (the paper's), and the latencies of the
                # dense and the shift expert (the authors' 6:4; only their ratio counts). The name of a file
                # of `shiftaddvit measure-latency` gives each layer latencies of its own.
                "balance_weight": 0.01,
                "latencies": PAPER_LATENCIES,
                "log_every": 50,
                "evaluate_every": 250,
                "checkpoint_every": 250,
                "keep_best": 1,  # models with the best top-1
                "writers": ("jsonl", "tensorboard"),  # and wandb, trackio
            },
            "distillation": {
                "teacher": "",  # what `init_from` may be
                "kind": "soft",
                "weight": 0.5,  # of what the teacher says; the labels have the rest
                "temperature": 1.0,
            },
            # Of `train --sweep N`: pairs of a number's key and its distribution, such as
            # ("train.learning_rate", "loguniform:1e-4:1e-2"), see `shiftaddvit_jax.qmc.sample`.
            "sweep": (),
            # All devices share a batch. A copy of parameters and optimizer state is split over as many.
            "devices": {"model": 1},
        }
    )
    return config.lock()


@dataclass(frozen=True)
class Range:
    """The values that a number may have.

    Attributes:
      low: the smallest.
      high: the largest.
      without_low: whether ``low`` itself is out of range.
      without_high: whether ``high`` itself is.
      whole: whether it is a whole number.
    """

    low: float
    high: float = math.inf
    without_low: bool = False
    without_high: bool = False
    whole: bool = False

    def __contains__(self, value: object) -> bool:
        """Whether ``value`` is such a number; NaN and infinity never are."""
        if isinstance(value, bool) or not isinstance(value, int if self.whole else (int, float)):
            return False
        above = value > self.low if self.without_low else value >= self.low
        below = value < self.high if self.without_high else value <= self.high
        return above and below and math.isfinite(value)

    def __str__(self) -> str:
        """In words, after "must be"."""
        low = f"above {self.low}" if self.without_low else f"at least {self.low}"
        if self.low == 0 and self.without_low:
            low = "positive"
        if self.high < math.inf:
            low += f" and {'below' if self.without_high else 'at most'} {self.high}"
        return f"{low} and {'whole' if self.whole else 'finite'}"


_COUNT = Range(1, whole=True)
_RATE = Range(0, 1, without_high=True)
_WEIGHT = Range(0)
_SHARE = Range(0, 1)
# Of every number in a config.
RANGES = {
    "seed": Range(0, 2**32 - 1, whole=True),
    "model.dropout": _RATE,
    "model.drop_path": _RATE,
    "model.weight_bits": Range(2, 8, whole=True),
    "model.weight_terms": Range(1, 2, whole=True),
    "data.image_size": _COUNT,
    "data.batch_size": _COUNT,
    "data.repeats": _COUNT,
    "data.workers": Range(0, 1024, whole=True),
    "data.near": _WEIGHT,
    "data.far": _WEIGHT,
    "augment.flip": _SHARE,
    "augment.color_jitter": _WEIGHT,
    "augment.erase": _SHARE,
    "augment.erase_count": _COUNT,
    "mixing.mixup_alpha": _WEIGHT,
    "mixing.cutmix_alpha": _WEIGHT,
    "mixing.probability": _SHARE,
    "mixing.switch_probability": _SHARE,
    "mixing.off_epoch": _WEIGHT,
    "train.steps": _COUNT,
    "train.epochs": _WEIGHT,
    "train.label_smoothing": _RATE,
    "train.loss_threshold": _RATE,
    "train.learning_rate": Range(0, without_low=True),
    "train.learning_rate_batch_size": Range(0, whole=True),
    "train.warmup_steps": Range(0, whole=True),
    "train.warmup_epochs": _WEIGHT,
    "train.warmup_learning_rate": _WEIGHT,
    "train.cooldown_steps": Range(0, whole=True),
    "train.cooldown_epochs": _WEIGHT,
    "train.final_learning_rate": _WEIGHT,
    "train.weight_decay": _WEIGHT,
    "train.layer_decay": Range(0, 1, without_low=True),
    "train.clip_norm": _WEIGHT,
    "train.clip_value": _WEIGHT,
    "train.accumulate": _COUNT,
    "train.ema_decay": _RATE,
    "train.redraw_every": Range(0, whole=True),
    "train.balance_weight": _WEIGHT,
    "train.log_every": _COUNT,
    "train.evaluate_every": _COUNT,
    "train.checkpoint_every": _COUNT,
    "train.keep_best": Range(0, 100, whole=True),
    "distillation.weight": _SHARE,
    "distillation.temperature": Range(0, without_low=True),
    "devices.model": _COUNT,
}
LATENCY = Range(0, without_low=True)
CHOICES = {
    "data.source": (*SOURCES, SCENE),
    "data.augmentation": AUGMENTATIONS,
    "model.activations": ("float", "int8", "fixed_point"),
    "model.threshold": ("zero", "sample", "tensor"),
    "model.precision": PRECISIONS,
    "model.attention_precision": ATTENTION_PRECISIONS,
    "model.performer_features": PERFORMER_FEATURES,
    "model.rotation": ROTATIONS,
    "augment.interpolation": INTERPOLATIONS,
    "augment.erase_mode": ERASING_MODES,
    "mixing.mode": ("batch", "elem"),
    "train.loss": LOSSES,
    "train.optimizer": tuple(OPTIMIZERS),
    "train.dtype": ("", *TRAINING_DTYPES),
    "train.learning_rate_by": ("step", "epoch"),
    "train.learning_rate_scaling": ("", "linear", "sqrt"),
    "distillation.kind": DISTILLATIONS,
}


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raise a ``ValueError`` unless ``config`` has the keys of `default_config`, and values in range."""
    values, known = flat(config), flat(default_config())
    for name in values.keys() - known.keys():
        check_choice("config key", name, known)
    if missing := sorted(known.keys() - values.keys()):
        raise ValueError(
            f"the config lacks {', '.join(missing[:4])}{', ...' if len(missing) > 4 else ''}; begin with "
            "shiftaddvit_jax.train.default_config()"
        )
    for name, value in values.items():
        if value is None and name in DEFAULTS:
            continue
        if name in RANGES and value not in RANGES[name]:
            raise ValueError(f"config.{name} must be {RANGES[name]}, got {value!r}")
        for kind, words in ((str, "text"), (bool, "true or false"), (tuple, "a sequence")):
            if isinstance(known[name], kind) and not isinstance(
                value, (tuple, list) if kind is tuple else kind
            ):
                raise ValueError(f"config.{name} must be {words}, got {value!r}")
        if name in CHOICES and not (value == "" and name in DEFAULTS):
            check_choice(f"config.{name}", value, CHOICES[name])
    _check_latencies(config.train.latencies)
    _check_sequences(config)
    if config.data.source != SCENE and (config.data.near or config.data.far):
        raise ValueError("config.data.near and far are depths of a scene; leave them at 0.0")
    if config.train.clip_norm and config.train.clip_value:
        raise ValueError("config.train.clip_norm and clip_value are both set; set one of them to 0")


def _check_sequences(config):
    """Raise a ``ValueError`` for a sequence whose entries are of another kind."""
    train, augment = config.train, config.augment
    for name in ("scale", "ratio"):
        pair = augment[name]
        if len(pair) != 2 or not all(value in LATENCY for value in pair) or pair[0] > pair[1]:
            raise ValueError(f"config.augment.{name} must be two rising, positive numbers, got {pair!r}")
    if augment.scale[1] > 1:
        raise ValueError(f"config.augment.scale must be at most the whole image, 1, got {augment.scale!r}")
    if augment.policy not in ("", "3a"):
        parse_policy(augment.policy)
    for name in ("rates", "optimizer_options"):
        for pair in train[name]:
            is_pair = isinstance(pair, tuple | list) and len(pair) == 2 and isinstance(pair[0], str)
            if not is_pair or not (name == "optimizer_options" or pair[1] in _WEIGHT):
                raise ValueError(
                    f"config.train.{name} must hold pairs of a name and a value, such as "
                    f"{EXAMPLES[name]}, got {pair!r}"
                )
    for pair in () if is_file(config.model.layers) else config.model.layers:
        if not (isinstance(pair, tuple | list) and len(pair) == 2 and pair[1] in LAYER_CHOICES):
            raise ValueError(
                "config.model.layers must be a file's name, or hold pairs of a layer and its choice, such as "
                f'("stage1/block1/mlp/fc1", "shift"), got {pair!r}'
            )
    for pattern in train.frozen:
        if not isinstance(pattern, str):
            raise ValueError(f"config.train.frozen must hold names' patterns, got {pattern!r}")
    for name in train.writers:
        check_choice("config.train.writers", name, WRITERS)


def with_steps(config: ml_collections.ConfigDict, images: int) -> ml_collections.ConfigDict:
    """``config``, with lengths in steps where it has them in epochs of ``images`` images.

    Raises:
      ValueError: a warm-up and a cool-down that are longer than the whole.
    """
    config = config.copy_and_resolve_references()
    settings = config.train
    for name in LENGTHS:
        epochs = settings[f"{name}epochs"]
        if epochs:
            settings[f"{name}steps"] = max(1, round(epochs * images / config.data.batch_size))
    ends = settings.epochs or settings.warmup_epochs or settings.cooldown_epochs
    if ends and settings.warmup_steps + settings.cooldown_steps >= settings.steps:
        raise ValueError(
            f"a warm-up of {settings.warmup_steps} steps and a cool-down of {settings.cooldown_steps} leave "
            f"nothing of {settings.steps}; raise config.train.epochs or shorten them"
        )
    return config


def is_file(value: object) -> bool:
    """Whether a sequence is no values, but the name of a file of them."""
    return isinstance(value, tuple | list) and len(value) == 1 and isinstance(value[0], str)


def _check_latencies(latencies):
    if is_file(latencies):
        return
    is_sequence = isinstance(latencies, tuple | list)
    pairs = [latencies]
    if is_sequence and latencies and all(isinstance(entry, tuple | list) for entry in latencies):
        pairs = [entry[-1] for entry in latencies if entry]  # by a layer's name
    is_whole = is_sequence and all(
        isinstance(pair, tuple | list) and len(pair) == 2 and all(latency in LATENCY for latency in pair)
        for pair in pairs
    )
    if not is_whole:
        raise ValueError(
            f"config.train.latencies must be two positive, finite numbers, or the name of a file of them, "
            f"got {latencies!r}"
        )


def flat(config: ml_collections.ConfigDict) -> dict[str, Any]:
    """The values of ``config`` by keys such as ``train.steps``."""
    return {
        f"{group}.{name}" if isinstance(part, dict) else group: value
        for group, part in config.to_dict().items()
        for name, value in (part.items() if isinstance(part, dict) else ((group, part),))
    }


def filled(config: ml_collections.ConfigDict, values: Mapping[str, Any]) -> ml_collections.ConfigDict:
    """``config``, with those of ``values`` (by keys such as ``model.name``) that it leaves open."""
    config = config.copy_and_resolve_references()
    for name in DEFAULTS:
        group, key = name.split(".")
        if config[group][key] in (None, "") and values.get(name) not in (None, ""):
            config[group][key] = values[name]
    return config


def resolved_defaults() -> ml_collections.ConfigDict:
    """`default_config`, with the values that a run has where nothing else says them."""
    return filled(default_config(), DEFAULTS)
