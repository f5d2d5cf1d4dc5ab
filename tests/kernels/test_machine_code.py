"""What the compiled kernels consist of: for every target, whether or not this machine runs it."""

import functools
import re

import pytest

from kernels_tvm.cpu import library
from kernels_tvm.cpu.targets import TARGETS, named_target
from kernels_tvm.descriptions import (
    BinarizeDescription,
    BinarySoftmaxDescription,
    DepthwiseConvDescription,
    HadamardDescription,
    HammingLinearDescription,
    HammingProductDescription,
    HeadDescription,
    LinearDescription,
    MatAddDescription,
    MlpDescription,
    PatchEmbedDescription,
    SoftmaxAttentionDescription,
)
from kernels_tvm.store import Kernel

EVERY_TARGET = pytest.mark.parametrize("target", TARGETS, ids=lambda target: target.name)


def mixture(inputs, outputs):
    return LinearDescription("moe", inputs, outputs, 4, "int8")


INT8, FLOAT, SHIFTS, TWO_SHIFTS, TWO_POWERS = (
    Kernel("linear", LinearDescription("shift", 48, 80, *settings))
    for settings in ((4, "int8"), (5, "float"), (4, "int8", True), (8, "int8", True), (8, "int8"))
)
DENSE_INT8 = Kernel("linear", LinearDescription("dense", 48, 80, precision="int8"))
BOTH_SHIFTS = pytest.mark.parametrize("shifts", [SHIFTS, TWO_SHIFTS], ids=["one power", "two powers"])
MATADDS = [Kernel("matadd", MatAddDescription(13, 70, dtype)) for dtype in ("int8", "float32")]
MLP = Kernel("mlp", MlpDescription(mixture(48, 96), mixture(96, 48), 1e-6, 35, (5, 7)))
EVERY_KERNEL = [
    INT8,
    FLOAT,
    SHIFTS,
    TWO_SHIFTS,
    TWO_POWERS,
    DENSE_INT8,
    *MATADDS,
    MLP,
    Kernel("linear", mixture(48, 80)),
    Kernel("hamming_linear", HammingLinearDescription(mixture(48, 144), mixture(48, 48), 2, 35, 1e-6, True)),
    Kernel(
        "binary_softmax",
        BinarySoftmaxDescription(mixture(48, 144), mixture(48, 48), 2, 36, 1e-6, False, (5, 7)),
    ),
    Kernel("softmax_attention", SoftmaxAttentionDescription(mixture(48, 144), mixture(48, 48), 2, 35, 1e-6)),
    Kernel(
        "patch_embed", PatchEmbedDescription(LinearDescription("dense", 9 * 16, 48), 9, 6, 16, 3, 2, 1e-5)
    ),
    Kernel("hamming_product", HammingProductDescription(40)),
    Kernel("hadamard", HadamardDescription(64)),
    Kernel("binarize", BinarizeDescription(40, True)),
    Kernel("binarize", BinarizeDescription(40, True, packed=True)),
    Kernel("depthwise_conv", DepthwiseConvDescription(5, 7, 20, (3, 3))),
    Kernel("head", HeadDescription(LinearDescription("dense", 48, 80), 35, 1e-6)),
]


@functools.cache
def assembly(kernel, target):
    return library.build(kernel, target, threads=2).mod.inspect_source("asm")


@EVERY_TARGET
def test_sums_are_kept_in_registers_not_on_the_heap(target):
    convolve = assembly(Kernel("depthwise_conv", DepthwiseConvDescription(5, 7, 20, (3, 3))), target)
    assert "TVMBackendAllocWorkspace" not in convolve
    assert "TVMBackendAllocWorkspace" in assembly(MLP, target)  # whose tiles are too large for registers


def test_every_kernel_is_among_these():
    assert {kernel.name for kernel in EVERY_KERNEL} == set(library.builders())


@pytest.mark.parametrize("kernel", EVERY_KERNEL, ids=lambda kernel: kernel.name)
def test_every_kernel_compiles_for_another_machine(kernel):
    assert "__tvm_ffi_main" in assembly(kernel, named_target("neon"))


@pytest.mark.parametrize(
    ("target", "instructions"),
    [
        ("amx", [r"tdpbusd\s+%tmm", r"tdpbf16ps\s+%tmm"]),
        ("avx512_vnni", [r"vpdpbusd\s.*%zmm", r"vfmadd231ps\s.*%zmm"]),
        ("avx512", [r"vpmaddubsw\s.*%zmm", r"vfmadd231ps\s.*%zmm"]),
        ("avx_vnni", [r"vpdpbusd\s.*%ymm", r"vfmadd231ps\s.*%ymm"]),
        ("avx2", [r"vpmaddubsw\s.*%ymm", r"vfmadd231ps\s.*%ymm"]),
        ("neon", [r"sdot\s+v\d+\.4s", r"fmla\s+v\d+\.4s"]),
    ],
)
@pytest.mark.parametrize("kernel", [Kernel("linear", mixture(48, 80)), MLP], ids=["linear", "mlp"])
def test_mixtures_compile_to_the_targets_own_products(kernel, target, instructions):
    code = assembly(kernel, named_target(target))
    for instruction in instructions:
        assert re.search(instruction, code)
    if not target.startswith(("amx", "avx512")):
        assert "%zmm" not in code


