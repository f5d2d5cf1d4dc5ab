"""The pass through a model that converts its layers, one after the other."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import PyTree

from shiftaddvit_jax.calibrate.branch import (
    Path,
    Place,
    choice_of,
    find_branches,
    linear_modules,
    visiting_branches,
)
from shiftaddvit_jax.calibrate.choice import Budget, Proxy, choose_layers, energy
from shiftaddvit_jax.calibrate.fit import add_moments, decibels, fit_dense, fit_layer
from shiftaddvit_jax.calibrate.routing import fit_mixture
from shiftaddvit_jax.calibrate.smoothing import smooth
from shiftaddvit_jax.models.gnt import Samples
from shiftaddvit_jax.models.inspect import Examples, count_of, module_variables, on_xla, run, take
from shiftaddvit_jax.models.kinds import stage_kinds
from shiftaddvit_jax.models.registry import linear_layer, model_task
from shiftaddvit_jax.models.variables import linear_layers
from shiftaddvit_jax.names import LINEAR_KINDS, PAPER_LATENCIES
from shiftaddvit_jax.nn.kernels import is_packed
from shiftaddvit_jax.nn.moe import aimed_shift_share
from shiftaddvit_jax.nn.primitives import Rotation
from shiftaddvit_jax.progress import progress_bar
from shiftaddvit_jax.reparameterize import learn_hashes, reparameterize
from shiftaddvit_jax.validation import check_images

logger = logging.getLogger(__name__)

HASHED_IMAGES = 64  # from whose tokens hashes are learned
Latencies = Sequence[float] | Mapping[str, Sequence[float]]


class CalibratedLayer(NamedTuple):
    """What a layer became, and how near it comes to the dense layer in its place, on the calibration images.

    Both ratios are in decibels, over all tokens: the variance of what the layer should put out, over the mean
    square of what is missing, while the layers before it are converted already.

    Attributes:
      name: such as ``stage1/block1/mlp/fc1``.
      choice: what it is now, one of `shiftaddvit_jax.names.LAYER_CHOICES`.
      rounded: signal to noise with the parameters that `reparameterize` makes.
      calibrated: signal to noise with those that `calibrate` makes.
      energy: of its products for one image in microjoules, see `energy`.
    """

    name: str
    choice: str
    rounded: float
    calibrated: float
    energy: float


def calibrate(
    model: nn.Module,
    variables: PyTree,
    images: Examples,
    *,
    attention: str | Sequence[str] | None = None,
    mlp: str | Sequence[str] | None = None,
    projections: str | Sequence[str] | None = None,
    weight_terms: int = 1,
    rotation: Rotation | None = None,
    layers: Mapping[str, str] | None = None,
    budget: float | None = None,
    proxy: Proxy = "agreement",
    latencies: Latencies = PAPER_LATENCIES,
    smoothing: float = 0.0,
) -> tuple[nn.Module, PyTree]:
    """``model`` with shift layers that come near its dense layers on ``images``, and their variables.

    Where `reparameterize` rounds each weight for itself, here the errors of a layer's weights make up for one
    another, for the tokens of ``images``: weights are rounded input by input, those with the largest variance
    first, and each error is spread over the weights not rounded yet by second-order compensation (GPTQ, arXiv
    2210.17323). Layers come in the order of the forward pass. Each gets what the converted layers before it
    put out, and is fitted to what the dense model has in its place (GPTAQ, arXiv 2504.02692); the last layer
    of a branch also to what the residual stream lacks. Biases take up the mean error.

    The new kernels are exactly powers of two, or sums and differences of two, so that `pack` loses nothing
    with float activations. Mixtures get routers that send the tokens that lose most to their dense experts.
    The other parameters stay the same. The result depends on the arguments alone. The log counts decibels,
    and at level DEBUG those of each layer; `calibrate_with_report` returns them.

    Args:
      model: from `create_model`, with dense linear layers.
      variables: its variables, not packed.
      images: float32 [batch, size, size, 3], the model's inputs; a few hundred, without labels. For a model
        that renders views, what `shiftaddvit_jax.novel_views.sample_rays` draws.
      attention: as in `reparameterize`. Hashes are learned from the images, and the attention's last layer is
        fitted to what the old attention put out; what else is new is drawn at random.
      mlp: ``"shift"``, ``"moe"`` or ``"dense"`` for the MLPs' linear layers: one kind, or one a stage; by
        default dense.
      projections: the same for the attentions' linear layers.
      weight_terms: powers of two in a weight, 1 or 2.
      rotation: ahead of the new attention's binarization, as in `create_model`; by default unchanged.
      layers: single layers' choices, as in `create_model`.
      budget: what the conversion may cost in points of the ``proxy``. Each layer that ``mlp`` and
        ``projections`` make a shift layer then becomes what takes the least energy within the budget: one
        term, two terms, a mixture or dense in int8.
      proxy: ``"agreement"``: the budget is the share of the images, in percent, whose class may differ from
        the dense model's; ``"error"``: the mean squared error of the logits, in percent of their variance.
      latencies: of the dense and of the shift expert, which say how a mixture shares out its tokens; also by
        the layer's name, as ``shiftaddvit measure-latency`` measures them.
      smoothing: above 0 to 1, outlier channels of LayerNorms go into weights first, which helps activations
        in int8; SmoothQuant's strength is 0.5.

    Raises:
      ValueError: no layer to convert, other kinds, a model that is converted or variables that are packed
        already, no images or images of another size, numbers that are not finite, a budget below 0.
    """
    return calibrate_with_report(
        model,
        variables,
        images,
        attention=attention,
        mlp=mlp,
        projections=projections,
        weight_terms=weight_terms,
        rotation=rotation,
        layers=layers,
        budget=budget,
        proxy=proxy,
        latencies=latencies,
        smoothing=smoothing,
    )[:2]


def calibrate_with_report(
    model: nn.Module,
    variables: PyTree,
    images: Examples,
    *,
    attention: str | Sequence[str] | None = None,
    mlp: str | Sequence[str] | None = None,
    projections: str | Sequence[str] | None = None,
    weight_terms: int = 1,
    rotation: Rotation | None = None,
    layers: Mapping[str, str] | None = None,
    budget: float | None = None,
    proxy: Proxy = "agreement",
    latencies: Latencies = PAPER_LATENCIES,
    smoothing: float = 0.0,
) -> tuple[nn.Module, PyTree, tuple[CalibratedLayer, ...]]:
    """What `calibrate` returns, and how near each layer comes, in the order of the forward pass."""
    check_dense(model, variables)
    kinds: dict[str, Any] = _kinds(model, mlp, projections)
    if attention is None and not layers and set(kinds["mlp"] + kinds["projections"]) == {"dense"}:
        raise ValueError("nothing to calibrate: give mlp='shift', projections='shift' or both")
    _check_examples(model, images)
    if isinstance(images, Samples):
        _check_for_views(budget, proxy, smoothing)
    elif smoothing:
        variables = smooth(model, variables, images, smoothing)

    def convert(layers):
        student, rounded = reparameterize(
            model,
            variables,
            attention=attention,
            weight_terms=weight_terms,
            rotation=rotation,
            layers=layers,
            **kinds,
        )
        if not isinstance(images, Samples):  # no attention along rays learns hashes
            rounded = learn_hashes(student, rounded, jnp.asarray(images[:HASHED_IMAGES]), jax.random.key(0))
        return _convert(model, variables, images, student, rounded, latencies)

    if budget is None:
        return convert(layers)
    asked = model.clone(**kinds)
    shares = {
        path: shift_share(latencies, path)
        for path in linear_layers(model)
        if linear_layer(asked, path.split("/"))[0] == "shift"
    }
    # Mixtures are predicted with as many terms as they get; dense layers have none.
    settings = dataclasses.replace(model.primitives, weight_terms=weight_terms)
    return choose_layers(
        model.clone(primitives=settings),
        variables,
        images,
        shares,
        Budget(float(budget), proxy),
        lambda chosen: convert({**(layers or {}), **chosen}),
    )


def _convert(model, variables, images, student, rounded, latencies):
    """The student with its layers fitted, its variables and the report."""
    fitted, report, few = {}, [], []
    learners, count = find_branches(student, rounded, images), count_of(images)

    def convert(name, teacher, both):
        both = jax.tree.map(np.asarray, both)
        tokens = dense, own = take(both, slice(count)), take(both, slice(count, None))
        learner = learners[name, teacher.method]
        old, new = module_variables(name, variables), module_variables(name, rounded)
        modules = linear_modules(teacher, old, dense)
        renewed = len({getattr(branch.module, "attention", None) for branch in (teacher, learner)}) > 1
        for path, module in linear_modules(learner, new, dense).items():
            choice = choice_of(module)
            refit = path[-1] == "proj" and renewed
            if path not in modules or (choice == "dense" and not refit):
                continue
            full = "/".join((name, *path))
            bar.update(task, note=full)
            share = shift_share(latencies, full)
            fit, layer, is_few = _fit(Place(teacher, learner, path), module, (old, new), tokens, full, share)
            few.extend([full] * is_few)
            report.append(layer)
            logger.debug("%s (%s): %.1f dB rounded, %.1f dB calibrated", *layer[:4])
            new = _with_layer(new, path, fit)
            flat = flatten_dict(fit)
            fitted.update({("params", *full.split("/"), *leaf): value for leaf, value in flat.items()})
        bar.advance(task, len(modules))
        return np.concatenate([teacher.run(old, dense), learner.run(new, own)])

    # One forward pass of all images converts each branch when its input arrives. The first half of the batch
    # is the dense model's, the second half the new model's.
    with progress_bar() as bar:
        task = bar.add_task("calibrating", total=len(linear_layers(model)), note="")
        with nn.intercept_methods(visiting_branches(convert)):
            run(on_xla(model), variables, jax.tree.map(lambda leaf: np.concatenate([leaf, leaf]), images))
    if few:
        logger.warning(
            "%d layers, such as %s, have no more tokens than inputs, which damping makes up for; give more",
            len(few),
            few[0],
        )
    means = (np.mean([getattr(layer, column) for layer in report]) for column in ("rounded", "calibrated"))
    logger.info("%d layers: %.1f dB rounded, %.1f dB calibrated, on average", len(report), *means)
    return student, unflatten_dict(flatten_dict(rounded) | fitted), tuple(report)


def _fit(
    place: Place, module: nn.Module, variables, tokens, name: str, share: float
) -> tuple[dict[str, Any], CalibratedLayer, bool]:
    """The layer's parameters, its report, and whether it has no more tokens than inputs."""

    def pairs():
        return place.pairs(variables, tokens)

    old, new = (_layer(tree, place.path) for tree in variables)
    moments = add_moments(pairs())
    if not all(np.isfinite(total).all() for total in moments):
        raise ValueError(f"what goes into {name} overflows on these images; expected finite numbers")
    choice, kernel = choice_of(module), old["kernel"]
    signal = np.sum(moments.centred()[2]) / moments.count
    noises: list[Any]
    if choice in ("shift", "shift_two_terms"):
        fit: dict[str, Any] = fit_layer(moments, kernel, module.weight_bits, module.weight_terms)
        noises = [moments.noise(**new), moments.noise(**fit)]
    elif choice == "moe":
        dense, shift = (
            fit_dense(moments, kernel),
            fit_layer(moments, kernel, module.weight_bits, module.weight_terms),
        )
        fit, noise = fit_mixture(pairs, dense, shift, share)
        noises = [moments.noise(**new["shift"]), noise]
    else:
        fit = fit_dense(moments, kernel)
        after = variables[0], _with_layer(variables[1], place.path, fit)
        noises = [place.noise(variables, tokens), place.noise(after, tokens)]
    rounded, calibrated = (decibels(float(signal), float(np.sum(noise))) for noise in noises)
    products = float(moments.count) / count_of(tokens[0]) * np.size(kernel)
    report = CalibratedLayer(
        name, choice, rounded, calibrated, energy(choice, products, place.learner.module.primitives, share)
    )
    return fit, report, bool(moments.count <= len(moments.inputs))


