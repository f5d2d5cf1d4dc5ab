import os
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[1] / "colab" / "quickstart.ipynb"


@pytest.mark.slow
def test_the_quickstart_runs_from_top_to_bottom(tmp_path, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", os.environ["XLA_FLAGS"])
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = f"STEPS_SCALE = 0.01\nSEED = 0\nWORKDIR = {str(tmp_path / 'run')!r}"
    NotebookClient(notebook, timeout=600, kernel_name="python3").execute()
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    pictures = [
        output
        for cell in code
        for output in cell.outputs
        if output.output_type in ("display_data", "execute_result") and "image/png" in output.data
    ]
    assert len(pictures) == 6
    printed = "".join(
        output.text for cell in code for output in cell.outputs if output.output_type == "stream"
    )
    assert "moe: top-1" in printed
    assert "makes params/stage1/block1/attn/dconv" in printed


def test_the_quickstart_is_small_and_shows_its_pictures():
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert NOTEBOOK.stat().st_size < 1_000_000
    assert all(
        cell.outputs or not cell.source.strip()
        for cell in notebook.cells
        if "run(" in cell.source and cell.cell_type == "code" and not cell.source.startswith("from")
    )