@pytest.mark.parametrize(
    ("target", "instruction"),
    [
        ("amx", r"tdpbusd\s+%tmm"),
        ("avx512_vnni", r"vpdpbusd\s.*%zmm"),
        ("avx512", r"vpmaddwd\s.*%zmm"),
        ("avx_vnni", r"vpdpbusd\s.*%ymm"),
        ("avx2", r"vpmaddwd\s.*%ymm"),
        ("neon", r"sdot\s+v\d+\.4s"),
    ],
)
@pytest.mark.parametrize("kernel", [TWO_POWERS, DENSE_INT8], ids=["two powers", "dense"])
def test_general_int8_products_are_none_that_saturate(kernel, target, instruction):
    code = assembly(kernel, named_target(target))
    assert re.search(instruction, code)
    assert "vpmaddubsw" not in code


@EVERY_TARGET
def test_threads_claim_work_by_one_instruction_where_llvm_names_it(target):
    # It sets a bit and returns the old one, in one step for all threads.
    claims = re.search(r"lock\s+bts", assembly(MLP, target))
    assert bool(claims) == target.claims == (target.machine == "x86_64")


# The counter: an inner loop is what a backward jump repeats and no other backward jump is in. A jump back to
# where the function returns repeats nothing.
MULTIPLICATION = re.compile(
    r"(\{vex\}\s*)?(i?mul|v?p?mul|v?pmadd|vpdp|vfn?m|v?dpp|tdp"  # x86
    r"|f?n?madd|f?n?msub|fn?mul|fml[as]|ml[as]|[su]q?d?mul|[su]ml[as]l|[su]us?dot|[su]dot)"  # ARM
)
PRODUCT_OF_FLOATS = re.compile(r"v(mul|fn?m\w+)[ps]s\s|(fmul|fml[as])\s")
SHIFT_BY_COUNTS = re.compile(r"vpsllv|[su]shl\s")
RETURN = {"ret", "retq"}
JUMP = re.compile(r"(?:j\w+|b(?:\.\w+)?|cbn?z|tbn?z)\s+(?:.*,\s*)?(\.L\w+)$")


def inner_loops(code):
    """The instructions of each."""
    labels, loops, instructions = {}, [], []
    for line in code.splitlines():
        line = re.split("#|//", line)[0].strip()
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(instructions)
        elif line and not line.startswith(".") and not line.endswith(":"):
            instructions.append(line)
            jump = JUMP.match(line)
            if jump and jump[1] in labels and not RETURN.intersection(instructions[labels[jump[1]] :]):
                loops.append((labels[jump[1]], len(instructions)))
    return [
        instructions[start:end]
        for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
    ]


def count(pattern, loop):
    return sum(bool(pattern.match(instruction)) for instruction in loop)


@EVERY_TARGET
@pytest.mark.parametrize("kernel", MATADDS, ids=["int8", "float32"])
def test_no_inner_loop_of_matadd_multiplies(target, kernel):
    loops = inner_loops(assembly(kernel, target))
    added, subtracted = (re.compile(rf"vp?{name}(ps|d)\s|[fs]?{name}w?\s+v") for name in ("add", "sub"))
    assert any(count(added, loop) >= 4 and count(subtracted, loop) >= 4 for loop in loops)
    assert [count(MULTIPLICATION, loop) for loop in loops] == [0] * len(loops)


@EVERY_TARGET
@pytest.mark.parametrize("size", [64, 320])
def test_the_hadamard_transform_multiplies_no_floats_at_all(target, size):
    code = assembly(Kernel("hadamard", HadamardDescription(size)), target)
    added, subtracted = (re.compile(rf"v{name}ps\s|f{name}\s+v") for name in ("add", "sub"))
    assert any(count(added, loop) >= 4 and count(subtracted, loop) >= 4 for loop in inner_loops(code))
    assert re.search(PRODUCT_OF_FLOATS, code) is None


@EVERY_TARGET
@BOTH_SHIFTS
def test_no_inner_loop_of_the_pure_matshift_that_shifts_multiplies(target, shifts):
    shifting = [loop for loop in inner_loops(assembly(shifts, target)) if count(SHIFT_BY_COUNTS, loop)]
    assert any(count(SHIFT_BY_COUNTS, loop) >= 4 for loop in shifting)
    assert [count(MULTIPLICATION, loop) for loop in shifting] == [0] * len(shifting)


@EVERY_TARGET
@BOTH_SHIFTS
def test_no_inner_loop_of_the_pure_matshift_multiplies_whole_numbers(target, shifts):
    # Floats are multiplied where tokens are divided by their scale, ahead of the products.
    for loop in inner_loops(assembly(shifts, target)):
        assert count(MULTIPLICATION, loop) == count(PRODUCT_OF_FLOATS, loop)


@EVERY_TARGET
@pytest.mark.parametrize("kernel", [INT8, FLOAT], ids=["int8", "float"])
def test_the_same_count_finds_the_multiplications_of_the_other_products(target, kernel):
    loops = inner_loops(assembly(kernel, target))
    assert max(count(MULTIPLICATION, loop) for loop in loops) >= 2
