"""What can be said of the GPU kernels without a GPU: bytes, operations, resources, and bounds of their times.

A bound is the longer of two times at the peaks of a GPU's data sheet: to move a kernel's bytes, and to start
its operations. It is no measurement: kernels take longer.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from kernels_tvm.descriptions import (
    BinarizeDescription,
    DepthwiseConvDescription,
    HammingProductDescription,
    LinearDescription,
    MatAddDescription,
    round_up,
)
from kernels_tvm.gpu.build import source
from kernels_tvm.gpu.library import emit, scratch
from kernels_tvm.gpu.nvidia import Resources, compile_cubin, compile_ptx, disassemble, nvcc
from kernels_tvm.gpu.targets import GpuTarget, gpu_target
from kernels_tvm.store import Kernel
from shiftaddvit_jax.costs.gpus import GPUS, INTEGER_LANES, ISSUED_LANES, POPCOUNT_LANES, Gpu
from shiftaddvit_jax.costs.shapes import ATTENTIONS, DEPTHWISE, PAPER_CONTEXTS, PAPER_LAYERS
from shiftaddvit_jax.progress import track

Arrays = list[tuple[tuple[int, ...], str]]
WARP, PARTS = 32, 4  # threads of a warp, parts of a multiprocessor


class Case(NamedTuple):
    """A kernel at a shape.

    Attributes:
      name: the kernel and the shape, for people.
      kernel: what is compiled.
      arrays: shapes and dtypes of its arguments and of its result, in order.
      operations: instructions of its inner loops, over all threads, by kind.
      dense: batch, rows, inner size and columns of the float32 product that it replaces; None without one.
    """

    name: str
    kernel: Kernel
    arrays: Arrays
    operations: dict[str, int]
    dense: tuple[int, int, int, int] | None = None

    @property
    def bytes(self) -> int:
        """The bytes that it moves at least: arguments, result, and twice what a launch hands to the next."""
        between = [(shape, dtype) for _, shape, dtype in scratch(self.kernel, *self.arrays[0][0][:-1])]
        return _bytes(self.arrays) + 2 * _bytes(between)


def matshift(tokens: int, inputs: int, outputs: int) -> list[Case]:
    """A linear layer with power-of-two weights: float32 products, additions to exponents, int8 products."""
    cases = []
    products = tokens * inputs * outputs
    for name, bits, activations, shifts, operations in (
        ("float", 5, "float", False, {"float": products}),
        ("float shifts", 5, "float", True, {"float": products, "integer": 2 * products}),
        ("int8", 4, "int8", False, {"int8_tensor": 2 * products}),
    ):
        linear = LinearDescription("shift", inputs, outputs, bits, activations, shifts)
        parameters = [(shape, dtype) for _, shape, dtype in linear.arguments()]
        arrays = [((tokens, inputs), "float32"), *parameters, ((tokens, outputs), "float32")]
        dense = (1, tokens, inputs, outputs)
        label = f"matshift {tokens}x{inputs}x{outputs} {name}"
        cases.append(Case(label, Kernel("linear", linear), arrays, operations, dense))
    return cases


def matadd(tokens: int, head_dim: int, codes: int, heads: int) -> list[Case]:
    """The context k^T v of codes and values: an instruction of logic and an addition a value and code."""
    shape = (heads, codes, tokens, head_dim)
    cases = []
    for dtype, kinds in (("float32", ("integer", "float")), ("int8", ("integer", "integer"))):
        operations = Counter()
        for kind in kinds:
            operations[kind] += math.prod(shape)
        arrays: Arrays = [
            ((heads, codes, tokens), dtype),
            ((heads, tokens, head_dim), dtype),
            ((heads, codes, head_dim), "int32" if dtype == "int8" else "float32"),
        ]
        label = f"matadd {tokens}x{head_dim}x{codes}, {heads} heads, {dtype}"
        cases.append(
            Case(
                label,
                Kernel("matadd", MatAddDescription(tokens, head_dim, dtype)),
                arrays,
                dict(operations),
                shape,
            )
        )
    return cases


def others() -> list[Case]:
    """Kernels whose shapes the paper does not list, at shapes of PVTv2-B0."""
    (tokens, heads, head_dim), (side, channels) = ATTENTIONS[-1], DEPTHWISE[0]
    values = ((heads, tokens, head_dim), "float32")
    words = ((heads, tokens, 1), "uint32")
    products = heads * tokens * tokens
    image = ((1, side, side, channels), "float32")
    taps, bias = ((9, channels), "float32"), ((channels,), "float32")
    conv = DepthwiseConvDescription(side, side, channels, (3, 3), gelu=True)
    return [
        Case(
            f"binarize and pack {heads}x{tokens}x{head_dim}",
            Kernel("binarize", BinarizeDescription(head_dim, True, packed=True)),
            [values, words],
            {"float": 2 * heads * tokens * head_dim, "integer": 2 * heads * tokens * head_dim},
        ),
        Case(
            f"popcount {heads}x{tokens}x{tokens}, {head_dim} bits",
            Kernel("hamming_product", HammingProductDescription(head_dim)),
            [words, ((heads, 1, tokens), "uint32"), ((heads, tokens, tokens), "int32")],
            {"integer": 2 * products, "popcount": products},
            (heads, tokens, head_dim, tokens),
        ),
        Case(
            f"depthwise 3x3, GELU {side}x{side}x{channels}",
            Kernel("depthwise_conv", conv),
            [image, taps, bias, image],
            {"float": 9 * math.prod(image[0])},
        ),
    ]


def paper_cases() -> list[Case]:
    """MatShift and MatAdd at the shapes of the paper's Figures 4 and 5, and `others`; all for one image."""
    cases = [case for shape in PAPER_LAYERS for case in matshift(*shape)]
    return cases + [case for shape in PAPER_CONTEXTS for case in matadd(*shape)] + others()


