"""The search: what each group of layers becomes, from measured losses of some configurations."""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, PyTree

from shiftaddvit_jax.calibrate.choice import fit_choices
from shiftaddvit_jax.calibrate.convert import check_dense, shift_share
from shiftaddvit_jax.models.inspect import Images, in_batches, outputs_of
from shiftaddvit_jax.models.registry import check_classifier
from shiftaddvit_jax.optional import require
from shiftaddvit_jax.progress import progress_bar
from shiftaddvit_jax.search.baselines import run_at_random, run_greedily
from shiftaddvit_jax.search.costs import Costs
from shiftaddvit_jax.search.design import Design
from shiftaddvit_jax.search.effects import Effects, estimate_effects
from shiftaddvit_jax.search.knapsack import SLACK, cheapest_within
from shiftaddvit_jax.search.supernet import make_supernet

BATCH = 64  # images at a time
STEPS = 8  # budgets of the front from the least to the greatest cost, beside those that are asked for
FINETUNING_RATE = 1e-4  # of Adam's first step; it falls to 0
Levels = Int[np.ndarray, "factors"]
Run = Callable[[Levels], Float[np.ndarray, "batch classes"]]
Loss = Callable[[Float[Array | np.ndarray, "batch classes"]], Float[Array, ""]]


class Trial(NamedTuple):
    """A configuration that was run.

    Attributes:
      levels: the choice of each group, by its number.
      cost: of the whole model.
      loss: what was measured.
    """

    levels: Levels
    cost: float
    loss: float


class Point(NamedTuple):
    """The front at one budget.

    Attributes:
      budget: what the configuration may cost.
      predicted: the least loss within it by the effects; of a configuration that was then run.
      best: the run with the least loss within it.
      random: the least loss within it of the random baseline; None without.
      greedy: likewise.
    """

    budget: float
    predicted: float
    best: Trial
    random: float | None
    greedy: float | None


class Found(NamedTuple):
    """What a search found.

    Attributes:
      groups: the layers of each factor.
      choices: what each may be.
      effects: of each group's choice, and of pairs.
      front: rising in its budgets.
      uniform: the model with all groups the same, by the choice.
      trials: all runs: the design's, the uniform ones and those that were predicted to be best.
    """

    groups: dict[str, list[str]]
    choices: tuple[str, ...]
    effects: Effects
    front: list[Point]
    uniform: dict[str, Trial]
    trials: list[Trial]

    def configuration(self, levels: Levels) -> dict[str, str]:
        """Each group's choice."""
        return {name: self.choices[level] for name, level in zip(self.groups, levels, strict=True)}

    def layers(self, levels: Levels) -> dict[str, str]:
        """Each layer's choice."""
        chosen = self.configuration(levels)
        return {path: chosen[name] for name, paths in self.groups.items() for path in paths}

    def best(self, budget: float, count: int) -> list[Trial]:
        """The ``count`` configurations with the least measured loss within a budget, each once."""
        within = {tuple(trial.levels): trial for trial in self.trials if trial.cost <= budget}
        return sorted(within.values(), key=lambda trial: trial.loss)[:count]


def search(
    run: Run,
    loss: Loss,
    groups: Mapping[str, Sequence[str]],
    choices: Sequence[str],
    costs: Costs,
    budget: float,
    design: Design,
    baselines: bool = False,
) -> Found:
    """The front of loss against cost, from the logits of a design's configurations and a few more.

    More are the models whose groups are all the same, and for each budget of the front the configuration with
    the least predicted loss.

    Args:
      run: the logits of a configuration, see `make_run`.
      loss: of logits, see `make_loss`.
      groups: the layers of each factor, see `group_layers`.
      choices: what each may be, 2 or 4 of `shiftaddvit_jax.names.LAYER_CHOICES`.
      costs: of the layers by choice.
      budget: what the model may cost, in the costs' unit.
      design: from `make_design`, of as many factors and choices.
      baselines: whether as many random configurations are run, and as many on a greedy way.

    Raises:
      ValueError: a budget below the cheapest configuration, or what `Costs.of` refuses.
    """
    costs.check_budget(budget, groups, choices)
    table = costs.of(groups, choices)
    least, greatest = (costs.rest + part.sum() for part in (table.min(axis=1), table.max(axis=1)))
    same = [np.full(len(groups), level) for level in range(len(choices))]

    def price(levels):
        return float(costs.rest + table[np.arange(len(groups)), levels].sum())

    asked = [*np.linspace(least, greatest, STEPS), min(budget, greatest), *map(price, same)]
    budgets = sorted({float(f"{each:.9g}") for each in asked})
    count = len(design.levels) + len(same) + len(budgets)
    with progress_bar() as bar:
        task = bar.add_task("running", total=count * (3 if baselines else 1), note="")

        def outputs(levels):
            found = run(levels)
            if not np.isfinite(found).all():
                raise ValueError("a configuration's logits are not finite; expected numbers")
            bar.advance(task)
            return found

        def measure(levels):
            return float(loss(outputs(levels)))

        def tried(levels):
            return Trial(levels, price(levels), measure(levels))

        logits = np.stack([outputs(levels) for levels in design.levels])
        trials = [
            Trial(levels, price(levels), float(loss(found)))
            for levels, found in zip(design.levels, logits, strict=True)
        ]
        effects = estimate_effects(design, logits, loss)
        uniform = {choice: tried(levels) for choice, levels in zip(choices, same, strict=True)}
        chosen = [_within(effects, table, each - costs.rest) for each in budgets]
        trials += [*uniform.values(), *map(tried, chosen)]
        others: dict[str, list[Trial]] = {}
        if baselines:
            ways = {
                "random": run_at_random(measure, table, count),
                "greedy": run_greedily(measure, table, count),
            }
            others = {
                name: [Trial(levels, price(levels), lost) for levels, lost in way]
                for name, way in ways.items()
            }
    front = [
        Point(
            each,
            effects.predict(levels),
            _best(trials, each),
            *(_best(others[name], each).loss if name in others else None for name in ("random", "greedy")),
        )
        for each, levels in zip(budgets, chosen, strict=True)
    ]
    return Found(
        {name: list(paths) for name, paths in groups.items()}, tuple(choices), effects, front, uniform, trials
    )


