"""The keys of a config, with the values that train the demo's dense model on the digits."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import ml_collections
from ml_collections.config_dict import placeholder

from shiftaddvit_jax.data import AUGMENTATIONS
from shiftaddvit_jax.names import SOURCES
from shiftaddvit_jax.validation import check_choice

# What a run has where neither the config nor the checkpoint that it starts from says it.
DEFAULTS = {
    "model.name": "pvt_v2_nano",
    "model.attention": "msa",
    "model.mlp": "dense",
    "model.projections": "dense",
    "model.weight_bits": 5,
    "model.activations": "float",
    "model.threshold": "sample",
    "data.image_size": 32,
}


def default_config() -> ml_collections.ConfigDict:
    """The whole config of one run, locked: an unknown key is an error.

    ``attention``, ``mlp`` and ``projections`` are as in `shiftaddvit_jax.create_model`: one kind, or one a
    stage, separated by commas. ``init_from`` is a checkpoint's folder; its model is reparameterized to the
    model described under ``model``. What is left open, ``""`` or None, is the checkpoint's, or without one
    that of `DEFAULTS`.
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
                "activations": "",
                "threshold": "",
            },
            "data": {
                "source": "digits",  # digits, folder or idx
                "path": "",
                "image_size": placeholder(int),
                "batch_size": 64,
                "augmentation": "affine",  # none, affine or crop_flip
            },
            "train": {
                "steps": 1000,
                "learning_rate": 2e-3,
                "warmup_steps": 100,
                "weight_decay": 0.05,
                "label_smoothing": 0.1,
                "clip_norm": 1.0,  # 0: no clipping
                # The latency-aware load-balancing loss: its weight (the paper's), and the latencies of the
                # dense and the shift expert (the authors' 6:4; only their ratio counts). The name of a file
                # of `shiftaddvit measure-latency` gives each layer latencies of its own.
                "balance_weight": 0.01,
                "latencies": (6.0, 4.0),
                "log_every": 50,
                "evaluate_every": 250,
                "checkpoint_every": 250,
            },
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
# Of every number in a config.
RANGES = {
    "seed": Range(0, 2**32 - 1, whole=True),
    "model.dropout": _RATE,
    "model.drop_path": _RATE,
    "model.weight_bits": Range(2, 8, whole=True),
    "data.image_size": _COUNT,
    "data.batch_size": _COUNT,
    "train.steps": _COUNT,
    "train.learning_rate": Range(0, without_low=True),
    "train.warmup_steps": Range(0, whole=True),
    "train.weight_decay": _WEIGHT,
    "train.label_smoothing": _RATE,
    "train.clip_norm": _WEIGHT,
    "train.balance_weight": _WEIGHT,
    "train.log_every": _COUNT,
    "train.evaluate_every": _COUNT,
    "train.checkpoint_every": _COUNT,
}
LATENCY = Range(0, without_low=True)
CHOICES = {
    "data.source": SOURCES,
    "data.augmentation": AUGMENTATIONS,
    "model.activations": ("float", "int8", "fixed_point"),
    "model.threshold": ("zero", "sample", "tensor"),
}


def check_config(config: ml_collections.ConfigDict) -> None:
    """Raise a ``ValueError`` unless ``config`` has the keys of `default_config`, and values in range."""
    values, known = _flat(config), _flat(default_config())
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
        if isinstance(known[name], str) and not isinstance(value, str):
            raise ValueError(f"config.{name} must be text, got {value!r}")
        if name in CHOICES and not (value == "" and name in DEFAULTS):
            check_choice(f"config.{name}", value, CHOICES[name])
    _check_latencies(config.train.latencies)


def _check_latencies(latencies):
    is_sequence = isinstance(latencies, tuple | list)
    if is_sequence and len(latencies) == 1 and isinstance(latencies[0], str):  # a file's name
        return
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


def _flat(config):
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
