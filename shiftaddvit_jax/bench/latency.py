"""Where a model's milliseconds go on this device, and how long the experts of its MoE layers take.

`measure_latency` returns, and ``shiftaddvit measure-latency --json`` writes,

- ``machine`` and ``versions``, see `describe_timing`; ``batch`` and ``rounds``;
- ``model``, the arguments of `create_model`;
- ``layers``, one for each MoE layer: ``name``, ``inputs``, ``outputs``, ``tokens`` (of a forward pass) and
  ``counts`` (the numbers of tokens measured); for ``dense`` and ``shift`` ``median_ms`` (one for each count),
  and ``base_ms`` and ``us_per_token`` (the line through the medians); and ``latencies``, the medians (dense,
  shift) at the layer's own number of tokens, which `shiftaddvit_jax.train` reads.

`measure_choices` returns, and ``shiftaddvit measure-latency --choices --json`` writes, the same but for
``layers``, one for each linear layer of blocks: ``name``, ``inputs``, ``outputs``, ``tokens`` and
``choices``, the milliseconds by the layer's choice; and ``unit``, ``"ms"``, and ``rest``, what the dense
model takes beyond its layers. `shiftaddvit_jax.search` reads it.

A call of a compiled program takes some ten microseconds, whatever it computes. So an empty program takes
turns with the others, and its median is subtracted from theirs.
"""

import dataclasses
import math
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, PyTree

from shiftaddvit_jax.bench.rounds import describe_timing, summarize, time_runs
from shiftaddvit_jax.models import model_arguments
from shiftaddvit_jax.models.inspect import Images, capture, module_variables, on_xla
from shiftaddvit_jax.models.variables import example_inputs, linear_layers
from shiftaddvit_jax.names import LAYER_CHOICES
from shiftaddvit_jax.nn import Block, Mlp, MoEDense
from shiftaddvit_jax.nn.attention import Attention
from shiftaddvit_jax.nn.kernels import describe_linear, is_packed, linear_arrays
from shiftaddvit_jax.nn.linear import make_linear
from shiftaddvit_jax.nn.moe import EXPERTS, aimed_shift_share
from shiftaddvit_jax.ops.implementation import uses_tvm
from shiftaddvit_jax.ops.implementation.fused import fused_linear
from shiftaddvit_jax.pack import inference_variables
from shiftaddvit_jax.progress import track

WHOLE = ""  # the model's own path
SECONDS_A_TURN = 0.02
TOKEN_SHARES = (0.25, 0.5, 1.0, 2.0)  # the shares of a layer's tokens that its experts are timed at
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Latency:
    """Milliseconds of a forward pass, and of its modules when each runs alone.

    Attributes:
      whole_ms: median of the whole model, with its call.
      module_ms: medians by the module's path, such as ``stage1/block1/attn``, in the order of the calls and
        without a call.
      call_ms: median of a call of an empty program.
      batch: number of images.
    """

    whole_ms: float
    module_ms: dict[str, float]
    call_ms: float
    batch: int

    @property
    def unexplained_ms(self) -> float:
        """The whole without modules and call; negative where the whole is faster than its parts."""
        return self.whole_ms - self.call_ms - sum(self.module_ms.values())


def profile_latency(
    model: nn.Module, variables: PyTree, images: Float[Array, "batch height width 3"], rounds: int = 5
) -> Latency:
    """Time ``model`` under jit, and each of its modules alone on the inputs that it has for ``images``.

    Attentions, MLPs, MoE layers, and blocks of which a kernel computes a branch, are timed whole. Of the
    rest, modules without modules inside are timed. All take turns with the whole model, in rounds. TVM
    kernels compute with packed weights, where there are any.

    Raises:
      ValueError: fewer than one round.
    """
    return compare_latencies({"": (model, variables, images)}, rounds)[""]


def compare_latencies(
    models: Mapping[str, tuple[nn.Module, PyTree, Images]], rounds: int = 5
) -> dict[str, Latency]:
    """`profile_latency` of each model, all in the same rounds, so that a slow machine is slow for all."""
    _check_rounds(rounds)
    runs = {}
    for model, (module, variables, images) in models.items():
        runs |= {(model, name): run for name, run in _module_runs(module, variables, images).items()}
    medians, call_ms = _median_ms(runs, rounds)
    return {
        model: Latency(
            whole_ms=medians[model, WHOLE] + call_ms,
            module_ms={name: ms for (of, name), ms in medians.items() if of == model and name != WHOLE},
            call_ms=call_ms,
            batch=len(images),
        )
        for model, (_, _, images) in models.items()
    }


