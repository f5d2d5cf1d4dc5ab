"""Optimizers by name, with what timm's recipes put around them, as transformations of Optax."""

import fnmatch
import re
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache, partial
from typing import Any

import jax
import optax
import optax.contrib
from jaxtyping import PyTree

from shiftaddvit_jax.validation import check_choice

TOKENS = ("pos_embed", "cls_token", "dist_token")


def create_optimizer(
    name: str,
    learning_rate: float | optax.Schedule,
    *,
    weight_decay: float = 0.0,
    clip: float = 0.0,
    clip_mode: str = "norm",
    layer_decay: float = 1.0,
    rates: Mapping[str, float] | None = None,
    frozen: Sequence[str] = (),
    accumulate: int = 1,
    options: Mapping[str, Any] | None = None,
) -> optax.GradientTransformation:
    """An optimizer of a model's parameters.

    Weights decay in proportion to the learning rate, and to a parameter's own rate. Patterns are shell
    patterns of a parameter's name, such as ``"stage1/*"`` or ``"*/norm?/*"``; ``*`` matches slashes too.

    Equal settings give the same object: as a static argument of `jax.jit`, it compiles a step once.

    Args:
      name: one of `OPTIMIZERS`.

        - ``"adamw"``: Loshchilov and Hutter, 2019.
        - ``"lamb"``: You et al., 2020; like timm's, only parameters that decay adapt to their norm. timm's
          also clips gradients: ``clip=1``.
        - ``"lion"``: Chen et al., 2023.
        - ``"sgd"``: Nesterov momentum of 0.9; the decay is added to the gradient.
        - ``"muon"``: Jordan, 2024, for linear layers' kernels but the head's, with updates as large as
          AdamW's (Liu et al., 2025); AdamW for everything else.
      learning_rate: a number, or a function of the number of updates, such as `cosine_schedule` returns.
      weight_decay: how much weights decay; see `decayed` for which.
      clip: largest norm or value of gradients; 0 is none.
      clip_mode: ``"norm"``, of all gradients together, or ``"value"``, of each number.
      layer_decay: factor of the learning rate from one layer to the one before it, see `layer_ids`.
      rates: factors of the learning rate by pattern; of several that match, the first counts.
      frozen: patterns of parameters that stay as they are.
      accumulate: number of gradients whose mean makes one update.
      options: arguments of Optax's own function, such as ``{"b2": 0.95}``.

    Raises:
      ValueError: an unknown name, option or mode, a number out of range; on the first call of ``init``, a
        pattern that no parameter's name matches.
    """
    check_choice("optimizer", name, OPTIMIZERS)
    check_choice("clip_mode", clip_mode, ("norm", "value"))
    for what, value in (("weight_decay", weight_decay), ("clip", clip)):
        if value < 0:
            raise ValueError(f"{what} must be at least 0, got {value}")
    if not 0 < layer_decay <= 1:
        raise ValueError(f"layer_decay must be above 0 and at most 1, got {layer_decay}")
    if accumulate < 1:
        raise ValueError(f"accumulate must be at least 1, got {accumulate}")
    patterns = tuple((rates or {}).items()), tuple(frozen)
    chosen = tuple(sorted((options or {}).items()))
    return _optimizer(
        name, learning_rate, weight_decay, clip, clip_mode, layer_decay, *patterns, accumulate, chosen
    )


@lru_cache(maxsize=32)
def _optimizer(
    name, learning_rate, weight_decay, clip, clip_mode, layer_decay, rates, frozen, accumulate, options
):
    try:
        direction = OPTIMIZERS[name](**dict(options))
    except TypeError as error:
        raise ValueError(f"options of {name}: {error}") from None

    decay = optax.add_decayed_weights(weight_decay, mask=decayed)
    parts = [direction, decay]
    if name == "sgd":
        parts.reverse()
    if name == "lamb" and weight_decay:
        parts.append(optax.masked(optax.scale_by_trust_ratio(), decayed))
    if clip:
        parts.insert(0, {"norm": optax.clip_by_global_norm, "value": optax.clip}[clip_mode](clip))
    parts.append(optax.scale_by_learning_rate(learning_rate))
    held = partial(_matching, patterns=frozen)
    optimizer = optax.chain(
        # What is frozen has no state, and no part in the norm.
        optax.masked(optax.chain(*parts), lambda params: jax.tree.map(lambda x: not x, held(params))),
        _scale_rates(
            lambda params: learning_rate_factors(params, layer_decay=layer_decay, rates=dict(rates))
        ),
        optax.masked(optax.set_to_zero(), held),
    )
    if accumulate > 1:
        return optax.MultiSteps(optimizer, accumulate).gradient_transformation()
    return optimizer


