"""What the compiled GPU kernels consist of, as PTX says."""

import re

import pytest

from kernels_tvm.descriptions import LinearDescription
from kernels_tvm.gpu import build, library, nvidia
from kernels_tvm.store import Kernel

# Of data: addresses are what an integer is multiplied by a constant for.
MULTIPLICATION = re.compile(r"fma|(mul|mad)\S*\.f32|dp4a|dp2a|mma|(mul|mad)\S*\s+%\w+, %\w+, %")


def inner_loops(ptx):
    """The instructions of each loop that no other loop is in, without their predicates."""
    labels, loops, instructions = {}, [], []
    for line in ptx.splitlines():
        line = re.sub(r"^@!?%\w+\s+", "", line.strip()).rstrip(";")
        if label := re.match(r"(\$\w+):", line):
            labels[label[1]] = len(instructions)
        elif re.match(r"[a-z]", line) and not line.startswith((".", "//")):
            instructions.append(line)
            target = re.match(r"bra(?:\.uni)?\s+(\$\w+)", line)
            if target and target[1] in labels:
                loops.append((labels[target[1]], len(instructions)))
    return [
        instructions[start:end]
        for start, end in loops
        if not any(start <= s and e <= end and (s, e) != (start, end) for s, e in loops)
    ]


def count(pattern, instructions):
    return sum(bool(re.match(pattern, instruction)) for instruction in instructions)


def ptx_of(linear, target):
    return nvidia.compile_ptx(
        build.source(library.emit(Kernel("linear", linear), target), target), target.arch
    )


def product_loop(linear, target, pattern):
    """The inner loop that has most of some instruction: that of the product."""
    return max(inner_loops(ptx_of(linear, target)), key=lambda loop: count(pattern, loop))


def test_the_float_product_by_shifts_adds_to_exponents_and_multiplies_nothing(architecture):
    loop = product_loop(LinearDescription("shift", 64, 512, shifts=True), architecture, r"add(\.rn)?\.f32")
    products = count(r"add(\.rn)?\.f32", loop)
    assert products >= 64
    assert count(r"add\.s32", loop) >= products
    assert count(MULTIPLICATION, loop) == 0


@pytest.mark.parametrize("bits", [4, 8], ids=["one power", "two powers"])
def test_the_int8_product_by_shifts_multiplies_nothing(architecture, bits):
    linear = LinearDescription("shift", 64, 512, bits, "int8", shifts=True)
    loop = product_loop(linear, architecture, r"shl\.b32")
    assert count(r"shl\.b32", loop) >= 16 * bits
    assert count(r"(add|sub)\.s32", loop) >= 64
    assert count(MULTIPLICATION, loop) == 0


def test_the_same_count_finds_the_multiplications_of_the_float_product(architecture):
    loop = product_loop(LinearDescription("shift", 64, 512), architecture, r"fma\.rn\.f32")
    assert count(MULTIPLICATION, loop) >= 64


def test_rows_are_loaded_and_stored_in_vectors_of_128_bits(architecture):
    ptx = ptx_of(LinearDescription("shift", 64, 512), architecture)
    for instruction in ("ld.global.nc.v4", "st.shared.v4", "ld.shared.v4", "st.global.v4"):
        assert instruction in ptx


def test_int8_products_are_those_of_the_tensor_cores(architecture):
    shape = {(8, 8, 16): "m8n8k16", (16, 8, 32): "m16n8k32"}[architecture.int8_mma]
    loop = product_loop(LinearDescription("shift", 512, 64, 4, "int8"), architecture, "mma")
    assert count(rf"mma\.sync\.aligned\.{shape}\.row\.col\.s32\.s8\.s8\.s32", loop) >= 8