def whole_latencies(
    models: Mapping[Name, tuple[nn.Module, PyTree, Images]], rounds: int = 5
) -> dict[Name, float]:
    """Median milliseconds of each model's forward pass under jit, with its call, all in the same rounds.

    Raises:
      ValueError: fewer than one round.
    """
    _check_rounds(rounds)
    runs = {}
    for name, (model, variables, images) in track(models.items(), "compiling", len(models)):
        runs[name] = compiled_run(partial(model.apply, variables), jnp.asarray(images))
    medians, call_ms = _median_ms(runs, rounds)
    return {name: median + call_ms for name, median in medians.items()}


def _module_runs(model, variables, images):
    """Runs of the whole model and of each of its modules that is timed, by name."""
    modules, fixed = {}, {}

    def look(module, method, arguments, result):
        # A module without a path is the model, or a part of a module, such as an expert.
        if method != "__call__" or not module.path or result is arguments[0]:
            return None
        name, places = "/".join(module.path), range(len(arguments))
        modules[name] = module.clone(parent=None)
        fixed[name] = {place: arguments[place] for place in places if not _has_arrays(arguments[place])}
        return {place: arguments[place] for place in places if _has_arrays(arguments[place])}

    seen = capture(model, variables, images, look)
    runs = {WHOLE: compiled_run(partial(model.apply, variables), jnp.asarray(images))}
    timed = [name for name in modules if _is_timed(name, modules)]
    for name in track(timed, "compiling modules", len(timed)):
        apply = partial(modules[name].apply, module_variables(name, variables))

        def run(arrays, apply=apply, fixed=fixed[name]):
            return apply(*(argument for _, argument in sorted((arrays | fixed).items())))

        # A module and one inside it may share a path; the call of the outer one ends last.
        runs[name] = compiled_run(run, seen[name][-1])
    return runs


def _has_arrays(argument):
    """Whether a call's argument is or holds an array, such as parameters, and not the sides of a grid."""
    return any(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(argument))


def _is_timed(name, modules):
    """Whether a module is timed and no module around it is."""
    path = name.split("/")
    around = ("/".join(path[:end]) for end in range(1, len(path)))
    if any(_is_whole(outer, modules) for outer in around if outer in modules):
        return False
    return _is_whole(name, modules) or not any(inner.startswith(f"{name}/") for inner in modules)


def _is_whole(name, modules):
    if isinstance(modules[name], Block):
        return not {f"{name}/attn", f"{name}/mlp"} <= modules.keys()
    return isinstance(modules[name], Attention | Mlp | MoEDense)


def measure_latency(
    model: nn.Module, variables: PyTree, *, batch: int = 1, rounds: int = 5
) -> dict[str, Any]:
    """Time both experts of every MoE layer, each alone, at several numbers of tokens.

    Layers of the same shape are measured once. The experts take turns, in rounds, and run as they do in the
    model: with packed weights on TVM's kernels, where there are any.

    Args:
      model: from `create_model` or `reparameterize`, with MoE layers.
      variables: its variables, packed or not.
      batch: images of a forward pass, from which the layers' tokens come.
      rounds: turns of each expert.

    Returns:
      The dictionary that the docstring of this module describes.

    Raises:
      ValueError: a model without MoE layers, or a number out of range.
    """
    _check_rounds(rounds)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    layers = _moe_layers(model, variables, batch)
    if not layers:
        raise ValueError(
            "the model has no mixtures of experts to time; give it --mlp moe or --projections moe"
        )
    runs, shapes = {}, {}
    for name, (layer, inputs, tokens) in track(layers.items(), "compiling experts", len(layers)):
        shape = shapes[name] = (layer, inputs, tokens)
        if any(known == shape for known, *_ in runs):
            continue
        params = module_variables(name, variables)["params"]
        for count in _counts(tokens):
            x = jax.random.normal(jax.random.key(0), (count, inputs), jnp.float32)
            for expert, function in zip(EXPERTS, _experts(layer, params, x), strict=True):
                runs[shape, count, expert] = compiled_run(function, x)
    medians, _ = _median_ms(runs, rounds)
    return {
        **describe_timing(),
        "model": model_arguments(model),
        "batch": batch,
        "rounds": rounds,
        "layers": [_layer_report(name, shape, medians) for name, shape in shapes.items()],
    }


