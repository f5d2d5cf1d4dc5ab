import shutil
import subprocess
import sys
from itertools import product

import pytest

from kernels_tvm.gpu.nvidia import Resources
from kernels_tvm.gpu.targets import GPU_TARGETS, gpu_target
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.costs import gpu_bounds
from shiftaddvit_jax.costs.gpus import GPUS

needs_nvcc = pytest.mark.skipif(
    shutil.which("nvcc") is None, reason="nvcc is not on the PATH (CUDA toolkit 13)"
)


@pytest.mark.parametrize(
    ("name", "teraflops"), [("T4", 8.1), ("RTX 3090", 35.6), ("A100", 19.5), ("H100", 66.9)]
)
def test_the_facts_multiply_to_the_datasheets_float32_peak(name, teraflops):
    (gpu,) = [gpu for gpu in GPUS if gpu.name == name]
    peak = 2 * gpu.multiprocessors * gpu.float_lanes * gpu.clock / 1e3
    assert peak == pytest.approx(teraflops, rel=0.01)


@pytest.mark.parametrize(
    ("name", "a_cycle", "clock"),
    # int8 multiply-adds of a multiprocessor's tensor cores in a cycle, and their clock: the whitepapers.
    [("T4", 1024, 1.59), ("RTX 3090", 1024, 1.695), ("A100", 2048, 1.41), ("H100", 4096, 1.83)],
)
def test_the_facts_multiply_to_the_datasheets_int8_peak(name, a_cycle, clock):
    (gpu,) = [gpu for gpu in GPUS if gpu.name == name]
    assert gpu.int8_tensor == pytest.approx(2 * gpu.multiprocessors * a_cycle * clock / 1e3, rel=0.01)


def test_a_bound_is_the_longer_of_moving_and_computing():
    t4 = GPUS[0]
    assert gpu_bounds.bound(t4, 320 * 10**9, {"float": 1}) == 1
    lanes_a_second = 40 * 1.59e9
    assert gpu_bounds.bound(t4, 1, {"popcount": 10**9}) == pytest.approx(1e9 / (16 * lanes_a_second))
    both = gpu_bounds.bound(t4, 1, {"float": 10**9, "integer": 10**9})
    assert both == pytest.approx(2e9 / (128 * lanes_a_second))


def test_bytes_are_those_of_arrays_and_twice_of_what_launches_hand_on():
    float_case = gpu_bounds.matadd(tokens=3136, head_dim=32, codes=16, heads=1)[0]
    parts = 14  # of at least 3136 / 16 tokens, in whole tiles of 32
    assert float_case.bytes == 4 * (16 * 3136 + 3136 * 32 + 16 * 32) + 2 * 4 * parts * 16 * 32
    assert float_case.operations == {"float": 16 * 3136 * 32, "integer": 16 * 3136 * 32}


# NVIDIA's own calculator, for lines of: capability; threads, registers and shared memory of a launch;
# threads, blocks and shared memory of a multiprocessor. Prints how many blocks fit.
CALCULATOR = """
#include <stdio.h>
#include "cuda_occupancy.h"
int main() {
  int capability, threads, registers, shared, most_threads, most_blocks, most_shared;
  while (scanf("%d %d %d %d %d %d %d", &capability, &threads, &registers, &shared, &most_threads,
               &most_blocks, &most_shared) == 7) {
    cudaOccDeviceProp device;
    device.computeMajor = capability / 10;
    device.computeMinor = capability % 10;
    device.maxThreadsPerBlock = 1024;
    device.maxThreadsPerMultiprocessor = most_threads;
    device.regsPerBlock = device.regsPerMultiprocessor = 65536;
    device.warpSize = 32;
    device.sharedMemPerBlock = 49152;
    device.sharedMemPerMultiprocessor = most_shared;
    device.numSms = 1;
    device.reservedSharedMemPerBlock = capability >= 80 ? 1024 : 0;
    device.sharedMemPerBlockOptin = most_shared - device.reservedSharedMemPerBlock;
    cudaOccFuncAttributes function;
    function.maxThreadsPerBlock = 1024;
    function.numRegs = registers;
    function.sharedSizeBytes = shared;
    cudaOccDeviceState state;
    state.carveoutConfig = SHAREDMEM_CARVEOUT_MAX_SHARED;
    cudaOccResult result;
    if (cudaOccMaxActiveBlocksPerMultiprocessor(&result, &device, &function, &state, threads, 0)) return 1;
    printf("%d\\n", result.activeBlocksPerMultiprocessor);
  }
}
"""


@needs_nvcc
def test_occupancy_is_nvidias(tmp_path):
    calculator = tmp_path / "calculator"
    (tmp_path / "calculator.cc").write_text(CALCULATOR)
    subprocess.run(["nvcc", "-o", calculator, tmp_path / "calculator.cc"], check=True)
    cases = list(
        product(GPU_TARGETS, (64, 96, 256), (32, 40, 65, 67, 98, 128), (0, 4096, 9217, 24 * 1024, 33000))
    )
    lines = [
        f"{target.capability} {threads} {registers} {shared} {target.multiprocessor_threads} "
        f"{target.multiprocessor_blocks} {target.multiprocessor_shared_memory}"
        for target, threads, registers, shared in cases
    ]
    finished = subprocess.run(calculator, input="\n".join(lines), capture_output=True, text=True, check=True)
    for (target, threads, registers, shared), blocks in zip(cases, finished.stdout.split(), strict=True):
        share = gpu_bounds.occupancy(target, threads, Resources(registers, shared, 0, 0))
        assert share == pytest.approx(int(blocks) * threads / target.multiprocessor_threads)


