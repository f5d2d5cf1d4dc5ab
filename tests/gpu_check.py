"""What only an NVIDIA GPU can show, by one command: ``make gpu-check``.

It runs ``pytest -m gpu``, the benchmark of the kernels, and that of two models for 1 and for 32 images beside
XLA in float32, TF32 and bfloat16. Into one folder it writes ``gpu-check.log``, all that was printed, and
``gpu-check.json``:

- ``machine``: the GPU, its compute capability and driver; ``versions`` of the packages;
- ``steps``: of each its ``name``, ``seconds``, ``exit_code`` (None where its time was over) and, of a
  benchmark that ran, its ``report`` (see `shiftaddvit_jax.bench.gpu`);
- ``tests``: how many passed, failed and were skipped.

The machine's own Python and JAX are used. Packages that it lacks are installed beside the results, from a
folder of wheels and without what they depend on, so that its JAX stays as it is.
"""

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

# By the names of their modules: what the checks need beyond JAX for CUDA 13, and pip's names of it.
NEEDED = {
    "tvm": "apache-tvm==0.27.0.post1",
    "tvm_ffi": "apache-tvm-ffi==0.1.14.post1",
    "jax_tvm_ffi": "jax-tvm-ffi==0.1.3",
    "flax": "flax",
    "optax": "optax",
    "jaxtyping": "jaxtyping",
    "beartype": "beartype",
    "rich": "rich",
    "orbax.checkpoint": "orbax-checkpoint",
    "safetensors": "safetensors",
    "huggingface_hub": "huggingface_hub",
    "pytest": "pytest",
    "hypothesis": "hypothesis",
}
SECONDS = 450  # for all steps together
MODELS, BATCHES, ROUNDS = ("pvt_v2_b0", "deit_small"), (1, 32), 10
ROOT = Path(__file__).resolve().parent.parent


def steps(output: Path) -> dict[str, tuple[list[str], Path | None]]:
    """The command of each step, and the file of its report, by its name; what tells most comes first."""
    bench = [sys.executable, "-m", "shiftaddvit_jax", "bench", "--device", "gpu", "--rounds", str(ROUNDS)]
    found = {
        "tests": ([sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider"], None),
        "kernels": ([*bench, "--kernels"], output / "kernels.json"),
    }
    for model in MODELS:
        for batch in BATCHES:
            report = output / f"{model}-{batch}.json"
            found[f"{model}, batch {batch}"] = (
                [*bench, model, "--activations", "int8", "--batch", str(batch)],
                report,
            )
    return {
        name: ([*command, "--json", str(report)] if report else command, report)
        for name, (command, report) in found.items()
    }


def missing() -> list[str]:
    """What pip calls the packages that this Python lacks."""

    def is_there(module):
        try:
            return importlib.util.find_spec(module) is not None
        except ModuleNotFoundError:  # the package around it
            return False

    return [name for module, name in NEEDED.items() if not is_there(module)]


def install(names: list[str], wheels: Path | None, site: Path) -> None:
    """Install packages from a folder of wheels into ``site``, and nothing that they depend on.

    Raises:
      SystemExit: there is no such folder, or pip does not find them in it.
    """
    if wheels is None:
        raise SystemExit(
            f"gpu-check: error: missing here: {' '.join(names)}; put their wheels into a folder and say "
            "`make gpu-check WHEELS=FOLDER`"
        )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", "--no-compile"]
    command = [*pip, "--find-links", str(wheels), "--target", str(site), *names]
    if subprocess.run(command).returncode:
        raise SystemExit(f"gpu-check: error: {wheels} lacks a wheel for this Python of: {' '.join(names)}")


def run(name: str, command: list[str], report: Path | None, seconds: float, environment, log) -> dict:
    """Run a step, print and log what it prints, and return what the JSON says of it."""
    start, code = time.perf_counter(), None
    log.write(f"\n== {name}: {' '.join(command)}\n")
    log.flush()
    print(f"{name} ...", end=" ", flush=True)
    try:
        code = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=max(1, seconds)
        ).returncode
    except subprocess.TimeoutExpired:
        log.write("\nstopped: its time was over\n")
    took = time.perf_counter() - start
    print(f"{'time over' if code is None else f'exit code {code}'} after {took:.0f} s", flush=True)
    step = {"name": name, "seconds": took, "exit_code": code}
    if report is not None and report.is_file():
        step["report"] = json.loads(report.read_text())
    return step


def machine() -> dict[str, str | None]:
    """The GPU, as JAX and the driver describe it.

    Raises:
      SystemExit: JAX has no GPU here.
    """
    try:
        import jax
    except ImportError:
        raise SystemExit(
            "gpu-check: error: this Python has no JAX; name one: make gpu-check PYTHON=..."
        ) from None
    if jax.default_backend() != "gpu":
        raise SystemExit("gpu-check: error: JAX finds no NVIDIA GPU here; run this on a machine that has one")
    device = jax.devices()[0]
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = subprocess.run(query, capture_output=True, text=True).stdout.strip()
    return {"gpu": device.device_kind, "compute_capability": device.compute_capability, "driver": driver}


def versions() -> dict[str, str]:
    """Of Python and of the packages that matter."""
    found = {"python": sys.version.split()[0]}
    for package in ("jax", "jaxlib", "flax", "apache-tvm", "apache-tvm-ffi", "jax-tvm-ffi"):
        found[package] = metadata.version(package)
    return found


def test_counts(log: str) -> dict[str, int]:
    """How many tests had which outcome, from pytest's last line."""
    lines = [line for line in log.splitlines() if re.search(r"\d+ (passed|failed|skipped|error)", line)]
    found = re.findall(r"(\d+) (passed|failed|skipped|errors?)", lines[-1]) if lines else []
    return {outcome: int(number) for number, outcome in found}


def main() -> int:
    """Run all steps; the exit code is 0 if each ended with 0."""
    parser = argparse.ArgumentParser(prog="gpu-check", description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("gpu-check"), metavar="DIR")
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="wheels of what this Python lacks")
    arguments = parser.parse_args()
    output = arguments.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    site = output / "site"
    sys.path.append(str(site))
    # In this process JAX only says what there is; the steps get the memory.
    os.environ["XLA_PYTHON_CLIENT_PREALLOCATE"] = "false"
    found = {"machine": machine()}
    lacking = missing()
    if lacking:
        install(lacking, arguments.wheels, site)
    found["versions"] = versions()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join((str(ROOT), str(site)))}
    end = time.perf_counter() + SECONDS
    path = output / "gpu-check.log"
    with path.open("w") as log:
        found["steps"] = [
            run(name, command, report, end - time.perf_counter(), environment, log)
            for name, (command, report) in steps(output).items()
        ]
    found["tests"] = test_counts(path.read_text())
    result = output / "gpu-check.json"
    temporary = result.with_suffix(".new")
    temporary.write_text(json.dumps(found, indent=2) + "\n")
    temporary.replace(result)
    print(f"written to {result} and {path}")
    return int(any(step["exit_code"] != 0 for step in found["steps"]))


if __name__ == "__main__":
    sys.exit(main())
