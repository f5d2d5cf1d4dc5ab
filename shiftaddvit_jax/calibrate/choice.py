"""What each layer becomes under a budget: the least energy at which the whole model stays near the dense one.

The mean squared error of the logits is taken to be a sum over layers: what is missing from each output of a
layer, in mean square, times the squared slope of the logits by it. Step by step, a layer gets the choice that
takes most error away for its energy, until the predicted error is small enough. Then the model is converted
and measured; if it misses its budget, it is chosen for again with a smaller error.
"""

import logging
from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from shiftaddvit_jax.calibrate.branch import BATCH, Place, batches, linear_modules, visiting_branches
from shiftaddvit_jax.calibrate.fit import add_moments, fit_dense, fit_layer
from shiftaddvit_jax.calibrate.routing import fit_mixture
from shiftaddvit_jax.models.inspect import (
    Examples,
    count_of,
    module_variables,
    on_xla,
    outputs_of,
    run,
    take,
    watch,
)
from shiftaddvit_jax.names import LAYER_CHOICES, PROXIES
from shiftaddvit_jax.nn import Primitives
from shiftaddvit_jax.progress import progress_bar
from shiftaddvit_jax.validation import check_choice

logger = logging.getLogger(__name__)

Proxy = Literal["agreement", "error"]
Converted = tuple[nn.Module, PyTree, Any]  # a model, its variables and a report
# Picojoules of a product and its sum, of `costs/unit_energies.toml`: a shift of an int8 number and an int32
# addition for each power of two; a multiplication and an addition of dense factors by their format.
SHIFT = 0.024 + 0.1
MULTIPLY = {"float32": 3.7 + 0.9, "bfloat16": 1.1 + 0.9, "int8": 0.2 + 0.1}
PROBED_IMAGES = 64  # whose slopes are taken
TIGHTER = 0.3  # by which the predicted error shrinks from one attempt to the next, where agreement counts
MARGIN = 0.9  # of the error that a budget leaves, since predictions are not exact
ATTEMPTS = 5


class Budget(NamedTuple):
    """What a conversion may cost.

    Attributes:
      points: of the proxy, in percent.
      proxy: ``"agreement"`` or ``"error"``, see `calibrate`.
    """

    points: float
    proxy: Proxy

    def spent(
        self,
        dense: Float[Array | np.ndarray, "batch classes"],
        logits: Float[Array | np.ndarray, "batch classes"],
    ) -> float:
        """The points that logits cost."""
        if self.proxy == "agreement":
            return 100 * float(np.mean(np.argmax(dense, -1) != np.argmax(logits, -1)))
        return 100 * float(np.mean(np.square(logits - dense)) / np.var(dense))


class Candidate(NamedTuple):
    """What a layer may become.

    Attributes:
      choice: one of `shiftaddvit_jax.names.LAYER_CHOICES`.
      energy: of its products for one image, in microjoules.
      error: its part of the logits' mean squared error.
    """

    choice: str
    energy: float
    error: float


def energy(choice: str, products: float, primitives: Primitives, share: float) -> float:
    """Microjoules of a layer's products with int8 activations in shifts, on an accelerator in 45 nm CMOS.

    Args:
      choice: what the layer is.
      products: of one weight and one number each.
      primitives: of the model: the precision of dense factors, and the powers of two in a mixture's weights.
      share: of the tokens that a mixture's shift expert computes.
    """
    dense = MULTIPLY[primitives.precision]
    each = {
        "shift": SHIFT,
        "shift_two_terms": 2 * SHIFT,
        "dense_int8": MULTIPLY["int8"],
        "dense": dense,
        "moe": share * primitives.weight_terms * SHIFT + (1 - share) * dense,
    }
    return products * each[choice] * 1e-6


