"""What nvcc makes of the kernels of codes: cubins without spills, and inner loops without products."""

import re

import pytest

from kernels_tvm.descriptions import (
    BinarizeDescription,
    DepthwiseConvDescription,
    HadamardDescription,
    HammingProductDescription,
    LinearDescription,
    MatAddDescription,
)
from kernels_tvm.gpu import build, library, nvidia
from kernels_tvm.store import Kernel

SUMS = [
    Kernel("matadd", MatAddDescription(3136, 32)),
    Kernel("matadd", MatAddDescription(32, 32, "int8")),
    Kernel("matadd", MatAddDescription(13, 5)),
    Kernel("hamming_product", HammingProductDescription(64)),
    Kernel("hadamard", HadamardDescription(64)),
]
OTHERS = [
    Kernel("hamming_product", HammingProductDescription(256)),
    Kernel("hadamard", HadamardDescription(8 * 28)),
    Kernel("binarize", BinarizeDescription(32, True)),
    Kernel("binarize", BinarizeDescription(75, True, packed=True)),
    Kernel("depthwise_conv", DepthwiseConvDescription(14, 14, 640, (3, 3), gelu=True)),
    Kernel("depthwise_conv", DepthwiseConvDescription(1, 784, 65, (1, 9))),
]


@pytest.mark.parametrize("kernel", SUMS + OTHERS, ids=str)
def test_kernels_compile_with_no_spills(architecture, kernel):
    source = build.source(library.emit(kernel, architecture), architecture)
    cubin, launches = nvidia.compile_cubin(source, architecture.arch)
    assert cubin.startswith(b"\x7fELF")
    assert launches
    assert {(launch.spills, launch.stack) for launch in launches.values()} == {(0, 0)}


def products(kernel, target):
    """The instructions that multiply data where a launch sums up: between its two barriers.

    A product of integers with a constant is part of an address; data are in registers.
    """
    ptx = nvidia.compile_ptx(build.source(library.emit(kernel, target), target), target.arch)
    between = ptx.split("bar.sync")[1]
    assert re.search(r"\b(add|popc|fma)\.", between)
    data = r"(?:mul|mad)\.\S+\s+%\w+, %\w+, %\w+|(?:mul|fma|mad)\.\S*f32|dp[24]a|\bmma\."
    return re.findall(data, between)


@pytest.mark.parametrize("kernel", SUMS, ids=str)
def test_sums_of_codes_multiply_no_data(architecture, kernel):
    assert products(kernel, architecture) == []


def test_products_of_floats_are_found_where_they_are(architecture):
    assert products(Kernel("linear", LinearDescription("shift", 64, 64)), architecture)


def test_long_codes_are_compared_by_tensor_cores_where_they_compare_bits(architecture):
    kernel = Kernel("hamming_product", HammingProductDescription(256))
    source = build.source(library.emit(kernel, architecture), architecture)
    ptx = nvidia.compile_ptx(source, architecture.arch)
    assert ("b1.b1.s32.xor.popc" in ptx) == (architecture.bit_mma is not None)
    assert ("popc.b32" in ptx) == (architecture.bit_mma is None)
