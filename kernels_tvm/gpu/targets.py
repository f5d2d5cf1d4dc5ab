"""The table of NVIDIA GPUs: every hardware fact that the schedules read."""

from dataclasses import dataclass
from typing import Any

from kernels_tvm.targets import choose_target


@dataclass(frozen=True)
class GpuTarget:
    """A compute capability, or a device for OpenCL.

    The limits of a multiprocessor and of a block are those of NVIDIA's CCCL 3.3, file
    ``cuda/__device/arch_traits.h``, and of the CUDA Programming Guide, table "Technical Specifications per
    Compute Capability"; the shapes of ``mma`` those of the PTX ISA, "Warp-level Matrix Multiply-Accumulate
    Instructions".

    Attributes:
      name: its name in cache entries and messages.
      arch: the argument of ``nvcc -arch``; empty for OpenCL.
      shared_memory: bytes that a block may declare statically.
      multiprocessor_registers: registers of 32 bits.
      multiprocessor_shared_memory: bytes for the blocks that it holds.
      multiprocessor_threads: threads that it holds.
      multiprocessor_blocks: blocks that it holds.
      int8_mma: rows, columns and inner size of the tensor cores' int8 product; None to use `dot4` instead.
      bit_mma: rows, columns and inner size, in bits, of the tensor cores' product by XOR and popcount; None
        if they have none.
    """

    name: str
    arch: str
    shared_memory: int
    multiprocessor_registers: int
    multiprocessor_shared_memory: int
    multiprocessor_threads: int
    multiprocessor_blocks: int
    int8_mma: tuple[int, int, int] | None
    bit_mma: tuple[int, int, int] | None

    @property
    def capability(self) -> int:
        """The compute capability times ten."""
        return int(self.arch.removeprefix("sm_"))

    @property
    def tvm(self) -> dict[str, Any]:
        """TVM's description of the target."""
        if not self.arch:
            return {"kind": "opencl", "max_threads_per_block": 256, "max_num_threads": 256}
        return {"kind": "cuda", "arch": self.arch, "max_threads_per_block": 1024, "thread_warp_size": 32}


def _cuda(arch, shared, threads, blocks, int8_mma=(16, 8, 32), bit_mma=(16, 8, 256)):
    return GpuTarget(
        f"cuda-{arch}", arch, 48 * 1024, 64 * 1024, shared * 1024, threads, blocks, int8_mma, bit_mma
    )


GPU_TARGETS = (
    _cuda("sm_75", 64, 1024, 16, int8_mma=(8, 8, 16), bit_mma=(8, 8, 128)),  # T4
    _cuda("sm_80", 164, 2048, 32),  # A100
    _cuda("sm_86", 100, 1536, 16),  # RTX 3090, A5000
    _cuda("sm_89", 100, 1536, 24),  # RTX 4090, L4
    _cuda("sm_90", 228, 2048, 32),  # H100; its product by XOR is two by AND, as nvdisasm shows
    _cuda("sm_100", 228, 2048, 32, bit_mma=None),  # B200; ptxas takes it but expands it
)

# For tests: a CPU runs the same schedules.
OPENCL = GpuTarget("opencl", "", 32 * 1024, 64 * 1024, 64 * 1024, 1024, 16, (16, 8, 32), (16, 8, 256))


def supporting_target(compute_capability: str) -> GpuTarget | None:
    """The best target for a GPU's compute capability, such as ``"8.6"``; None if there is none.

    Machine code runs on later GPUs of the same major version.
    """
    major, minor = (int(part) for part in compute_capability.split("."))
    running = [target for target in GPU_TARGETS if 10 * major <= target.capability <= 10 * major + minor]
    return max(running, key=lambda target: target.capability, default=None)


def gpu_target(name: str) -> GpuTarget:
    """The target of that name.

    Raises:
      ValueError: unknown name.
    """
    return choose_target(name, GPU_TARGETS)