def _layer(variables: PyTree, path: Path) -> Mapping[str, Any]:
    return jax.tree.map(np.asarray, module_variables("/".join(path), variables)["params"])


def _with_layer(variables: PyTree, path: Path, fit: Mapping[str, Any]) -> PyTree:
    """A block's variables with a layer's new parameters."""
    leaves = {("params", *path, *leaf): jnp.asarray(value) for leaf, value in flatten_dict(fit).items()}
    return unflatten_dict(flatten_dict(variables) | leaves)


def shift_share(latencies: Latencies, name: str) -> float:
    """The share of a layer's tokens for a mixture's shift expert, at which both experts take as long."""
    if not isinstance(latencies, Mapping):
        return aimed_shift_share(latencies)
    if name not in latencies:
        raise ValueError(
            f"no latencies for {name}; measure them for this model, or give one pair for all layers"
        )
    return aimed_shift_share(latencies[name])


def _kinds(model, mlp, projections):
    """The kinds of the new model's linear layers, one a stage."""
    return {
        name: stage_kinds(name, kind or "dense", LINEAR_KINDS, len(model.attention))
        for name, kind in (("mlp", mlp), ("projections", projections))
    }


def check_dense(model: nn.Module, variables: PyTree) -> None:
    """Raise a ``ValueError`` unless all linear layers are dense, and weights finite and not packed."""
    if is_packed(variables["params"]):
        raise ValueError("the variables are packed; expected a dense model's as they were trained")
    for name in ("mlp", "projections"):
        others = sorted(set(getattr(model, name)) - {"dense"})
        if others:
            raise ValueError(
                f"{model.variant} is converted already: its {name} has {', '.join(others)} layers; "
                "expected the dense model that it was made from"
            )
    if model.primitives.layers:
        path, choice = model.primitives.layers[0]
        raise ValueError(
            f"{model.variant} is converted already: {path} is {choice}; expected the dense model that it was "
            "made from"
        )
    for name, leaf in flatten_dict(variables, sep="/").items():
        if not np.isfinite(np.asarray(leaf, np.float32)).all():
            raise ValueError(f"{name} has numbers that are not finite; expected trained weights")


def _check_examples(model, images):
    views = model_task(model) == "novel_views"
    what, have = ("rays", "samples") if views else ("images", "pixels")
    if views != isinstance(images, Samples):
        wanted = "samples of rays, see sample_rays" if views else "images"
        raise ValueError(f"{model.variant} is fitted to {wanted}; got {type(images).__name__}")
    if not views:
        check_images(images)
    if not count_of(images):
        raise ValueError(f"there are no {what} to calibrate on; give a few hundred")
    if not views and images.shape[1:3] != (model.image_size,) * 2:
        raise ValueError(
            f"images must be {model.image_size} x {model.image_size} pixels for {model.variant}, got "
            f"{images.shape[1]} x {images.shape[2]}"
        )
    if not all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(images)):
        raise ValueError(f"{what} have {have} that are not finite; expected numbers")


def _check_for_views(budget, proxy, smoothing):
    if budget is not None and proxy != "error":
        raise ValueError(f"proxy {proxy!r} compares classes; for a model that renders views take 'error'")
    if smoothing:
        raise ValueError("smoothing is for classifiers; leave it at 0 for a model that renders views")