def measure_choices(
    model: nn.Module, variables: PyTree, *, batch: int = 1, rounds: int = 5
) -> dict[str, Any]:
    """Time every linear layer of a model's blocks as each of its choices, each alone, and the model whole.

    Layers of the same shape are measured once. All take turns, in rounds, and run as in the model: on TVM's
    kernels where they run, with packed weights. A mixture is timed with a router that sends as many tokens to
    the shift expert as take as long there as the others take on the dense expert.

    Args:
      model: from `create_model`; layers that are no dense ones are timed as the others are.
      variables: its variables, not packed.
      batch: images of a forward pass, from which the layers' tokens come.
      rounds: turns of each.

    Returns:
      The dictionary that the docstring of this module describes.

    Raises:
      ValueError: variables that are packed, or a number out of range.
    """
    _check_rounds(rounds)
    if batch < 1:
        raise ValueError(f"batch must be at least 1, got {batch}")
    if is_packed(variables["params"]):
        raise ValueError("the variables are packed; expected a model's as they were trained")
    shapes = _linear_shapes(model, variables, batch)
    distinct = sorted(set(shapes.values()))
    choices = [choice for choice in LAYER_CHOICES if choice != "moe"]
    runs: dict[Any, Callable[[], Any]] = {}
    for shape in track(distinct, "compiling layers", len(distinct)):
        x = jax.random.normal(jax.random.key(0), shape[:2], jnp.float32)
        for choice in choices:
            runs[shape, choice] = compiled_run(_layer_run(model, choice, shape), x)
    whole = inference_variables(model, variables, for_kernels=model.primitives.implementation != "xla")
    images = jnp.zeros((batch, model.image_size, model.image_size, 3))
    medians, _ = _median_ms({**runs, WHOLE: compiled_run(partial(model.apply, whole), images)}, rounds)
    mixtures = {}
    for shape in track(distinct, "compiling mixtures", len(distinct)):
        share = aimed_shift_share((medians[shape, "dense"], medians[shape, "shift"]))
        x = jax.random.normal(jax.random.key(0), shape[:2], jnp.float32)
        mixtures[shape, "moe"] = compiled_run(_layer_run(model, "moe", shape, share), x)
    medians |= _median_ms(mixtures, rounds)[0]
    rest = medians[WHOLE] - sum(medians[shape, "dense"] for shape in shapes.values())
    return {
        **describe_timing(),
        "model": model_arguments(model),
        "batch": batch,
        "rounds": rounds,
        "unit": "ms",
        "rest": max(rest, 0.0),
        "layers": [
            {
                **dict(zip(("name", "tokens", "inputs", "outputs"), (name, *shape), strict=True)),
                "choices": {choice: medians[shape, choice] for choice in LAYER_CHOICES},
            }
            for name, shape in shapes.items()
        ],
    }


def _linear_shapes(model, variables, batch):
    """The tokens, inputs and outputs of each linear layer of blocks, by its path in the order of calls."""
    shapes, paths = {}, set(linear_layers(model))

    def note(call, arguments, keywords, context):
        result = call(*arguments, **keywords)
        name = "/".join(context.module.path)
        if context.method_name == "__call__" and name in paths:
            *tokens, inputs = arguments[0].shape
            shapes.setdefault(name, (math.prod(tokens), inputs, result.shape[-1]))
        return result

    with nn.intercept_methods(note):
        jax.eval_shape(on_xla(model).apply, variables, *example_inputs(model, batch))
    return shapes


def _layer_run(model, choice, shape, share=0.5):
    """A layer of random weights as a function of tokens; of a mixture's, ``share`` go to the shift expert."""
    tokens, inputs, outputs = shape
    kind, primitives = model.primitives.choosing({"layer": choice}).of_layer("layer", "dense")
    primitives = dataclasses.replace(primitives, layers=())
    layer = make_linear(kind, outputs, primitives)
    x = jax.random.normal(jax.random.key(0), (tokens, inputs), jnp.float32)
    params = layer.clone(implementation="xla").init(jax.random.key(1), x)["params"]
    if kind == "moe":
        kernel = jax.random.normal(jax.random.key(2), (inputs,)) / inputs**0.5
        bias = -jnp.quantile(x @ kernel, 1 - share)
        params = {
            **params,
            "router": {"kernel": jnp.stack([-kernel, kernel], 1), "bias": jnp.stack([-bias, bias])},
        }
    linear = describe_linear(kind, params, inputs, outputs, primitives)
    if not uses_tvm("a layer", model.primitives.implementation, linear.why_not(), prefer=True):
        return partial(layer.apply, {"params": params})
    return partial(fused_linear, linear, linear_arrays(linear, params, primitives.weight_bits))


