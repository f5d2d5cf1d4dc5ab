"""Custom calls in programs of several devices: each calls a kernel on its part of the batch."""

from collections.abc import Callable, Sequence

import jax
from jax.custom_batching import sequential_vmap
from jax.experimental.custom_partitioning import ArrayMapping, SdyShardingRule, custom_partitioning
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array


def split_over_devices(call: Callable[..., Sequence[Array]], batched: int) -> Callable[..., Sequence[Array]]:
    """``call``, where the batch is split over devices as the results or the batched arguments are.

    XLA knows nothing of a custom call, so by itself it has each device call it on the whole batch.

    Args:
      call: a function of arrays to several; the first axis of its results is the batch.
      batched: how many of its arguments have the batch as their first axis; the others are whole everywhere.
    """

    def batch_sharding(mesh, arrays):
        axes = (array.sharding.spec[:1] for array in arrays if array.sharding is not None)
        return NamedSharding(mesh, PartitionSpec(*next(filter(any, axes), ())))

    def partition(mesh, arguments, results):
        batch = batch_sharding(mesh, [*jax.tree.leaves(results), *arguments[:batched]])
        whole = NamedSharding(mesh, PartitionSpec())
        shardings = tuple(batch if index < batched else whole for index in range(len(arguments)))
        return mesh, call, jax.tree.map(lambda _: batch, results), shardings

    def infer(mesh, arguments, results):
        return jax.tree.map(lambda _: batch_sharding(mesh, arguments[:batched]), results)

    def rule(mesh, arguments, results):
        factors = [
            *(_factors(f"argument{index}", array, index < batched) for index, array in enumerate(arguments)),
            *(_factors(f"result{index}", array, True) for index, array in enumerate(results)),
        ]
        whole = tuple(name for names in factors for name in names if name != "batch")
        mappings = tuple(ArrayMapping(*names) for names in factors)
        split = mappings[: len(arguments)], mappings[len(arguments) :]
        return SdyShardingRule(*split, need_replication_factors=whole)

    partitioned = custom_partitioning(call)
    partitioned.def_partition(partition, infer_sharding_from_operands=infer, sharding_rule=rule)
    return sequential_vmap(partitioned)


def _factors(name, array, is_batched):
    """Names for the axes of an array in Shardy's rule: the same name means that they are split alike."""
    own = [f"{name}_{axis}" for axis in range(len(array.shape))]
    return ["batch", *own[1:]] if is_batched else own
