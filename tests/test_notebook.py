"""The notebooks of colab/: kept as they should be, and run from top to bottom from the working tree."""

import os
import re
import tomllib
from pathlib import Path

import jax
import nbformat
import pytest
from nbclient import NotebookClient

from kernels_tvm.cpu.targets import host_target

ROOT = Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "colab").glob("*.ipynb"))
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
COLAB = "https://colab.research.google.com"
EVERY_NOTEBOOK = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def badge(path):
    """The address that opens a notebook of the repository on Colab."""
    return f"{COLAB}/github/{REPOSITORY.removeprefix('https://github.com/')}/blob/main/colab/{path.name}"


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def outputs(notebook):
    return [output for cell in code(notebook) for output in cell.outputs]


def pictures(notebook):
    return [output for output in outputs(notebook) if "image/png" in output.get("data", {})]


def printed(notebook):
    return "".join(output.text for output in outputs(notebook) if output.output_type == "stream")


def extras(cell):
    """The package's extras that a notebook installs."""
    return set(re.search(r"shiftaddvit-jax\[([\w,]+)\]", cell.source)[1].split(","))


@EVERY_NOTEBOOK
def test_a_notebook_is_kept_small_and_without_outputs(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    assert (notebook.nbformat, notebook.nbformat_minor) == (4, 5)  # cells have ids from then on
    assert not outputs(notebook)
    assert all(cell.execution_count is None for cell in code(notebook))
    assert path.stat().st_size < 60_000


@EVERY_NOTEBOOK
def test_a_notebook_begins_with_its_title_then_installs_then_has_parameters(path):
    notebook = nbformat.read(path, as_version=4)
    title, (install, parameters, *others) = notebook.cells[0], code(notebook)
    assert title.source.startswith("# ")
    assert f"]({badge(path)})" in title.source
    assert f'REPOSITORY = "git+{REPOSITORY}"\n' in install.source
    assert "except ImportError:" in install.source
    assert extras(install) <= set(PROJECT["optional-dependencies"])
    tagged = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    assert tagged == [parameters]
    assert others


@EVERY_NOTEBOOK
def test_make_docs_installs_what_a_notebook_needs(path):
    needed = extras(code(nbformat.read(path, as_version=4))[0])
    installed = set(re.search(r"\[([\w,]+)\]", PROJECT["optional-dependencies"]["docs"][0])[1].split(","))
    # They need a GPU and a C compiler, and their notebooks say so where there is none.
    assert needed <= installed | {"gpu", "qmc"}


@EVERY_NOTEBOOK
def test_the_page_of_notebooks_has_a_row_with_a_badge(path):
    page = (ROOT / "docs" / "notebooks.md").read_text()
    (row,) = [line for line in page.splitlines() if f"](../colab/{path.name})" in line]
    assert f"[![Open in Colab][badge]][{path.stem}]" in row
    assert f"[{path.stem}]: {badge(path)}\n" in page


def test_every_address_of_the_repository_is_the_one_in_pyproject():
    known = {badge(path) for path in NOTEBOOKS} | {f"{COLAB}/assets/colab-badge.svg"}
    for page in PAGES:
        assert set(re.findall(rf"{COLAB}[\w./-]+", page.read_text())) <= known
    assert all(address.startswith(REPOSITORY) for address in PROJECT["urls"].values())


def check_quickstart(notebook):
    assert len(pictures(notebook)) == 6
    text = printed(notebook)
    assert re.search(r"^fashion_mnist_nano_moe\n\nTrouser +[5-9]\d\.\d%$", text, re.MULTILINE)
    assert f"{1797 - 1797 // 3} to train on, {1797 // 3} held out" in text
    assert "makes params/stage1/block1/attn/dconv" in text
    rows = dict(
        re.findall(r"^(dense|add_attention|shift|moe) +[\d.]+% +([\d,]+ +\d+) kB", text, re.MULTILINE)
    )
    weights, kilobytes = (int(number.replace(",", "")) for number in rows["dense"].split())
    assert kilobytes == round(4 * weights / 1000)  # 32 bits a weight
    assert int(rows["shift"].split()[1]) < kilobytes / 2
    assert {"add_attention", "moe"} <= rows.keys()


def check_primitives(notebook):
    text = printed(notebook)
    for bits, values in re.findall(r"^(\d) bits: (\d+) values", text, re.MULTILINE):
        assert int(values) == 2 ** int(bits) - 1
    assert "64 of 64 weights decoded by hand" in text
    assert "3.75 x 2^3 = 30.0" in text
    shares = re.findall(r"ratio (\d+): ([\d.]+) of the tokens on the shift expert, aimed at ([\d.]+)", text)
    assert len(shares) == 3
    for ratio, share, aim in shares:
        assert float(aim) == pytest.approx(int(ratio) / (1 + int(ratio)), abs=1e-3)
        assert float(share) == pytest.approx(float(aim), abs=0.1)
    if host_target() is None:
        assert "no kernel can be compiled here: no kernels for this CPU" in text
        return
    assert len(pictures(notebook)) == 5
    multiplied = re.findall(r"^([\w ]+), for \w+: {'multiplications': (\d+)", text, re.MULTILINE)
    assert [name for name, count in multiplied if count == "0"] == ["shift layer", "addition of values"]


def check_pretrained(notebook):
    text = printed(notebook)
    assert "'none' cannot be had here" in text
    assert "same outputs, bit for bit: True" in text
    dense, packed = (float(size) for size in re.findall(r"^\w+: ([\d.]+) MB of weights", text, re.MULTILINE))
    assert packed < dense / 2
    rounded, calibrated = (
        float(re.search(rf"^{name} .* ([\d.]+) dB", text, re.MULTILINE)[1])
        for name in ("rounded", "calibrated")
    )
    assert calibrated > rounded
    assert len(pictures(notebook)) == 5


def check_train_your_own(notebook):
    text = printed(notebook)
    step, steps = map(int, re.search(r"ended by signal 9 after step (\d+) of (\d+)", text).groups())
    assert steps / 2 < step < steps
    assert "the same numbers in both models, bit for bit: True" in text
    aim, balanced = (
        float(re.search(rf"^{name}\b.* ([\d.]+)% of the tokens", text, re.MULTILINE)[1])
        for name in ("aim", "balanced")
    )
    assert balanced == pytest.approx(aim, abs=10)
    assert len(re.findall(r"of 192 images right", text)) == 4
    assert len(pictures(notebook)) == 5


def check_robustness_and_search(notebook):
    text = printed(notebook)
    taken = int(re.search(r"^(\d+) disturbances of 12 images", text, re.MULTILINE)[1])
    assert taken == 256 if "needs qmcpy" in text else taken >= 256
    shifts, dense, difference = (
        float(re.search(rf"^{name} .* (-?[\d.]+)% ± [\d.]+%$", text, re.MULTILINE)[1])
        for name in ("shifts", "dense", "difference")
    )
    assert difference == pytest.approx(shifts - dense, abs=0.11)
    assert re.findall(r"^(\w+) +[\d.]+% of 599 digits right", text, re.MULTILINE) == [
        "shifts",
        "dense",
        "searched",
    ]
    assert len(pictures(notebook)) == 5


def check_novel_views(notebook):
    found = {
        name: tuple(map(float, numbers))
        for name, *numbers in re.findall(
            r"^(\w+) +([\d.]+) dB +[\d.]+ +[\d.]+ +([\d.]+) M +([\d.]+) M$", printed(notebook), re.MULTILINE
        )
    }
    (dense, *costs), (_, *rounded), (converted, *same) = map(found.get, ("dense", "rounded", "converted"))
    assert converted == pytest.approx(dense, abs=1)
    assert rounded == same
    assert costs[1] == 0 < same[1]
    assert same[0] < costs[0] / 10
    assert len(pictures(notebook)) == 4
    assert sum("image/gif" in output.get("data", {}) for output in outputs(notebook)) == 1


def check_gpu_benchmark(notebook):
    errors = [line for line in printed(notebook).splitlines() if "error" in line]
    assert len(errors) == 3  # kernels, and a model for two batches
    assert all("JAX finds no NVIDIA GPU here" in line for line in errors)


# Of each notebook, parameters for which it takes little time, and what is checked of its outputs.
RUNS = {
    "quickstart": ("STEPS_SCALE, SEED, WORKDIR = 0.003, 0, 'run'", check_quickstart),
    "primitives": ("SEED, LATENCY_RATIOS, STEPS = 0, (1, 2, 4), 150", check_primitives),
    "pretrained": (
        "WEIGHTS, PHOTOGRAPHS, IMAGES, TESTED, STEPS, SEED, WORKDIR = 'none', '', 16, 16, 2, 0, 'run'",
        check_pretrained,
    ),
    "train_your_own": (
        "IMAGES, STEPS, FINETUNE_STEPS, SEED, WORKDIR = '', 16, 2, 0, 'run'",
        check_train_your_own,
    ),
    "robustness_and_search": (
        "STEPS, IMAGES, TOLERANCE, FITTED, SEED, WORKDIR = 8, 12, 5.0, 8, 0, 'run'",
        check_robustness_and_search,
    ),
    "novel_views": (
        "SCENE, SIDE, STEPS, RAYS, FRAMES, SEED, WORKDIR = 'analytic', 24, 4, 32, 2, 0, 'run'",
        check_novel_views,
    ),
    "gpu_benchmark": ("MODEL, BATCHES, ROUNDS = 'pvt_v2_b0', (1, 32), 1", check_gpu_benchmark),
}


@pytest.mark.slow
@EVERY_NOTEBOOK
def test_a_notebook_runs_from_top_to_bottom(path, tmp_path, monkeypatch):
    if path.stem == "gpu_benchmark" and jax.default_backend() == "gpu":
        pytest.skip("it takes minutes on a GPU")
    source, check = RUNS[path.stem]
    notebook = nbformat.read(path, as_version=4)
    code(notebook)[1].source = source
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources=resources).execute()
    check(notebook)
