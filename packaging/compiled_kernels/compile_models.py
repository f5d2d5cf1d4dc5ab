"""Compile what the wheel of compiled kernels holds, into the folder beside this file.

The cache keeps what is compiled, so that a stopped run goes on where it was.
"""

import argparse
import os
from pathlib import Path

import shiftaddvit_jax as sav
from kernels_tvm.cpu.compiled import PACKAGE
from kernels_tvm.cpu.targets import named_target
from shiftaddvit_jax.checkpoints.published import shipped_models
from shiftaddvit_jax.checkpoints.source import open_source
from shiftaddvit_jax.compile import kernels_of, write_package

HERE = Path(__file__).parent
PAPERS = ("pvt_tiny", "pvt_v2_b0", "pvt_v2_b1", "pvt_v2_b2", "deit_tiny", "deit_small")


def main() -> None:
    """Compile, and say how much there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default=",".join(PAPERS), help="beside those that are shipped")
    parser.add_argument("--targets", default="amx,avx512_vnni,avx2")
    parser.add_argument("--threads", default="1,2,4,8")
    arguments = parser.parse_args()
    models = [open_source(name).model for name in shipped_models()]
    models += [
        sav.create_model(name, attention="hamming_linear", mlp="moe", activations=activations)
        for name in arguments.models.split(",")
        for activations in ("float", "int8")
    ]
    kernels = {kernel.key: kernel for model in models for kernel in kernels_of(model)}
    targets = [named_target(name) for name in arguments.targets.split(",")]
    threads = [int(count) for count in arguments.threads.split(",")]
    os.environ["XDG_DATA_HOME"] = str(HERE)  # no tile sizes of this machine
    folder = HERE / PACKAGE
    files = write_package(folder, kernels.values(), targets, threads)["files"]
    size = sum((folder / name).stat().st_size for name in files)
    print(f"{folder}: {len(kernels)} kernels in {len(files)} files, {size / 1e6:.1f} MB")


if __name__ == "__main__":
    main()
