import jax
import pytest

from kernels_tvm.gpu import library
from kernels_tvm.gpu.targets import gpu_target
from shiftaddvit_jax.ops.implementation import custom_call


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Chooses as where JAX runs on an RTX 3090; what is lowered for one can't run here."""
    target = gpu_target("cuda-sm_86")
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(custom_call, "gpu_target", lambda: target)
    monkeypatch.setattr(library, "load", lambda kernel, target: lambda *arrays: None)
    monkeypatch.setattr(library, "has_runtime", lambda: True)
    custom_call.unavailable.cache_clear()
    yield
    custom_call.unavailable.cache_clear()