def _within(effects, table, budget):
    found = cheapest_within(effects, table, budget)
    assert found is not None  # the budgets begin at the least cost
    return found


def _best(trials, budget):
    """The one with the least loss within a budget; if there is none, one without."""
    within = [trial for trial in trials if trial.cost <= budget * (1 + SLACK)]
    return min(within, key=lambda trial: trial.loss, default=Trial(np.zeros(0, int), math.inf, math.inf))


def make_run(
    model: nn.Module,
    variables: PyTree,
    groups: Mapping[str, Sequence[str]],
    choices: Sequence[str],
    costs: Costs,
    calibration: Images,
    images: Images,
    finetune_steps: int = 0,
) -> Run:
    """A function of configurations: their logits, without a calibration of each.

    Every layer is fitted once for every choice, where the layers before it are dense (`fit_choices`), and a
    configuration is composed of these fits. What `calibrate` does beyond that, layers that make up for those
    before them, is left to the final conversion.

    Args:
      model: the dense model.
      variables: its variables.
      groups: the layers of each factor.
      choices: what each may be.
      costs: which say how a mixture shares out its tokens.
      calibration: the images that layers are fitted on, and finetuned.
      images: those that logits are computed of.
      finetune_steps: steps of Adam ahead of that, towards the dense model's logits on ``calibration``; where
        they lead away from these, none.

    Raises:
      ValueError: a model that is converted already, packed, or has weights that are not finite.
    """
    check_classifier(model, "a search")
    check_dense(model, variables)
    latencies = costs.latencies()
    shares = {path: shift_share(latencies, path) for members in groups.values() for path in members}
    fits = fit_choices(model, variables, calibration, shares, choices)
    factor_of = {path: factor for factor, members in enumerate(groups.values()) for path in members}
    places = np.array([factor_of[path] for path in fits])
    logits = make_supernet(model, fits, choices)
    finetune = None
    if finetune_steps:
        finetune = _finetuning(model, variables, fits, logits, calibration, finetune_steps)

    def run(levels):
        picks = levels[places].astype(np.int32)
        own, fitted = finetune(picks) if finetune else (variables, fits)
        return in_batches(lambda batch: logits(own, fitted, picks, batch), images, BATCH)

    return run


def make_loss(
    dense: Float[np.ndarray, "batch classes"], labels: Int[np.ndarray, "batch"] | None = None
) -> Loss:
    """The mean cross-entropy of logits in nats; without labels, their squared error.

    The error is that to the logits ``dense``, in percent of their variance.
    """
    if labels is None:
        return lambda logits: 100 * jnp.mean(jnp.square(logits - dense)) / np.var(dense)
    return lambda logits: jnp.mean(
        jax.nn.logsumexp(logits, axis=1) - jnp.take_along_axis(logits, labels[:, None], axis=1)[:, 0]
    )


def _finetuning(model, variables, fits, logits, images, steps):
    """A function of picks: variables and fits after steps of Adam, or as they were if that is nearer."""
    require("train", "finetuning in a search", "optax")
    import optax

    wanted = outputs_of(model, variables, images, BATCH)
    optimizer = optax.adam(optax.linear_schedule(FINETUNING_RATE, 0.0, steps))
    size = min(BATCH, len(images))
    start = jax.tree.map(jnp.asarray, (variables, fits))

    @jax.jit
    def step(tuned, state, picks, batch, wanted):
        def loss(tuned):
            return jnp.mean(jnp.square(logits(*tuned, picks, batch) - wanted))

        updates, state = optimizer.update(jax.grad(loss)(tuned), state)
        return optax.apply_updates(tuned, updates), state

    def finetune(picks):
        def error(tuned):
            found = in_batches(lambda batch: logits(*tuned, picks, batch), images, BATCH)
            return float(np.mean(np.square(found - wanted)))

        tuned, state = start, optimizer.init(start)
        for first in range(steps):
            batch = np.arange(first * size, (first + 1) * size) % len(images)
            tuned, state = step(tuned, state, picks, images[batch], wanted[batch])
        return min((start, tuned), key=error)

    return finetune