def _bytes(arrays):
    return sum(math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in arrays)


def bound(gpu: Gpu, moved: int, operations: dict[str, int]) -> float:
    """Seconds in which a GPU can move the bytes, or start the operations, whichever takes longer."""
    cycles = gpu.multiprocessors * gpu.clock * 1e9
    lanes = {"float": gpu.float_lanes, "integer": INTEGER_LANES, "popcount": POPCOUNT_LANES}
    threads = {kind: count for kind, count in operations.items() if kind in lanes}
    times = [count / (cycles * lanes[kind]) for kind, count in threads.items()]
    times.append(sum(threads.values()) / (cycles * ISSUED_LANES))
    times.append(operations.get("int8_tensor", 0) / (gpu.int8_tensor * 1e12))
    return max(moved / (gpu.bandwidth * 1e9), *times)


def dense_bound(gpu: Gpu, shape: tuple[int, int, int, int]) -> float:
    """`bound` of a float32 product without tensor cores: a fused multiply-add for each product."""
    batch, rows, inner, columns = shape
    moved = 4 * batch * (rows * inner + inner * columns + rows * columns)
    return bound(gpu, moved, {"float": math.prod(shape)})


def occupancy(target: GpuTarget, threads: int, launch: Resources) -> float:
    """The share of a multiprocessor's threads that blocks of a launch can fill.

    NVIDIA's ``cuda_occupancy.h`` (CUDA 13) computes it so: each of the four parts of a multiprocessor gives a
    warp registers in units of 256. A block gets shared memory in units of 256 bytes; from compute capability
    8.0 on, in units of 128, with one KiB more for the system.
    """
    newer = target.capability >= 80
    warps = -(-threads // WARP)
    registers = round_up(launch.registers * WARP, 256)
    shared = round_up(launch.shared_memory + (1024 if newer else 0), 128 if newer else 256)
    blocks = min(
        PARTS * (target.multiprocessor_registers // PARTS // registers) // warps,
        target.multiprocessor_shared_memory // max(shared, 1),
        target.multiprocessor_threads // (warps * WARP),
        target.multiprocessor_blocks,
    )
    return blocks * warps * WARP / target.multiprocessor_threads


_KINDS = (  # the first that fits
    ("shared memory", r"(ld|st)\.shared"),
    ("global memory", r"(ld|st)\.(global|param)"),
    ("tensor", r"mma\."),
    ("dot product", r"dp4a\."),
    ("popcount", r"popc\."),
    ("float multiply", r"(fma|mul)\.\S*f32"),
    ("float", r"\w+\.\S*f32"),
    ("barrier or branch", r"(bar|bra|ret)"),
    ("integer multiply", r"(mul|mad)\."),
    ("integer and logic", r""),
)


_MACHINE_KINDS = (
    ("shared memory", r"(LDS|STS|LDSM|ATOMS)\b"),
    ("global memory", r"(LD|ST|LDG|STG|LDC|ULDC|LDL|STL)\b"),
    ("tensor", r"[IBH]MMA"),
    ("dot product", r"IDP"),
    ("popcount", r"U?POPC"),
    ("float multiply", r"(FFMA|FMUL)"),
    ("float", r"(F[A-Z]|MUFU|I2F)"),
    ("barrier or branch", r"(BAR|BRA|BSSY|BSYNC|WARPSYNC|CALL|RET|EXIT|NOP)\b"),
    ("integer multiply", r"U?IMAD(?!\.(MOV|SHL|IADD))"),
    ("integer and logic", r""),
)


def instruction_mix(ptx: str) -> dict[str, dict[str, int]]:
    """Numbers of instructions in the PTX of each launch, by the launch's name and by kind."""
    launches = re.findall(r"\.entry (\w+)\(.*?\n\{(.*?)\n\}", ptx, re.DOTALL)
    return {
        name: _count(r"^\s+(?:@!?%\w+\s+)?([a-z]\w*[.\w:]*)[^\n]*;", body, _KINDS) for name, body in launches
    }


def machine_mix(sass: str) -> dict[str, dict[str, int]]:
    """Numbers of instructions in machine code, as `disassemble` writes it: an IMAD may add or move there."""
    _, *parts = re.split(r"^\.text\.(\w+):$", sass, flags=re.MULTILINE)
    launches = zip(parts[::2], parts[1::2], strict=True)
    instruction = r"^\s+/\*\w+\*/\s+(?:@!?U?P\w+\s+)?([A-Z]\w*[.\w]*)[^\n]*;"
    return {name: _count(instruction, body, _MACHINE_KINDS) for name, body in launches}


def _count(instruction, body, kinds):
    found = re.findall(instruction, body, re.MULTILINE)
    return dict(Counter(next(kind for kind, pattern in kinds if re.match(pattern, each)) for each in found))


def static_rows(cases: list[Case]) -> Iterator[dict[str, Any]]:
    """A row for every case and GPU, of kernels compiled with nvcc."""
    for case in cases:
        for gpu in GPUS:
            target = gpu_target(gpu.target)
            code = source(emit(case.kernel, target), target)
            cubin, launches = compile_cubin(code, target.arch)
            machine = machine_mix(disassemble(cubin))
            mixes = instruction_mix(compile_ptx(code, target.arch))
            threads = {
                name: int(count) for count, name in re.findall(r"__launch_bounds__\((\d+)\) (\w+)\(", code)
            }
            yield {
                "kernel": case.name,
                "gpu": gpu.name,
                "target": target.name,
                "bytes": case.bytes,
                "operations": case.operations,
                "bound_seconds": bound(gpu, case.bytes, case.operations),
                "dense_bound_seconds": dense_bound(gpu, case.dense) if case.dense else None,
                "launches": {
                    name: {
                        "threads": threads[name],
                        "registers": launch.registers,
                        "shared_memory": launch.shared_memory,
                        "spills": launch.spills,
                        "occupancy": occupancy(target, threads[name], launch),
                        "instructions": mixes[name],
                        "machine_instructions": machine.get(name),
                    }
                    for name, launch in launches.items()
                },
            }


def static_report() -> dict[str, Any]:
    """The rows of all cases on all GPUs, with a progress bar.

    Raises:
      ValueError: there is no compiler here.
    """
    if nvcc() is None:
        raise ValueError("the report needs nvcc, which is not on the PATH; install the CUDA toolkit")
    cases = paper_cases()
    return {"rows": list(track(static_rows(cases), "compiling", len(cases) * len(GPUS)))}