@pytest.mark.parametrize(
    ("target", "threads", "launch", "expected"),
    [
        # Registers, shared memory, threads and blocks are what limits.
        ("cuda-sm_75", 256, Resources(64, 0, 0, 0), 1.0),
        ("cuda-sm_86", 256, Resources(65, 0, 0, 0), 3 * 256 / 1536),
        ("cuda-sm_86", 64, Resources(98, 0, 0, 0), 8 * 64 / 1536),  # 4 warps of 104 x 32 in 16384
        ("cuda-sm_86", 256, Resources(32, 24 * 1024, 0, 0), 4 * 256 / 1536),
        ("cuda-sm_86", 64, Resources(32, 0, 0, 0), 16 * 64 / 1536),
    ],
)
def test_occupancy_is_that_of_the_scarcest_resource(target, threads, launch, expected):
    assert gpu_bounds.occupancy(gpu_target(target), threads, launch) == pytest.approx(expected)


def test_instructions_are_counted_by_kind():
    ptx = """
.visible .entry first(
	.param .u64 first_param_0
)
{
	.reg .b32 %r<9>;
	ld.param.b64 	%rd1, [first_param_0];
	ld.shared.v4.f32 	{%f1, %f2, %f3, %f4}, [%r1];
	@%p1 bra 	$L__BB0_2;
	fma.rn.f32 	%f5, %f1, %f2, %f3;
	add.f32 	%f6, %f5, %f1;
	popc.b32 	%r2, %r3;
	lop3.b32 	%r4, %r3, %r2, %r1, 0x6c;
	mad.lo.s32 	%r5, %r3, 36, %r2;
	ret;
}
"""
    assert gpu_bounds.instruction_mix(ptx) == {
        "first": {
            "global memory": 1,
            "shared memory": 1,
            "barrier or branch": 2,
            "float multiply": 1,
            "float": 1,
            "popcount": 1,
            "integer and logic": 1,
            "integer multiply": 1,
        }
    }


def test_machine_instructions_are_counted_by_kind():
    sass = """
.debug_frame:
        /*0000*/ 	.byte	0xff, 0xff
.text.first:
.L_x_1:
        /*0000*/                   IMAD.MOV.U32 R1, RZ, RZ, c[0x0][0x28] ;
        /*0010*/                   IMAD R3, R3, 0x24, R2 ;
        /*0020*/              @!P0 BRA `(.L_x_1) ;
        /*0030*/                   LDS.128 R4, [R8] ;
        /*0040*/              @P1  LDG.E.128 R4, desc[UR4][R8.64] ;
        /*0050*/                   FFMA R4, R5, R6, R4 ;
        /*0060*/                   FADD R4, R5, R6 ;
        /*0070*/                   POPC R4, R5 ;
        /*0080*/                   BMMA.168256.XOR.POPC R4, R8.ROW, R10.COL, R4 ;
.text.second:
        /*0000*/                   IDP.4A.S8.S8 R1, R2, R3, R1 ;
        /*0010*/                   EXIT ;
"""
    assert gpu_bounds.machine_mix(sass) == {
        "first": {
            "integer and logic": 1,
            "integer multiply": 1,
            "barrier or branch": 1,
            "shared memory": 1,
            "global memory": 1,
            "float multiply": 1,
            "float": 1,
            "popcount": 1,
            "tensor": 1,
        },
        "second": {"dot product": 1, "barrier or branch": 1},
    }


@needs_nvcc
def test_every_row_has_its_resources_and_no_spills():
    rows = list(gpu_bounds.static_rows(gpu_bounds.others()[1:2]))
    assert [row["gpu"] for row in rows] == ["T4", "RTX 3090", "A100", "H100"]
    for row in rows:
        assert 0 < row["bound_seconds"] < 1e-5
        (launch,) = row["launches"].values()
        assert launch["spills"] == 0
        assert launch["threads"] == 256
        assert 0 < launch["occupancy"] <= 1
        assert launch["instructions"]["popcount"] == 16  # 64 x 64 products of 256 threads
        assert launch["machine_instructions"]["popcount"] == 16


def test_a_file_that_cannot_be_written_is_refused_before_the_minutes(monkeypatch, capsys):
    monkeypatch.setattr(gpu_bounds, "static_report", lambda: pytest.fail("it compiled kernels first"))
    assert main(["gpu-report", "--json", "none/report.json"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "none/report.json cannot be written: there is no such folder" in error


def test_without_tvm_one_line_says_so(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "tvm", None)
    for module in ("shiftaddvit_jax.costs.gpu_bounds", "kernels_tvm.gpu.build"):
        monkeypatch.delitem(sys.modules, module, raising=False)
    assert main(["gpu-report"]) == 2
    (error,) = capsys.readouterr().err.splitlines()
    assert "pip install 'shiftaddvit-jax[tvm]'" in error