def choose_layers(
    model: nn.Module,
    variables: PyTree,
    images: Examples,
    shares: Mapping[str, float],
    budget: Budget,
    convert: Callable[[dict[str, str]], Converted],
) -> Converted:
    """The conversion that takes the least energy within a budget.

    Args:
      model: the dense model, with the settings that mixtures are converted with.
      variables: its variables.
      images: the calibration images.
      shares: the layers to choose for, each with the share of its tokens for a mixture's shift expert.
      budget: what the conversion may cost.
      convert: the conversion by the layers' choices.

    Raises:
      ValueError: no layer to choose for, an unknown proxy, a budget below 0.
    """
    check_choice("proxy", budget.proxy, PROXIES)
    if not budget.points >= 0:
        raise ValueError(f"the budget must be at least 0 points, got {budget.points}")
    if not shares:
        raise ValueError(
            "a budget is for layers that may become shift layers: give mlp='shift' or projections='shift'"
        )
    candidates = _candidates(model, variables, images, shares)
    dense = outputs_of(model, variables, images, BATCH)
    target, attempt = np.inf, 0
    while True:
        chosen = cheapest(candidates, target)
        student, converted, report = convert({path: found.choice for path, found in chosen.items()})
        spent = budget.spent(dense, outputs_of(student, converted, images, BATCH))
        predicted, attempt = sum(found.error for found in chosen.values()), attempt + 1
        logger.info("attempt %d costs %.2f of %.2f points of %s", attempt, spent, budget.points, budget.proxy)
        smallest = sum(min(found.error for found in options) for options in candidates.values())
        if spent <= budget.points or predicted <= smallest:
            break
        scale = MARGIN * budget.points / spent if budget.proxy == "error" else TIGHTER
        target = max(smallest, predicted * scale) if attempt < ATTEMPTS else smallest
    if spent > budget.points:
        logger.warning(
            "the budget of %g points of %s is missed: the best choices cost %.2f; give more images",
            budget.points,
            budget.proxy,
            spent,
        )
    return student, converted, report


def cheapest(candidates: Mapping[str, list[Candidate]], error: float) -> dict[str, Candidate]:
    """For each layer one of its candidates, so that their errors add up to ``error`` at most, if they can.

    Starting from the least energy, the step that takes most error away for its energy comes first.
    """
    chosen = {path: min(options, key=lambda found: found.energy) for path, options in candidates.items()}
    while sum(found.error for found in chosen.values()) > error:
        steps = [
            ((chosen[path].error - found.error) / max(found.energy - chosen[path].energy, 1e-30), path, found)
            for path, options in candidates.items()
            for found in options
            if found.error < chosen[path].error
        ]
        if not steps:
            break
        _, path, found = max(steps, key=lambda step: step[:2])
        chosen[path] = found
    return chosen


def fit_choices(
    model: nn.Module,
    variables: PyTree,
    images: Examples,
    shares: Mapping[str, float],
    choices: Collection[str] = tuple(LAYER_CHOICES),
) -> dict[str, dict[str, dict[str, Any]]]:
    """Parameters of each layer for each choice, every one fitted where the layers before it are dense.

    A model composed of them lacks what `calibrate` adds: no layer makes up for those before it. One pass
    over the images fits them all.

    Args:
      model: the dense model.
      variables: its variables.
      images: the calibration images.
      shares: the layers to fit, each with the share of its tokens for a mixture's shift expert.
      choices: what each layer may be. What is dense keeps its parameters.
    """

    def fits(teacher, path, own, tokens, share):
        place = Place(teacher, teacher, path)
        pairs = partial(place.pairs, (own, own), (tokens, tokens))
        layer = module_variables("/".join(path), own)["params"]
        fitted = _fits(pairs, add_moments(pairs()), layer["kernel"], model.primitives, share, choices)
        kept = {choice: dict(layer) for choice in ("dense", "dense_int8") if choice in choices}
        return kept | {choice: fit for choice, (fit, _) in fitted.items()}

    return _by_layer(model, variables, images, shares, "fitting choices", fits)


def _by_layer(model, variables, images, shares, description, look):
    """What ``look`` finds of each layer in one forward pass of the dense model, by the layer's path.

    It gets a branch, the layer's path in it, the branch's variables and tokens, and the layer's share.
    """
    found: dict[str, Any] = {}

    def visit(name, teacher, tokens):
        own = module_variables(name, variables)
        for path in linear_modules(teacher, own, tokens):
            full = "/".join((name, *path))
            if full in shares:
                bar.update(task, note=full)
                found[full] = look(teacher, path, own, tokens, shares[full])
                bar.advance(task)
        return teacher.run(own, tokens)

    with progress_bar() as bar:
        task = bar.add_task(description, total=len(shares), note="")
        with nn.intercept_methods(visiting_branches(visit)):
            run(on_xla(model), variables, images)
    return found


