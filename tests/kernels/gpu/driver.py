"""What NVIDIA's wheel and driver give TVM, where there is no driver."""

import importlib.util

import pytest

needs_cudart = pytest.mark.skipif(
    importlib.util.find_spec("nvidia.cu13") is None,
    reason="the CUDA runtime is not installed (pip install 'shiftaddvit-jax[test]')",
)

# What TVM's CUDA library takes from NVIDIA's driver; each refuses, as where there is no GPU.
DRIVER = """
int cuDeviceGetName(void) { return 100; }
int cuFuncSetAttribute(void) { return 100; }
int cuGetErrorName(void) { return 100; }
int cuGetErrorString(void) { return 100; }
int cuLaunchKernelEx(void) { return 100; }
int cuModuleGetFunction(void) { return 100; }
int cuModuleLoadData(void) { return 100; }
int cuModuleUnload(void) { return 100; }
int cuTensorMapEncodeTiled(void) { return 100; }
"""
