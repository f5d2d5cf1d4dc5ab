"""What NVIDIA's data sheets say of GPUs: the facts that bounds of times are made of."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Gpu:
    """A GPU, as NVIDIA describes it.

    Attributes:
      name: the name under which it is sold.
      target: the name of the target that its kernels are compiled for.
      multiprocessors: how many it has.
      clock: its boost clock in GHz.
      bandwidth: its memory's bandwidth in GB/s.
      int8_tensor: 10^12 dense int8 operations a second of its tensor cores, two a multiply-accumulate.
      float_lanes: float32 operations that a multiprocessor starts in a cycle.
    """

    name: str
    target: str
    multiprocessors: int
    clock: float
    bandwidth: float
    int8_tensor: float
    float_lanes: int


# Instructions that a multiprocessor of any of these GPUs starts in a cycle: additions and logic of 32 bits,
# population counts, and instructions of all kinds together, since its four schedulers start a warp each. The
# first two are from the CUDA C++ Best Practices Guide 13, table "Throughput of Native Arithmetic
# Instructions", for compute capabilities 7.5 to 9.0.
INTEGER_LANES, POPCOUNT_LANES, ISSUED_LANES = 64, 16, 128

# Boost clocks are for ordinary instructions: the H100's tensor cores have their peak at 1.83 GHz.
GPUS = (
    # NVIDIA T4 Product Brief, table 2: 256 bits at 5001 MHz, up to 320 GB/s (the datasheet says 300). Turing
    # architecture whitepaper: 130 TOPS in int8, 8.1 TFLOPS in float32.
    Gpu("T4", "cuda-sm_75", 40, 1.59, 320, 130, 64),
    # NVIDIA Ampere GA102 architecture whitepaper V2, appendix A, table "GeForce RTX 3090".
    Gpu("RTX 3090", "cuda-sm_86", 82, 1.695, 936, 284, 128),
    # NVIDIA H100 Tensor Core GPU Architecture V1.04, table 3: A100 (SXM, 40 GB) and H100 (SXM).
    Gpu("A100", "cuda-sm_80", 108, 1.41, 1555, 624, 64),
    Gpu("H100", "cuda-sm_90", 132, 1.98, 3350, 1979, 128),
)
