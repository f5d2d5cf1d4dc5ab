"""What a model costs, in one dictionary that JSON can hold: for tables, pictures and files."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import flax.linen as nn
import jax
from jaxtyping import PyTree

from shiftaddvit_jax.costs.counting import Product, ShiftShare, count_products, weight_bytes
from shiftaddvit_jax.costs.energy import AUTHORS_BITS, NumberFormat, accelerator_cost, compute_energy
from shiftaddvit_jax.models import create_model, model_arguments, model_row
from shiftaddvit_jax.models.variables import variable_shapes

# What the balancing loss aims at with the authors' latencies, 6 : 4: both experts take the same time.
SHIFT_SHARE = 0.6
# Arithmetic alone; with the accelerator's data movement, by this project's model and by the authors'.
ENERGY_MODELS = ("compute", "accelerator", "authors")
PAPER_MODELS = ("pvt_tiny", "pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2", "deit_tiny")

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
      shift_share: see `count_products`.
      batch: images, of which all figures are the sum.
      number_format: for energy and latency, of all that is neither a code nor a power-of-two weight; by
        default as the model computes, and float32 in the authors' model.

    Returns:
      The totals ``macs``, ``adds``, ``shifts`` and ``popcounts``; ``energy_mj``, millijoules by
      `ENERGY_MODELS` (without the authors' for formats that it does not know); ``latency_ms`` on the
      accelerator; ``weight_bytes``, packed; ``activation_bytes``, of what the products write. In ``modules``
      the same for each module by its path, without the modules inside it. And what was asked for: ``model``,
      ``batch``, ``number_format``, ``shift_share`` (None without MoE layers).

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
    # Modules without a product have weights alone.
    nothing = _product_costs(Product("", "macs", 0, 0, 0), number_format)
    modules = {
        path: sum_costs([*parts.get(path, []), nothing | {"weight_bytes": sizes.get(path, 0.0)}])
        for path in dict.fromkeys([*parts, *sizes])
    }
    arguments = model_arguments(model)
    shown = ("name", "attention", "mlp", "projections", "image_size", "activations")
    return {
        "model": {name: arguments[name] for name in shown},
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
    """The sum of costs, such as those of several of a report's modules."""
    return jax.tree.map(lambda *values: sum(values), *costs)


def group_modules(modules: Mapping[str, Costs]) -> dict[str, Costs]:
    """A report's modules summed by the first two names of their paths, the blocks of a stage together."""
    groups: dict[str, list[Costs]] = {}
    for path, costs in modules.items():
        names = [name for name in path.split("/") if not name.removeprefix("block").isdigit()]
        groups.setdefault("/".join(names[:2]), []).append(costs)
    return {name: sum_costs(parts) for name, parts in groups.items()}


def describe_shift_share(shift_share: ShiftShare) -> str:
    """A share in words; of one for each layer, their mean, the least and the largest."""
    if isinstance(shift_share, Mapping):
        mean, low, high = (of(shift_share.values()) for of in (statistics.mean, min, max))
        return f"{mean:.1%} ({low:.0%} to {high:.0%} by layer)"
    return f"{shift_share:.0%}"


def energy_savings(
    names: Sequence[str] = PAPER_MODELS,
    shift_share: float = SHIFT_SHARE,
    track: Callable[[Iterable[str]], Iterable[str]] = iter,
) -> list[dict[str, Any]]:
    """Energy of models as ShiftAddViT, with additive attention and MoE layers in the MLPs, and as dense ones.

    Args:
      names: of models.
      shift_share: of tokens on the shift experts.
      track: goes through ``names``, to show progress.

    Returns:
      For each its ``name``, ``shift_share``, and ``energy_mj`` by kind: ``shiftaddvit``, ``msa``, and ``sra``
      where the model has it; each by `ENERGY_MODELS`.
    """
    rows = []
    for name in track(names):
        row = {"name": name, "shift_share": shift_share, "energy_mj": {}}
        kinds = {"shiftaddvit": {"attention": "hamming_linear", "mlp": "moe"}, "msa": {"attention": "msa"}}
        if "sra" in model_row(name)["attention"]:
            kinds["sra"] = {"attention": "sra"}
        for kind, arguments in kinds.items():
            report = cost_report(create_model(name, **arguments), shift_share=shift_share)
            row["energy_mj"][kind] = report["energy_mj"]
        rows.append(row)
    return rows
