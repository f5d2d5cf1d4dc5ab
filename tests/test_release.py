"""What is released: one version, and a wheel with all that runs and nothing else."""

import re
import shutil
import zipfile
from pathlib import Path

import pytest
from hatchling.builders.wheel import WheelBuilder

import shiftaddvit_jax as sav

ROOT = Path(__file__).parents[1]
ABOUT = f"shiftaddvit_jax-{sav.__version__}.dist-info"


def files_in(folder):
    """The files of a folder that Python did not write, by their paths in the repository."""
    files = (path for path in (ROOT / folder).rglob("*") if path.is_file())
    return {path.relative_to(ROOT).as_posix() for path in files if "__pycache__" not in path.parts}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The names of the files in the wheel, built here without a network."""
    folder = str(tmp_path_factory.mktemp("wheel"))
    (file,) = WheelBuilder(str(ROOT)).build(directory=folder, versions=["standard"])
    assert Path(file).name == f"shiftaddvit_jax-{sav.__version__}-py3-none-any.whl"
    return set(zipfile.ZipFile(file).namelist())


def test_the_version_stands_in_one_place_and_what_repeats_it_agrees():
    citation = re.search(r"^version: (.+)\ndate-released: (.+)$", (ROOT / "CITATION.cff").read_text(), re.M)
    heading = re.search(r"^## (.+) \((.+)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M)
    assert citation
    assert heading
    assert citation.groups() == heading.groups()
    assert citation[1] == sav.__version__
    assert not re.search(r"^version\b", (ROOT / "pyproject.toml").read_text(), re.M)


def test_the_wheel_holds_both_packages_and_the_configs_and_nothing_else(wheel):
    configs = {f"shiftaddvit_jax/{name}" for name in files_in("configs")}
    packages = files_in("shiftaddvit_jax") | files_in("kernels_tvm")
    about = {f"{ABOUT}/{name}" for name in ("METADATA", "RECORD", "WHEEL", "entry_points.txt")}
    assert wheel == packages | configs | about | {f"{ABOUT}/licenses/LICENSE"}


def test_the_wheel_of_compiled_kernels_holds_them_and_asks_for_the_version_that_made_them(tmp_path):
    project = shutil.copytree(
        ROOT / "packaging" / "compiled_kernels",
        tmp_path / "packaging" / "kernels",
        ignore=shutil.ignore_patterns("*shiftaddvit_jax_kernels*"),
    )
    (tmp_path / "shiftaddvit_jax").mkdir()
    shutil.copy(ROOT / "shiftaddvit_jax" / "__init__.py", tmp_path / "shiftaddvit_jax")
    package = project / "shiftaddvit_jax_kernels"
    names = {"__init__.py", "manifest.json", "kernels/avx2/mlp.so", "kernels/runtime/libtvm_runtime.so"}
    for name in names:
        (package / name).parent.mkdir(parents=True, exist_ok=True)
        (package / name).touch()
    (file,) = WheelBuilder(str(project)).build(directory=str(tmp_path), versions=["standard"])
    assert Path(file).name == f"shiftaddvit_jax_kernels-{sav.__version__}-py3-none-manylinux_2_28_x86_64.whl"
    wheel = zipfile.ZipFile(file)
    about = f"shiftaddvit_jax_kernels-{sav.__version__}.dist-info"
    assert set(wheel.namelist()) == {f"shiftaddvit_jax_kernels/{name}" for name in names} | {
        f"{about}/{name}" for name in ("METADATA", "RECORD", "WHEEL")
    }
    needed = re.findall("^Requires-Dist: (.+)$", wheel.read(f"{about}/METADATA").decode(), re.M)
    assert needed == [f"shiftaddvit-jax[export]=={sav.__version__}"]


@pytest.mark.parametrize(
    "name",
    [
        "shiftaddvit_jax/py.typed",
        "kernels_tvm/py.typed",
        "kernels_tvm/cpu/records/avx2.json",
        "shiftaddvit_jax/configs/digits.py",
        "shiftaddvit_jax/costs/unit_energies.toml",
        "shiftaddvit_jax/checkpoints/imagenet_classes.txt",
        "shiftaddvit_jax/serve/page.html",
    ],
)
def test_the_wheel_holds_what_the_packages_open(name, wheel):
    assert name in wheel
