import jax
import numpy as np
import pytest

from shiftaddvit_jax.bench import gpu as gpu_bench
from shiftaddvit_jax.cli import main


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
@pytest.mark.parametrize("what", ["--kernels", "pvt_v2_nano"])
def test_without_a_gpu_one_line_says_so(what, capsys):
    assert main(["bench", what, "--device", "gpu"]) == 2
    captured = capsys.readouterr()
    assert "JAX finds no NVIDIA GPU here" in captured.err
    assert captured.err.count("\n") == 1


def test_contestants_compute_the_same_and_take_turns():
    # On the kernels of CPUs here, which the same calls take.
    contestants = gpu_bench._context_contestants(batch=2, tokens=9, head_dim=8, codes=4, heads=3)
    np.testing.assert_allclose(contestants["tvm"](), contestants[gpu_bench.DENSE](), rtol=1e-5, atol=1e-5)
    for numbers, tolerance in (("TF32", 2e-3), ("bfloat16", 2e-2)):
        y = np.asarray(contestants[f"dense {numbers}"](), np.float32)
        np.testing.assert_allclose(y, contestants[gpu_bench.DENSE](), rtol=tolerance, atol=tolerance)
    rows = gpu_bench._time(contestants, gpu_bench.DENSE, rounds=2)
    assert [row["name"] for row in rows] == list(contestants)
    assert all(row["runs"] == 2 for row in rows)
    assert all(row["median_ms"] > 0 for row in rows)
    assert rows[0]["ratio"] == 1


@pytest.mark.gpu
@pytest.mark.skipif(jax.default_backend() != "gpu", reason="JAX finds no NVIDIA GPU here")
@pytest.mark.parametrize("what", ["--kernels", "pvt_v2_nano"])
def test_the_benchmark_runs_on_a_gpu(what, capsys):
    assert main(["bench", what, "--device", "gpu", "--rounds", "1"]) == 0
    assert "compute capability" in capsys.readouterr().out
