"""What a model costs, in one dictionary for tables, pictures and JSON files."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PyTree

from shiftaddvit_jax.costs.counting import Product, count_products, weight_bytes
from shiftaddvit_jax.costs.energy import AUTHORS_BITS, NumberFormat, accelerator_cost, compute_energy
from shiftaddvit_jax.models import create_model, model_arguments, model_row
from shiftaddvit_jax.models.variables import variable_shapes
from shiftaddvit_jax.names import PAPER_MODELS, SHIFT_SHARE
from shiftaddvit_jax.nn.moe import ShiftShare

# Arithmetic alone; and with the accelerator's data movement, by this project's model and by the authors'.
ENERGY_MODELS = ("compute", "accelerator", "authors")

Costs = dict[str, Any]


def cost_report(
    model: nn.Module,
    variables: PyTree | None = None,
    *,
    shift_share: ShiftShare = SHIFT_SHARE,
    batch: int = 1,
    number_format: NumberFormat | None = None,
) -> dict[str, Any]:
    """Operations, energy, latency and bytes of a forward pass, in total and by module.

    Args:
      model: from `create_model` or `reparameterize`.
      variables: its variables, packed or not; shapes suffice. By default the model's own, not packed.
      shift_share: see `layer_shift_share`.
      batch: number of images; all figures are sums over them.
      number_format: the format, for energy and latency, of all numbers but codes and power-of-two weights. By
        default numbers are as the model computes with them, and float32 in the authors' model.

    Returns:
      The totals ``macs``, ``adds``, ``shifts`` and ``popcounts``; ``energy_mj``, millijoules by
      `ENERGY_MODELS` (without ``"authors"`` for formats that it does not know); ``latency_ms`` on the
      accelerator; ``weight_bytes``, packed; and ``activation_bytes``, which the products write. ``modules``
      has the same for each module by its path, without the modules inside it. ``model``, ``batch``,
      ``number_format`` and ``shift_share`` (None without MoE layers) say what the report is of.

    Raises:
      ValueError: see `count_products` and `accelerator_cost`.
    """
    if variables is None:
        variables = variable_shapes(model)
    products = count_products(model, variables, shift_share, batch)
    sizes = weight_bytes(model, variables)
    parts: dict[str, list[Costs]] = {}
    for product in products:
        parts.setdefault(product.module, []).append(_product_costs(product, number_format))
    # A module without a product has only weights.
    nothing = _product_costs(Product("", "macs", 0, 0, 0), number_format)
    modules = {
        path: sum_costs([*parts.get(path, []), nothing | {"weight_bytes": sizes.get(path, 0.0)}])
        for path in dict.fromkeys([*parts, *sizes])
    }
    arguments = model_arguments(model)
    shown = ("name", "attention", "mlp", "projections", "layers", "weight_terms", "image_size", "activations")
    return {
        "model": {name: arguments[name] for name in shown if name in arguments},
        "batch": batch,
        "number_format": number_format,
        "shift_share": shift_share if any(product.share != 1 for product in products) else None,
        **sum_costs(modules.values()),
        "modules": modules,
    }


def _product_costs(product, number_format) -> Costs:
    energy = {"compute": compute_energy(product, number_format)}
    cost = accelerator_cost(product, number_format)
    energy["accelerator"] = cost.energy_mj
    if number_format in (None, *AUTHORS_BITS):
        energy["authors"] = accelerator_cost(product, number_format, "authors").energy_mj
    return {
        **asdict(product.operations),
        "energy_mj": energy,
        "latency_ms": 1e3 * cost.latency_s,
        "weight_bytes": 0.0,
        "activation_bytes": product.output_bytes,
    }


def sum_costs(costs: Iterable[Costs]) -> Costs:
    """The sum of several costs, such as those of a report's modules."""
    return jax.tree.map(lambda *values: sum(values), *costs)


def group_modules(modules: Mapping[str, Costs]) -> dict[str, Costs]:
    """A report's modules summed by the first two names of their paths, the blocks of a stage together."""
    groups: dict[str, list[Costs]] = {}
    for path, costs in modules.items():
        names = [name for name in path.split("/") if not name.removeprefix("block").isdigit()]
        groups.setdefault("/".join(names[:2]), []).append(costs)
    return {name: sum_costs(parts) for name, parts in groups.items()}


def describe_shift_share(shift_share: ShiftShare) -> str:
    """A share in words; for one a layer, their mean, the smallest and the largest."""
    if isinstance(shift_share, Mapping):
        mean, low, high = (of(shift_share.values()) for of in (statistics.mean, min, max))
        return f"{mean:.1%} ({low:.0%} to {high:.0%} by layer)"
    return f"{shift_share:.0%}"


def energy_savings(
    names: Sequence[str] = PAPER_MODELS,
    shift_share: float = SHIFT_SHARE,
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> list[dict[str, Any]]:
    """Energy of models as ShiftAddViTs, with additive attention and MoE layers in MLPs, and as dense ones.

    Args:
      names: the models' names.
      shift_share: the share of tokens on the shift experts.
      track: iterates over ``names`` and shows progress.

    Returns:
      For each model ``name``, ``shift_share``, and ``energy_mj`` of ``shiftaddvit``, ``msa``, and ``sra``
      where the model has it, each by `ENERGY_MODELS`.
    """
    rows = []
    for name in track(names):
        row: dict[str, Any] = {"name": name, "shift_share": shift_share, "energy_mj": {}}
        kinds: dict[str, dict[str, Any]] = {
            "shiftaddvit": {"attention": "hamming_linear", "mlp": "moe"},
            "msa": {"attention": "msa"},
        }
        if "sra" in model_row(name)["attention"]:
            kinds["sra"] = {"attention": "sra"}
        for kind, arguments in kinds.items():
            report = cost_report(create_model(name, **arguments), shift_share=shift_share)
            row["energy_mj"][kind] = report["energy_mj"]
        rows.append(row)
    return rows