def _candidates(model, variables, images, shares):
    """For each layer what it may become, from one forward pass of the dense model."""
    slopes = _squared_slopes(model, variables, take(images, slice(PROBED_IMAGES)), shares)
    noises = _by_layer(model, variables, images, shares, "measuring choices", _noises)
    return {
        path: [
            Candidate(
                choice,
                energy(choice, products, model.primitives, shares[path]),
                float(noise @ slopes[path]),
            )
            for choice, noise in by_choice.items()
        ]
        for path, (by_choice, products) in noises.items()
    }


def _noises(teacher, path, variables, tokens, share):
    """What is missing from each output of a layer in mean square, by choice; and products an image."""
    both, twice = (variables, variables), (tokens, tokens)
    place = Place(teacher, teacher, path)
    pairs = partial(place.pairs, both, twice)
    moments, primitives = add_moments(pairs()), teacher.module.primitives
    kernel = module_variables("/".join(path), variables)["params"]["kernel"]
    fits = _fits(pairs, moments, kernel, primitives, share, LAYER_CHOICES)
    chosen = primitives.choosing({"/".join(path): "dense_int8"})
    whole = Place(teacher, teacher._replace(module=teacher.module.clone(primitives=chosen)), path)
    by_choice = {choice: noise for choice, (_, noise) in fits.items()}
    by_choice["dense_int8"] = whole.noise(both, twice)
    return by_choice, float(moments.count) / count_of(tokens) * np.size(kernel)


def _fits(pairs, moments, kernel, primitives, share, choices):
    """Those of the choices that are fitted, each with its parameters and what they miss of each output."""
    terms = {"shift": 1, "shift_two_terms": 2, "moe": primitives.weight_terms}
    shifts = {
        count: fit_layer(moments, kernel, primitives.weight_bits, count)
        for count in {terms[choice] for choice in choices if choice in terms}
    }
    found: dict[str, tuple[Any, Any]] = {
        choice: (shifts[terms[choice]], moments.noise(**shifts[terms[choice]]))
        for choice in ("shift", "shift_two_terms")
        if choice in choices
    }
    if "moe" in choices:
        found["moe"] = fit_mixture(pairs, fit_dense(moments, kernel), shifts[terms["moe"]], share)
    return found


def _squared_slopes(model, variables, images, paths) -> dict[str, Float[np.ndarray, "outputs"]]:
    """A logit's squared slope by each output of layers, summed over tokens, its mean over images and logits.

    Slopes of a sum of logits with random signs have the mean square of all logits' slopes (Hutchinson).
    """
    model = on_xla(model)

    def shifted(by, images):
        """The logits where each layer's outputs are moved."""

        def move(call, arguments, keywords, context):
            y = call(*arguments, **keywords)
            name = "/".join(context.module.path)
            return y + by[name] if context.method_name == "__call__" and name in by else y

        with nn.intercept_methods(move):
            return run(model, variables, images)

    def look(module, method, arguments, y):
        return y if method == "__call__" and "/".join(module.path) in paths else None

    outputs = watch(model, look)

    @jax.jit
    def squares(images, key):
        calls = jax.eval_shape(outputs, variables, images)
        zeros = {name: jnp.zeros(y.shape, y.dtype) for name, (y,) in calls.items()}

        def probe(by):
            logits: Any = shifted(by, images)
            return (
                jnp.sum(logits * jax.random.rademacher(key, logits.shape, logits.dtype))
                / logits.shape[-1] ** 0.5
            )

        slopes = jax.grad(probe)(zeros)
        return jax.tree.map(
            lambda slope: jnp.sum(jnp.square(slope), axis=tuple(range(slope.ndim - 1))), slopes
        )

    sums: Any = None
    for index, batch in enumerate(batches(images)):
        found = squares(take(images, batch), jax.random.key(index))
        found = jax.tree.map(lambda total: np.asarray(total, np.float64), found)
        sums = found if sums is None else jax.tree.map(np.add, sums, found)
    return {name: total / count_of(images) for name, total in sums.items()}
