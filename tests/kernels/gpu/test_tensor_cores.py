"""Which numbers lie in which lane: as the PTX ISA says, section "Matrix Fragments for mma" of each shape.

PoCL runs the kernels with these places and a product by hand; that ``mma`` does as the PTX ISA says
can only be seen on a GPU.
"""

import numpy as np
import pytest

from kernels_tvm.gpu.instructions import TensorCore
from kernels_tvm.gpu.targets import gpu_target

# From a bit's number in a lane, the lane's group and its place there, to row and inner index.
FRAGMENTS_OF_BITS = {
    "m8n8k128": {
        "a": lambda i, group, lane: (group, lane * 32 + i),
        "b": lambda i, group, lane: (group, lane * 32 + i),
        "c": lambda i, group, lane: (group, lane * 2 + i % 2),
    },
    "m16n8k256": {
        "a": lambda i, group, lane: (
            group + 8 * (not (i < 32 or 64 <= i < 96)),
            lane * 32 + i % 32 + 128 * (i >= 64),
        ),
        "b": lambda i, group, lane: (group, lane * 32 + i % 32 + 128 * (i >= 32)),
        "c": lambda i, group, lane: (group + 8 * (i >= 2), lane * 2 + i % 2),
    },
}


@pytest.mark.parametrize("name", ["cuda-sm_75", "cuda-sm_86"])
def test_bits_lie_where_the_ptx_isa_says(name):
    core = TensorCore(gpu_target(name), "bits", 32)
    fragments = FRAGMENTS_OF_BITS[core.shape]
    for lane in range(32):
        for operand, registers, place in (
            ("a", core.a_registers, core.a_place),
            ("b", core.b_registers, core.b_place),
        ):
            for bit in range(32 * registers):
                row, word = place(lane, bit // 32)
                assert (row, word * 32 + bit % 32) == fragments[operand](bit, lane // 4, lane % 4)
        for i in range(core.c_registers):
            assert core.c_place(lane, i) == fragments["c"](i, lane // 4, lane % 4)


@pytest.mark.parametrize("name", ["cuda-sm_75", "cuda-sm_86"])
@pytest.mark.parametrize("kind", ["int8", "bits"])
def test_each_element_lies_in_one_register_of_one_lane(name, kind):
    core = TensorCore(gpu_target(name), kind, 32)
    for place, registers, shape in (
        (core.a_place, core.a_registers, (core.rows, core.words)),
        (core.b_place, core.b_registers, (core.columns, core.words)),
        (core.c_place, core.c_registers, (core.rows, core.columns)),
    ):
        places = [place(lane, register) for lane in range(32) for register in range(registers)]
        assert sorted(places) == sorted(np.ndindex(*shape))
