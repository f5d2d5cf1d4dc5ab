"""Which device holds what: batches split over all, parameters whole on each or split over several."""

from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import PyTree

DATA, MODEL = "data", "model"  # the mesh's axes
BATCH = PartitionSpec((DATA, MODEL))


def create_mesh(model: int = 1) -> Mesh:
    """All devices of all processes, [data, model]: ``model`` of them share one copy of the parameters.

    1 is data parallelism with whole copies; as many as there are devices split everything; what lies between
    has several copies, each split.

    Raises:
      ValueError: a number that does not divide that of devices.
    """
    devices = np.array(jax.devices())
    if len(devices) % model:
        raise ValueError(f"config.devices.model is {model}, which does not divide {len(devices)} devices")
    return Mesh(devices.reshape(-1, model), (DATA, MODEL))


def check_batch_size(mesh: Mesh, batch_size: int, parts: int = 1) -> None:
    """Raise a ``ValueError`` unless each of ``parts`` of a batch has as many images for every device."""
    if batch_size % (mesh.size * parts):
        raise ValueError(
            f"config.data.batch_size is {batch_size}, expected a multiple of {mesh.size * parts}: "
            f"{mesh.size} devices, times config.train.accumulate = {parts}"
        )


def state_sharding(mesh: Mesh, shape: tuple[int, ...]) -> NamedSharding:
    """Where an array of the state lies: split along its longest axis that "model" divides, or whole."""
    parts = mesh.shape[MODEL]
    axes = [axis for axis, size in enumerate(shape) if size % parts == 0 and size]
    if parts == 1 or not axes:
        return NamedSharding(mesh, PartitionSpec())
    longest = max(axes, key=lambda axis: shape[axis])
    return NamedSharding(
        mesh, PartitionSpec(*(MODEL if axis == longest else None for axis in range(len(shape))))
    )


def state_shardings(mesh: Mesh, state: PyTree) -> PyTree:
    """`state_sharding` of each array, or shape, in ``state``."""
    return jax.tree.map(lambda leaf: state_sharding(mesh, leaf.shape), state)


def place_state(mesh: Mesh, state: PyTree) -> PyTree:
    """``state``, the same in every process, on the devices.

    Every array has memory of its own, which a step may take: both experts of a new mixture begin with one.
    """
    return jax.device_put(state, state_shardings(mesh, state), may_alias=False)


def place_batch(mesh: Mesh, batch: dict[str, np.ndarray]) -> dict[str, Any]:
    """The batch of which this process has its rows, in the order of processes, split over the devices."""
    sharding = NamedSharding(mesh, BATCH)
    return {name: jax.make_array_from_process_local_data(sharding, part) for name, part in batch.items()}


def to_host(tree: PyTree) -> PyTree:
    """``tree`` whole, as NumPy arrays of every process; all processes must call this."""
    if jax.process_count() == 1:
        return jax.device_get(tree)
    from jax.experimental import multihost_utils

    return multihost_utils.process_allgather(tree, tiled=True)


def start_processes(
    coordinator: str | None = None, processes: int | None = None, process: int | None = None
) -> None:
    """Join the processes of one run, before anything is computed.

    Without arguments the environment tells them: that of SLURM, Open MPI, TPU pods or Kubernetes, or
    JAX's own variables.

    Args:
      coordinator: ``HOST:PORT`` of process 0, which listens there and nowhere else.
      processes: how many there are.
      process: which this is, from 0.

    Raises:
      ValueError: some of the three without the others, or processes that cannot find each other.
    """
    given = (coordinator, processes, process)
    if any(value is not None for value in given) and None in given:
        raise ValueError("--coordinator, --processes and --process belong together; give all three, or none")
    if coordinator is not None and processes is not None and process is not None:
        host, _, port = coordinator.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"--coordinator must be HOST:PORT, got {coordinator!r}")
        if not 0 <= process < processes:
            raise ValueError(f"--process must be from 0 to {processes - 1}, got {process}")
    try:
        jax.distributed.initialize(
            coordinator, processes, process, coordinator_bind_address=coordinator if process == 0 else None
        )
    except (RuntimeError, ValueError) as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"the processes of the run cannot be joined: {reason}; give --coordinator HOST:PORT, --processes "
            "and --process"
        ) from None
