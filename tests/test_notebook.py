import os
from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "colab" / "quickstart.ipynb"
GPU_NOTEBOOK = NOTEBOOK.with_name("gpu_benchmark.ipynb")


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def pictures(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def printed(notebook):
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


@pytest.mark.slow
def test_the_quickstart_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f"STEPS_SCALE = 0.003\nSEED = 0\nWORKDIR = {str(tmp_path / 'run')!r}"
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    assert len(pictures(notebook)) == 6
    assert "moe: top-1" in printed(notebook)
    assert "makes params/stage1/block1/attn/dconv" in printed(notebook)


def test_the_quickstart_is_kept_with_its_pictures_and_without_its_path():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert len(pictures(notebook)) == 6
    assert NOTEBOOK.stat().st_size < 1_000_000
    assert str(Path.home()) not in printed(notebook)
    assert all(output.output_type != "error" for output in outputs(notebook))


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU here")
def test_the_gpu_benchmark_says_in_one_line_that_there_is_no_gpu():
    notebook = nbformat.read(GPU_NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    NotebookClient(notebook, timeout=120, kernel_name="python3").execute()
    errors = [line for line in printed(notebook).splitlines() if "error" in line]
    assert len(errors) == 3  # kernels, and a model for two batches
    assert all("JAX finds no NVIDIA GPU here" in line for line in errors)


def test_the_gpu_benchmark_is_kept_without_figures():
    notebook = nbformat.read(GPU_NOTEBOOK, as_version=4)
    assert not outputs(notebook)  # none has been taken yet
