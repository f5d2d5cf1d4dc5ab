"""Work on many machines, by Ray Data: a worker a device, results in the order of what they are of."""

import json
import logging
import os
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from shiftaddvit_jax.optional import require

# Where Ray is started here: nothing is reported to its makers, and all listen on the loopback interface, as
# they do by themselves on systems where Ray forms no clusters.
ALONE = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
    "RAY_BACKEND_LOG_LEVEL": "fatal",
}

Work = Callable[[Any], Any]
MapOnWorkers = Callable[[Callable[[], Work], Sequence[Any]], Iterator[Any]]


@contextmanager
def connect(address: str | None = None) -> Generator[MapOnWorkers]:
    """A connection to Ray: a function (make, items) to ``make()(item)`` for each item, in their order.

    Each worker calls ``make`` once. Ray sends it as the name of its module and its arguments, so workers need
    the same version of this package. Items and results are values of JSON. A worker has a GPU of its own, or
    a machine's CPUs where the cluster has no GPUs. One that dies is started again, with what it had not
    finished. The function raises a ``ValueError`` of one line if a worker fails.

    Connect before JAX computes anything: Ray starts programs, and JAX has threads by then.

    Args:
      address: of a cluster that runs; by default ``RAY_ADDRESS``, or a Ray of this machine alone, which ends
        with the block. If the process is connected already, that connection is taken, and stays.

    Raises:
      ValueError: Ray is missing, or no cluster is there.
    """
    require("ray", "--engine ray")
    address = address or os.environ.get("RAY_ADDRESS")
    with _environment({} if address else ALONE):
        import ray
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.ERROR)
        if ray.is_initialized():
            yield partial(_map, ray)
            return
        settings = {"log_to_driver": False, "logging_level": logging.ERROR}
        settings |= {"address": address} if address else {"address": "local", "include_dashboard": False}
        try:
            ray.init(**settings)
        except (ConnectionError, RuntimeError, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"no cluster of Ray at {address or 'this machine'}: {reason}") from None
        try:
            yield partial(_map, ray)
        finally:
            ray.shutdown()


def _map(ray, make, items):
    if not items:
        return
    context = ray.data.DataContext.get_current()
    context.execution_options.preserve_order = True
    context.enable_progress_bars = False
    workers, resources = worker_resources(ray.nodes())
    rows = ray.data.from_items([{"item": json.dumps(item)} for item in items], override_num_blocks=len(items))
    results = rows.map_batches(
        Worker,
        fn_constructor_args=(make,),
        batch_size=1,
        compute=ray.data.ActorPoolStrategy(size=workers),
        **resources,
    )
    try:
        yield from map(value_of, results.iter_rows())
    except ray.exceptions.RayError as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ValueError(f"a worker of Ray failed: {lines[-1].strip()}") from error


class Worker:
    """What an actor of Ray Data does: from rows ``item`` to rows ``result``, with ``value`` or ``error``.

    Both are JSON. An error of the input is a result, so that it reaches a person in one line, and not as what
    Ray says of a worker that failed; nor is it tried again.
    """

    def __init__(self, make: Callable[[], Work]) -> None:
        self.make = make
        self.work: Work | None = None

    def __call__(self, rows: Mapping[str, Sequence[str]]) -> dict[str, list[str]]:
        """The results of some rows."""
        return {"result": [json.dumps(self._result(json.loads(item))) for item in rows["item"]]}

    def _result(self, item):
        try:
            work = self.work = self.work or self.make()
            return {"value": work(item)}
        except (ValueError, OSError) as error:
            return {"error": " ".join(str(error).split())}


def value_of(row: Mapping[str, str]) -> Any:
    """The value of a row ``result``; a ``ValueError`` if it is an error."""
    result = json.loads(row["result"])
    if "error" in result:
        raise ValueError(result["error"])
    return result["value"]


def worker_resources(nodes: Sequence[dict[str, Any]]) -> tuple[int, dict[str, float]]:
    """How many workers a cluster has room for, and what each asks for, from what `ray.nodes` says.

    Raises:
      ValueError: it has neither GPUs nor CPUs.
    """
    resources = [node["Resources"] for node in nodes if node["Alive"]]
    gpus = sum(int(each.get("GPU", 0)) for each in resources)
    if gpus:
        return gpus, {"num_gpus": 1}
    cpus = [each["CPU"] for each in resources if each.get("CPU")]
    if not cpus:
        raise ValueError("the cluster has neither GPUs nor CPUs; start Ray on machines that have")
    return len(cpus), {"num_cpus": min(cpus)}


@contextmanager
def _environment(values: dict[str, str]) -> Generator[None]:
    """Variables of the environment, for a time."""
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value
