"""TVM kernels for NVIDIA GPUs: the same descriptions as on CPUs, scheduled for thread blocks.

A kernel is one TIR function of one or more launches. It is built for CUDA, and also for OpenCL, whose thread
blocks run on any CPU: this tests its numbers without a GPU.
"""
