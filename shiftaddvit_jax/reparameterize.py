"""From one model's parameters to another's: attention first, then linear layers (the paper's two stages)."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Array, Float, PRNGKeyArray, PyTree

from shiftaddvit_jax.models.kinds import stage_attention, stage_kinds
from shiftaddvit_jax.models.registry import linear_layer, model_family, with_layers
from shiftaddvit_jax.models.variables import LINEAR_LAYERS, init_named, variable_shapes
from shiftaddvit_jax.names import PERFORMER_FEATURES, ROTATIONS
from shiftaddvit_jax.nn import LINEAR_KINDS
from shiftaddvit_jax.nn.attention import DRAW_FEATURES
from shiftaddvit_jax.nn.kernels import is_packed
from shiftaddvit_jax.nn.primitives import PerformerFeatures, Rotation
from shiftaddvit_jax.ops import power_of_two, two_powers_of_two
from shiftaddvit_jax.ops.power_of_two import check_weight_terms
from shiftaddvit_jax.validation import check_choice

logger = logging.getLogger(__name__)

# What each linear layer of an attention computes. Shared queries and keys come from the queries.
_ATTENTION_PARTS = {"qkv": "qkv", "q": "q", "kv": "kv", "qk": "q", "v": "v"}


@dataclass(frozen=True)
class Report:
    """What happened to every parameter, by its name.

    Attributes:
      inherited: each parameter of the student that comes from the teacher, and how.
      made: the student's parameters that are new, drawn at random.
      dropped: the teacher's parameters that the student does not use.
    """

    inherited: dict[str, str]
    made: tuple[str, ...]
    dropped: tuple[str, ...]

    def __str__(self) -> str:
        """One line for each new or dropped parameter, and a count of the inherited ones."""
        lines = [f"inherits {len(self.inherited)} parameters"]
        lines += [f"  makes {name}" for name in self.made]
        lines += [f"  drops {name}" for name in self.dropped]
        return "\n".join(lines)


def reparameterize(
    model: nn.Module,
    variables: PyTree,
    *,
    attention: str | Sequence[str] | None = None,
    mlp: str | Sequence[str] | None = None,
    projections: str | Sequence[str] | None = None,
    weight_terms: int | None = None,
    rotation: Rotation | None = None,
    performer_features: PerformerFeatures | None = None,
    layers: Mapping[str, str] | None = None,
    key: PRNGKeyArray | None = None,
) -> tuple[nn.Module, PyTree]:
    """``model`` with other attentions or linear layers, and its variables made from ``variables``.

    Stage 1 changes ``attention``: the linear layers are inherited bit for bit, and shared queries and keys
    inherit the queries' layer. Stage 2 changes ``mlp`` and ``projections``, or single ``layers``: a new shift
    kernel is exactly ``power_of_two(old kernel)``, or ``two_powers_of_two(old kernel)`` with two terms; a
    mixture's dense expert is exactly the old layer, and its shift expert is the old layer rounded. Parameters
    without an origin (routers, convolutions of V, hashes) are drawn from ``key``. ``variables`` is never
    changed. The log counts the parameters that are made and dropped, and at level DEBUG names them;
    `reparameterization_report` returns the names.

    Args:
      model: from `create_model`.
      variables: the model's variables.
      attention: as in `create_model`; by default unchanged.
      mlp: likewise.
      projections: likewise.
      weight_terms: powers of two in a shift layer's weight, 1 or 2; by default unchanged.
      rotation: ahead of binarization, as in `create_model`; by default unchanged.
      performer_features: as in `create_model`; by default unchanged.
      layers: single layers' choices, as in `create_model`, instead of all that the model has; by default
        unchanged.
      key: random key for the parameters that are made; by default ``jax.random.key(0)``.

    Raises:
      ValueError: unknown kinds, or variables that are not the model's (with the names that differ).
    """
    student = _student(model, attention, mlp, projections, layers, weight_terms, rotation, performer_features)
    derived, report = _derive(model, variables, student)
    if report.made:
        derived |= init_named(student, report.made, jax.random.key(0) if key is None else key)
    counts = len(report.inherited), len(report.made), len(report.dropped)
    logger.info("%s inherits %d parameters, makes %d and drops %d", student.variant, *counts)
    logger.debug("%s", report)
    return student, unflatten_dict(derived, sep="/")


def reparameterization_report(
    model: nn.Module,
    variables: PyTree,
    *,
    attention: str | Sequence[str] | None = None,
    mlp: str | Sequence[str] | None = None,
    projections: str | Sequence[str] | None = None,
    weight_terms: int | None = None,
    rotation: Rotation | None = None,
    performer_features: PerformerFeatures | None = None,
    layers: Mapping[str, str] | None = None,
) -> Report:
    """What `reparameterize` would inherit, make and drop."""
    student = _student(model, attention, mlp, projections, layers, weight_terms, rotation, performer_features)
    return _derive(model, variables, student)[1]


def learn_hashes(
    model: nn.Module, variables: PyTree, images: Float[Array, "batch height width 3"], key: PRNGKeyArray
) -> PyTree:
    """``variables`` with every hash learned from the tokens of ``images``, layer after layer.

    Models without hashed attention keep their variables as they are.
    """
    if "hash" not in variables:
        return variables
    _, learned = jax.jit(partial(model.apply, mutable=["hash"]))(variables, images, rngs={"hash": key})
    return {**variables, **learned}


def redraw_features(model: nn.Module, variables: PyTree, key: PRNGKeyArray) -> PyTree:
    """``variables`` with the random features of every ``"performer"`` attention drawn anew from ``key``.

    They are of the kind that ``model`` draws, see ``performer_features`` in `create_model`.
    """
    if "features" not in variables:
        return variables
    leaves, structure = jax.tree.flatten(variables["features"])
    keys = jax.random.split(key, len(leaves))
    draw = DRAW_FEATURES[model.primitives.performer_features]
    drawn = [draw(key, *leaf.shape) for key, leaf in zip(keys, leaves, strict=True)]
    return {**variables, "features": jax.tree.unflatten(structure, drawn)}


def check_variables(model: nn.Module, variables: PyTree, shapes: PyTree | None = None) -> None:
    """Raise a ``ValueError`` that names the parameters in which ``variables`` differs from ``model``'s.

    ``shapes`` are those that are expected, by default of variables that are not packed.
    """
    if shapes is None and is_packed(variables["params"]):
        raise ValueError("the variables are packed; expected a model's as they were trained")
    expected = _flat_shapes(variable_shapes(model) if shapes is None else shapes)
    found = _flat_shapes(variables)
    differences = [f"{name} is missing" for name in sorted(expected.keys() - found.keys())]
    differences += [f"{name} is unexpected" for name in sorted(found.keys() - expected.keys())]
    differences += [
        f"{name} has shape {found[name]} instead of {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    if differences:
        shown = "; ".join(differences[:4]) + ("; ..." if len(differences) > 4 else "")
        raise ValueError(f"{len(differences)} parameters differ from those of {model.variant}: {shown}")


def _student(model, attention, mlp, projections, layers, weight_terms, rotation, performer_features):
    changes, stages = {}, len(model.attention)
    if attention is not None:
        known = model_family(model.variant).attention
        changes["attention"] = stage_attention(model.variant, attention, known, stages)
    if mlp is not None:
        changes["mlp"] = stage_kinds("mlp", mlp, LINEAR_KINDS, stages)
    if projections is not None:
        changes["projections"] = stage_kinds("projections", projections, LINEAR_KINDS, stages)
    settings = {
        "weight_terms": weight_terms,
        "rotation": rotation,
        "performer_features": performer_features,
    }
    settings = {name: value for name, value in settings.items() if value is not None}
    if settings:
        primitives = dataclasses.replace(model.primitives, **settings)
        check_weight_terms(primitives.weight_terms)
        check_choice("rotation", primitives.rotation, ROTATIONS)
        check_choice("performer_features", primitives.performer_features, PERFORMER_FEATURES)
        changes["primitives"] = primitives
    student = model.clone(**changes)
    return student if layers is None else with_layers(student, layers)


def _derive(teacher, variables, student):
    """The student's variables that come from the teacher's, flat, and the report."""
    if is_packed(variables["params"]):
        raise ValueError("the variables are packed; expected a model's as they were trained")
    check_variables(teacher, variables)
    source = flatten_dict(variables, sep="/")
    shapes = _flat_shapes(variable_shapes(student))
    derived, inherited, used = {}, {}, set()
    for name, shape in shapes.items():
        found = _origin(name, source, teacher, student)
        if found is None or found[0].shape != shape:
            continue
        derived[name], names, how = found
        inherited[name] = how
        used.update(names)
    made = tuple(name for name in shapes if name not in derived)
    dropped = tuple(name for name in source if name not in used)
    return derived, Report(inherited, made, dropped)


def _origin(name, source, teacher, student):
    """The origin of the student's ``name``: value, teacher's names, description; None without an origin."""
    path = name.split("/")
    pairs = enumerate(pairwise(path), start=1)
    at = next((i for i, (module, layer) in pairs if layer in LINEAR_LAYERS.get(module, ())), None)
    if at is None:
        redrawn = teacher.primitives.performer_features != student.primitives.performer_features
        if path[0] == "features" and redrawn:
            return None
        return (source[name], [name], name) if name in source else None
    prefix, layer, leaf = "/".join(path[:at]), path[at], "/".join(path[at + 1 :])
    (old, _), (new, settings) = (linear_layer(model, path[1 : at + 1]) for model in (teacher, student))
    round_ = power_of_two if settings.weight_terms == 1 else two_powers_of_two

    def present(candidate):
        return any(other.startswith(f"{prefix}/{candidate}/") for other in source)

    if present(layer):
        return _linear_origin(f"{prefix}/{layer}", leaf, old, new, source, round_)
    pieces = []
    for part in _ATTENTION_PARTS.get(layer, ""):
        holder = next((other for other in _ATTENTION_PARTS if part in other and present(other)), None)
        found = holder and _linear_origin(f"{prefix}/{holder}", leaf, old, new, source, round_)
        if not found:
            return None
        value, names, how = found
        if holder != "qk" and not leaf.startswith("router"):
            value = jnp.split(value, len(holder), axis=-1)[holder.index(part)]
        pieces.append((value, names, how))
    if not pieces:
        return None
    if leaf.startswith("router"):
        pieces = pieces[:1]
    values, names, how = zip(*pieces, strict=True)
    unique = list(dict.fromkeys(how))
    return (
        jnp.concatenate(values, axis=-1),
        [name for group in names for name in group],
        f"{layer} of {' and '.join(unique)}",
    )


def _linear_origin(layer, leaf, old, new, source, round_):
    """As `_origin`, for ``leaf`` of a linear layer whose kind goes from ``old`` to ``new``."""
    rounded = False
    name = f"{layer}/{leaf}"
    if old != new:
        expert, _, parameter = leaf.rpartition("/")
        if leaf.startswith("router"):
            return None
        if old == "moe":
            name = f"{layer}/{new}/{leaf}"
        else:
            name = f"{layer}/{parameter}"
            rounded = parameter == "kernel" and (expert or new) == "shift"
    if name not in source:
        return None
    value = round_(source[name]) if rounded else source[name]
    return value, [name], f"{round_.__name__}({name})" if rounded else name


def _flat_shapes(variables):
    leaves: dict[str, Any] = flatten_dict(variables, sep="/")
    return {name: leaf.shape for name, leaf in leaves.items()}