def decayed(params: PyTree) -> PyTree:
    """Which parameters decay: all but norms, biases, position embeddings, class and distillation tokens."""

    def decays(path, leaf):
        return leaf.ndim > 1 and path[-1].key not in (*TOKENS, "position_bias")

    return jax.tree.map_with_path(decays, params)


def layer_ids(params: PyTree) -> PyTree:
    """Each parameter's layer, counted from the image, as timm groups them.

    In a ViT, layer 0 holds patch embedding, position embedding and tokens, layer n is block n, and the last
    block's has the last norm. In a PVT or PVTv2, layer 0 holds the first stage's patch and position
    embedding, layer n the rest of stage n. The head comes after these.
    """
    blocks = [int(found[1]) for name in _names(params) if (found := re.match(r"(?:block|stage)(\d+)/", name))]
    last = max(blocks, default=0)

    def layer(path, leaf):
        name = _name(path)
        if name.startswith("head"):
            return last + 1
        if name.startswith("norm/"):
            return last
        if re.match(rf"(stage1/)?(patch_embed|{'|'.join(TOKENS)})(/|$)", name):
            return 0
        found = re.match(r"(?:block|stage)(\d+)/", name)
        return int(found[1]) if found else last

    return jax.tree.map_with_path(layer, params)


def learning_rate_factors(
    params: PyTree, *, layer_decay: float = 1.0, rates: Mapping[str, float] | None = None
) -> PyTree:
    """Each parameter's factor of the learning rate; arguments as in `create_optimizer`.

    Raises:
      ValueError: a pattern that no parameter's name matches.
    """
    rates = rates or {}
    _check_patterns(params, rates)
    ids = layer_ids(params)
    last = max(jax.tree.leaves(ids))

    def factor(path, layer):
        own = next(
            (rate for pattern, rate in rates.items() if fnmatch.fnmatchcase(_name(path), pattern)), 1.0
        )
        return own * layer_decay ** (last - layer)

    return jax.tree.map_with_path(factor, ids)


def _scale_rates(factors: Callable[[PyTree], PyTree]) -> optax.GradientTransformation:
    def init(params):
        factors(params)  # finds what is wrong before the first step
        return optax.EmptyState()

    def update(updates, state, params=None):
        return jax.tree.map(lambda update, factor: update * factor, updates, factors(params)), state

    return optax.GradientTransformation(init, update)


def _matching(params: PyTree, patterns: tuple[str, ...]) -> PyTree:
    """Which parameters' names match one of the patterns."""
    _check_patterns(params, patterns)
    return jax.tree.map_with_path(
        lambda path, leaf: any(fnmatch.fnmatchcase(_name(path), pattern) for pattern in patterns), params
    )


def _check_patterns(params, patterns):
    names = _names(params)
    for pattern in patterns:
        if not any(fnmatch.fnmatchcase(name, pattern) for name in names):
            raise ValueError(f"no parameter's name matches {pattern!r}; names are like {names[0]!r}")


def _names(params):
    return [_name(path) for path, _ in jax.tree.leaves_with_path(params)]


def _name(path):
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _sgd(momentum: float = 0.9, nesterov: bool = True) -> optax.GradientTransformation:
    return optax.trace(momentum, nesterov)


def _muon(**options: Any) -> optax.GradientTransformation:
    def kinds(params):
        def kind(path, leaf):
            inner = path[-1].key == "kernel" and not _name(path).startswith("head")
            return "muon" if inner and leaf.ndim == 2 else "adam"

        return jax.tree.map_with_path(kind, params)

    # Updates as large as AdamW's; their decay and learning rate come after them, as for the others.
    settings: dict[str, Any] = {"consistent_rms": 0.2, **options}
    muon = optax.contrib.muon(1.0, **settings)
    return optax.partition(
        {"muon": optax.chain(muon, optax.scale(-1.0)), "adam": optax.scale_by_adam()}, kinds
    )


# By name: the direction of a step, before the decay and the learning rate.
OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adamw": optax.scale_by_adam,
    "lamb": partial(optax.scale_by_adam, eps=1e-6),
    "lion": optax.scale_by_lion,
    "sgd": _sgd,
    "muon": _muon,
}
