"""What imports cost: counted in modules, which do not vary as seconds do."""

import json
import os
import subprocess
import sys
from pathlib import Path

import grimp
import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax import optional
from shiftaddvit_jax.cli import COMMANDS

LATE = ("orbax", "huggingface_hub", "optax", "matplotlib", "grain", "sklearn", "transformers", "torch", "tvm")
HEAVY = ("jax", "jaxlib", "flax", "numpy", "jaxtyping", "rich", "PIL", "absl", "ml_collections", *LATE)


def python(*arguments):
    """A finished run of Python in which the package is found."""
    environment = os.environ | {"PYTHONPATH": str(Path(sav.__file__).parents[1])}
    return subprocess.run([sys.executable, *arguments], env=environment, capture_output=True, text=True)


def modules_after(program):
    """The modules that a program has loaded at its end."""
    run = python("-c", f"{program}\nimport json, sys\nprint(json.dumps(list(sys.modules)))")
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_the_whole_public_face_loads_little_more_than_flax():
    asked = "import shiftaddvit_jax as sav\nfor name in sav.__all__: getattr(sav, name)"
    found, flax = modules_after(asked), modules_after("import flax.linen")
    assert not set(LATE) & set(found)
    assert len(found) < 1.5 * len(flax)


def test_the_package_alone_loads_nothing():
    assert not set(HEAVY) & set(modules_after("import shiftaddvit_jax"))


def test_names_are_functions_in_whatever_order_modules_load():
    modules_after(
        "import shiftaddvit_jax.pack, shiftaddvit_jax.reparameterize\nimport shiftaddvit_jax as sav\n"
        "from shiftaddvit_jax import *\nfrom shiftaddvit_jax import create_model\n"
        "assert sav.pack is pack and pack.__name__ == 'pack'\n"
        "assert sav.reparameterize is reparameterize and reparameterize.__name__ == 'reparameterize'"
    )


def test_packages_are_attributes_and_all_names_complete():
    assert {"create_model", "nn", "ops"} <= set(dir(sav))
    modules_after("import shiftaddvit_jax as sav\nassert sav.nn.LINEAR_KINDS and sav.ops.matadd")
    assert not hasattr(sav, "create_models")


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["--version"], 0),
        ([], 2),
        (["frobnicate"], 2),
        (["demo", "--seed", "one"], 2),
        (["report", "x", "--shift-share", "half"], 2),
        *(([add.__name__.removeprefix("add_").replace("_", "-"), "--help"], 0) for add in COMMANDS),
    ],
    ids=str,
)
def test_help_and_refused_arguments_load_nothing_heavy(arguments, code):
    run = python("-X", "importtime", "-m", "shiftaddvit_jax", *arguments)
    assert run.returncode == code
    loaded = {line.rpartition("|")[2].strip() for line in run.stderr.splitlines() if "import time:" in line}
    assert "argparse" in loaded
    assert not set(HEAVY) & {name.partition(".")[0] for name in loaded}


@pytest.mark.parametrize(
    ("missing", "arguments", "message"),
    [
        ("grain", ["demo"], "the demo needs grain: pip install 'shiftaddvit-jax[train,plot]'"),
        (
            "matplotlib",
            ["report", "x", "--html", "a.html"],
            "drawing needs matplotlib: pip install 'shiftaddvit-jax[plot]'",
        ),
        (
            "qmcpy",
            ["robustness", "x", "--data", "digits"],
            "a mean over perturbations needs qmcpy: pip install 'shiftaddvit-jax[qmc]'",
        ),
        ("tvm", ["gpu-report"], "needs tvm: pip install 'shiftaddvit-jax[tvm]'"),
        (
            "ml_collections",
            ["train", "--config", "configs/digits.py", "--workdir", "run"],
            "reading a config needs ml_collections: pip install 'shiftaddvit-jax[train]'",
        ),
    ],
)
def test_what_needs_an_extra_says_so_in_one_line(missing, arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    program = "import sys; sys.modules[sys.argv[1]] = None\nfrom shiftaddvit_jax.cli import main"
    run = python("-c", f"{program}\nsys.exit(main(sys.argv[2:]))", missing, *arguments)
    (line,) = run.stderr.splitlines()
    assert run.returncode == 2
    assert message in line
    assert not list(tmp_path.iterdir())


def test_the_digits_say_what_they_need(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(optional.MissingExtra, match=r"'digits' needs sklearn: pip install .*\[train\]"):
        sav.data.load_dataset("digits")
    with pytest.raises(ImportError):
        sav.data.load_dataset("digits")


def test_no_module_imports_a_package_that_it_is_in():
    """pyproject.toml's contract of acyclic siblings looks past this; both together leave no circles."""
    graph = grimp.build_graph("shiftaddvit_jax", "kernels_tvm", cache_dir=None)
    upwards = {
        (module, imported)
        for module in graph.modules
        for imported in graph.find_modules_directly_imported_by(module)
        if module.startswith(f"{imported}.") and not module.endswith(".__main__")
    }
    # These say the version, and nothing that the package imports imports them.
    saying = ("cli", "serve.app", "train.loop")
    assert upwards <= {(f"shiftaddvit_jax.{name}", "shiftaddvit_jax") for name in saying}