def _layer_report(name, shape, medians):
    layer, inputs, tokens = shape
    counts = _counts(tokens)
    experts = {}
    for expert in EXPERTS:
        median_ms = [medians[shape, count, expert] for count in counts]
        base_ms, ms_per_token = fit_line(counts, median_ms)
        experts[expert] = {"median_ms": median_ms, "base_ms": base_ms, "us_per_token": 1e3 * ms_per_token}
    return {
        "name": name,
        "inputs": inputs,
        "outputs": layer.features,
        "tokens": tokens,
        "counts": counts,
        **experts,
        "latencies": [medians[shape, tokens, expert] for expert in EXPERTS],
    }


def _counts(tokens):
    return sorted({max(1, round(share * tokens)) for share in TOKEN_SHARES})


def _moe_layers(model, variables, batch):
    """Each MoE layer by its name: a module of its own, its number of inputs and of tokens."""
    layers, implementation = {}, model.primitives.implementation

    def note(call, arguments, keywords, context):
        module = context.module
        if isinstance(module, MoEDense) and context.method_name == "__call__":
            *tokens, inputs = arguments[0].shape
            name = "/".join(module.path)
            layer = module.clone(parent=None, name=None, implementation=implementation)
            layers.setdefault(name, (layer, inputs, math.prod(tokens)))
        return call(*arguments, **keywords)

    # A kernel that computes a whole branch calls no layer; XLA calls all.
    with nn.intercept_methods(note):
        jax.eval_shape(on_xla(model).apply, variables, *example_inputs(model, batch))
    return layers


def _experts(layer: MoEDense, params, x) -> list[Callable[[Array], Any]]:
    """Both experts as functions of tokens, in the order of `EXPERTS`."""
    linears = [
        describe_linear(kind, params[kind], x.shape[-1], layer.features, layer.primitives) for kind in EXPERTS
    ]
    reason = next(filter(None, (linear.why_not() for linear in linears)), None)
    if not uses_tvm("an expert", layer.implementation, reason, prefer=is_packed(params)):
        experts = zip(EXPERTS, layer.experts(), strict=True)
        return [partial(expert.apply, {"params": params[name]}) for name, expert in experts]
    return [
        partial(fused_linear, linear, linear_arrays(linear, params[kind], layer.weight_bits))
        for kind, linear in zip(EXPERTS, linears, strict=True)
    ]


def fit_line(tokens: Sequence[float], milliseconds: Sequence[float]) -> tuple[float, float]:
    """The line of least squares: milliseconds without any token, and milliseconds a token.

    Raises:
      ValueError: fewer than two different numbers of tokens.
    """
    if len(set(tokens)) < 2:
        raise ValueError(f"a line needs two different numbers of tokens, got {list(tokens)}")
    slope, base = np.polyfit(np.asarray(tokens, float), np.asarray(milliseconds, float), 1)
    return float(base), float(slope)


def _check_rounds(rounds):
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")


def _median_ms(runs: Mapping[Name, Callable[[], Any]], rounds: int) -> tuple[dict[Name, float], float]:
    """Median milliseconds of each run without its call, at least 1 ns, and of a call."""
    with_call: dict[Any, Callable[[], Any]] = {**runs, None: compiled_run(lambda x: x + 1, jnp.zeros(()))}
    times: dict[Any, list[list[float]]] = {name: [] for name in with_call}
    for _ in track(range(rounds), "rounds", rounds):
        for name, run in with_call.items():
            times[name].append(time_runs(run, SECONDS_A_TURN))
    medians = {name: summarize(rounds_of_name)["median_ms"] for name, rounds_of_name in times.items()}
    call_ms = medians.pop(None)
    return {name: max(median - call_ms, 1e-6) for name, median in medians.items()}, call_ms


def compiled_run(function: Callable[[Array], Any], x: Array) -> Callable[[], Any]:
    """A run of the compiled ``function`` on ``x`` that waits for the result; weights are constants."""
    compiled = jax.jit(function).lower(x).compile()
    return lambda: jax.block_until_ready(compiled(x))
