"""What README.md, CONTRIBUTING.md, docs/ and help say a person can type, open and import is there.

Commands are parsed here by the parsers that run them, and run elsewhere, on small models:

- train, eval, predict, reparameterize, models, report, pack, compile: `test_cli.py`, `test_predict.py`; of
  train, --plan `train/test_shipped_configs.py`, --sweep `train/test_sweep.py`, several processes
  `train/test_devices.py`, distillation and latencies `train/test_step.py`, `bench/test_latency.py`;
- convert `test_calibrate.py`, balance `test_balance.py`, search and --layers `search/test_search_run.py`,
  robustness `test_robustness.py`, compare `test_compare.py` and `train/test_summary.py`,
  --engine ray `test_cluster.py`;
- export and its bundle `checkpoints/test_bundle.py`, serve `serve/test_server.py`, compile --target
  `test_compile_for_gpus.py`;
- demo, plot, report --html `test_demo.py`; report --savings `costs/test_report.py`; nvs train, convert, eval
  and render `test_nvs.py`;
- bench `bench/test_bench.py` and `bench/test_roofline.py`, measure-latency `bench/test_latency.py`;
- notebooks `test_notebook.py`. Calls in Python blocks are held to the signatures of what they call;
  `test_reparameterize.py`, `checkpoints/test_pretrained.py` and `test_pack.py` run them.

No test runs

- what downloads: sources of ``hf:`` and ``timm:``, for which `checkpoints/test_pretrained.py` and
  `test_classifier.py` have folders of the same layout;
- gpu-report, which needs nvcc (its parts: `costs/test_gpu_bounds.py`), --distributed, which needs SLURM,
  Kubernetes or a TPU pod, and --device gpu without a GPU (with one: `bench/test_gpu_bench.py`);
- tune, which compiles kernels for minutes (its parts: `kernels/test_tuning.py`), nvs demo, which trains four
  models in minutes, bench at 224 pixels, and its peers that the extra ``test`` lacks;
- the scripts of docs/, minutes to hours, which are imported here; but for what they compute for
  docs/concepts.md, and check_pages.py;
- make, pip and venv, which set up what runs the tests.
"""

import argparse
import ast
import importlib
import importlib.util
import inspect
import itertools
import re
import shlex
import tomllib
from pathlib import Path

import jax
import numpy as np
import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax import main
from shiftaddvit_jax.cli import build_parser
from shiftaddvit_jax.cli.arguments import PRINTED
from shiftaddvit_jax.files import write_json

ROOT = Path(__file__).parents[1]
PAGES = [
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")),
    *sorted(path for path in (ROOT / "docs").rglob("*.md") if "_build" not in path.parts),
]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
TARGETS = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
FOLDERS = ("shiftaddvit_jax", "kernels_tvm", "tests", "docs", "configs", "colab")
PACKAGES = (
    "bench",
    "checkpoints",
    "costs",
    "data",
    "models",
    "nn",
    "novel_views",
    "ops",
    "pictures",
    "qmc",
    "robustness",
    "search",
    "train",
)
FENCE = re.compile(r"^```(\S*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page):
    return str(page.relative_to(ROOT))


def blocks(page, language):
    """The fenced blocks of a language."""
    return [body for found, body in FENCE.findall(page.read_text()) if found == language]


def spans(page):
    """What stands in single backticks, each once."""
    return sorted(set(re.findall(r"(?<!`)`([^`\n]+)`(?!`)", FENCE.sub("", page.read_text()))))


def every(find):
    """Each thing found on a page, once, with the first page it is on."""
    found = {}
    for page in PAGES:
        for thing in find(page):
            found.setdefault(thing, page)
    return [pytest.param(thing, page, id=f"{name_of(page)}: {thing}") for thing, page in found.items()]


def commands(page):
    """The lines of fenced shell blocks, continued ones joined, without comments."""
    for block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield shlex.join(words)


def links(page):
    """Relative links: Markdown's, and those of Sphinx's roles and directives."""
    text = FENCE.sub(lambda found: found[0] if found[1].startswith("{") else "", page.read_text())
    for pattern in (r"\]\(([^)\s]+)\)", r"\{download\}`[^<`]*<([^>]+)>`", r"^```\{(?:image|include)\} (\S+)"):
        for target in re.findall(pattern, text, re.MULTILINE):
            if not re.match(r"https?://", target):
                yield target


def anchors(page):
    """The anchors of a page's headings, as GitHub and MyST make them."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", page.read_text()), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def subparsers(parser):
    """The parsers of a parser's commands by their names; none if it has none."""
    actions = (action for action in parser._actions if isinstance(action, argparse._SubParsersAction))
    return next((action.choices for action in actions), {})


def subparser(command):
    choices = subparsers(build_parser())
    assert command in choices, f"no such command; there are {', '.join(choices)}"
    return choices[command]


def all_parsers(parser):
    """The parser, and those of all its commands and of theirs."""
    yield parser
    for inner in subparsers(parser).values():
        yield from all_parsers(inner)


PARSERS = {parser.prog: parser for parser in all_parsers(build_parser())}
EXAMPLES = [example for parser in PARSERS.values() for example in parser.examples]
FIGURES = [prog for prog, parser in PARSERS.items() if "--json" in parser._option_string_actions]
# They draw, render or serve; or what they find is in a file of their workdir.
WITHOUT_FIGURES = ("demo", "train", "nvs demo", "nvs train", "nvs render", "plot", "serve")


@pytest.fixture
def clone(tmp_path, monkeypatch):
    """A folder with what commands read while they are parsed."""
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    layers = [{"name": "stage1/block1/mlp/fc1", "latencies": [3.0, 2.0]}]
    write_json(tmp_path / "latencies.json", {"layers": layers})
    monkeypatch.chdir(tmp_path)


def check_shiftaddvit(words):
    """Raise unless ``shiftaddvit`` takes these words."""
    try:
        arguments, rest = build_parser().parse_known_args(words)
    except SystemExit as stop:
        if stop.code:  # otherwise it was --help or --version
            pytest.fail("the parser refuses this; why is on stderr")
        return
    if arguments.command == "train":
        main.load_config(arguments.config, rest)
        return
    assert not rest, f"unrecognized arguments: {rest}"
    given = vars(arguments)
    if given.get("model") in [*sav.list_models(), *sav.list_models("novel_views")]:
        kinds = {name: given[name] for name in ("attention", "mlp", "projections") if given.get(name)}
        sav.create_model(given["model"], **kinds)
    elif "model" in given and given["model"] is not None:
        assert given["model"].startswith("runs/"), "neither a model nor a run"
    if arguments.command == "plot":
        assert arguments.kind in subparser("plot").format_help(), "no such picture"


def check_pip(words):
    """Raise unless what is installed is this repository, its wheel of kernels, or this folder with extras."""
    wheel = "dist/shiftaddvit_jax_kernels-*.whl"  # of make kernels-wheel
    if words[0] == "install" and words[1:] in ([f"git+{PROJECT['project']['urls']['Repository']}"], [wheel]):
        return
    assert words[:2] == ["install", "-e"]
    extras = re.fullmatch(r"\.(?:\[([\w,]+)\])?", words[2])
    assert extras, "not this folder"
    assert set(filter(None, (extras[1] or "").split(","))) <= set(
        PROJECT["project"]["optional-dependencies"]
    ), "no such extra"


def check_pytest(words):
    """Raise unless the files, and the mark of ``-m``, exist."""
    marks = [mark.partition(":")[0] for mark in PROJECT["tool"]["pytest"]["ini_options"]["markers"]]
    for before, word in itertools.pairwise(["", *words]):
        assert before != "-m" or word in marks, "no such mark"
        assert not word.endswith(".py") or (ROOT / word).is_file(), "no such file"


def check_make(words):
    """Raise unless the Makefile has these targets."""
    assert set(words) <= set(TARGETS), "no such target"


def check_python(words):
    """Raise unless Python finds the module, or the file."""
    if words[0] == "-m":
        assert importlib.util.find_spec(words[1])
    else:
        assert (ROOT / words[0]).is_file()


CHECKS = {
    "shiftaddvit": check_shiftaddvit,
    "pip": check_pip,
    "python": check_python,
    "python3": check_python,
    "make": check_make,
    "pytest": check_pytest,
}


def test_the_readme_is_a_door():
    assert len((ROOT / "README.md").read_text().split()) <= 700


@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize(("command", "page"), every(commands))
def test_every_command_is_taken_by_what_it_calls(command, page):
    # What stands before the program sets its environment.
    program, *words = itertools.dropwhile(re.compile("[A-Z_]+=").match, shlex.split(command))
    program = program.removeprefix(".venv/bin/")
    assert program in CHECKS, "say in CHECKS how such a command is checked"
    CHECKS[program](words)


@pytest.mark.parametrize("prog", PARSERS)
def test_help_fits_80_columns_and_ends_with_examples_of_the_command(prog, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    parser = PARSERS[prog]
    text = parser.format_help()
    assert max(map(len, text.splitlines())) <= 80
    assert parser.examples
    assert text.replace(" \\\n     ", "").endswith(
        "".join(f"\n  {example}" for example in parser.examples) + "\n"
    )
    assert all(example.startswith(f"{prog} ") or example == prog for example in parser.examples)


@pytest.mark.usefixtures("clone")
@pytest.mark.parametrize("example", EXAMPLES)
def test_every_example_of_help_is_taken(example):
    check_shiftaddvit(shlex.split(example)[1:])


def test_every_command_that_finds_figures_gives_them_as_json():
    leaves = {prog for prog, parser in PARSERS.items() if not subparsers(parser)}
    assert leaves == {*FIGURES, *(f"shiftaddvit {name}" for name in WITHOUT_FIGURES)}


@pytest.mark.parametrize("prog", FIGURES)
def test_json_is_printed_or_goes_to_a_file(prog, capsys):
    words = shlex.split(PARSERS[prog].examples[0])[1:]

    def parsed(*rest):
        return build_parser().parse_args([*words, "--json", *rest]).json

    assert parsed() == PRINTED
    assert parsed("figures.json") == "figures.json"
    with pytest.raises(SystemExit):
        parsed("cat.jpg")
    assert "put --json last" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("span", "page"),
    every(
        lambda page: [span for span in spans(page) if re.match(r"(shiftaddvit|make|pytest|python) \S", span)]
    ),
)
def test_commands_within_sentences_name_what_there_is(span, page):
    """Of ``shiftaddvit``, a sentence may leave arguments out: the command and its options must exist."""
    program, *words = span.split()
    if program != "shiftaddvit":
        CHECKS[program](words)
        return
    command = build_parser() if words[0].startswith("--") else subparser(words[0])
    options = command._option_string_actions
    if words[0] == "train":
        words = [word for word in words if not word.startswith("--config.")]  # keys of its config
    assert not [word for word in words if word.startswith("--") and word not in options]


@pytest.mark.parametrize(("target", "page"), every(links))
def test_every_relative_link_leads_somewhere(target, page):
    path, _, anchor = target.partition("#")
    there = (page.parent / path).resolve() if path else page
    assert there.is_file()
    assert not anchor or anchor in anchors(there)


@pytest.mark.parametrize(
    ("span", "page"),
    every(
        lambda page: [span for span in spans(page) if re.fullmatch(rf"({'|'.join(FOLDERS)})/[\w./]*", span)]
    ),
)
def test_every_file_that_is_named_exists(span, page):
    assert (ROOT / span).exists() or "_build" in span


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_calls_in_python_are_taken_by_what_they_call(page):
    for block in blocks(page, "python"):
        compile(block, name_of(page), "exec")
        for call in ast.walk(ast.parse(block)):
            if isinstance(call, ast.Call) and ast.unparse(call.func).startswith("sav."):
                function = getattr(sav, call.func.attr)
                values = {keyword.arg: keyword.value for keyword in call.keywords}
                inspect.signature(function).bind(*call.args, **values)
                settings = {name: ast.literal_eval(value) for name, value in values.items()}
                sav.create_model("pvt_v2_nano", **settings)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_names_within_sentences_exist(page):
    for span in spans(page):
        for name in re.findall(r"\bsav\.(\w+)", span):
            assert hasattr(sav, name)
        if re.fullmatch(r"plot_\w+", span):
            assert hasattr(importlib.import_module("shiftaddvit_jax.pictures"), span)


def test_every_package_of_the_reference_is_loaded_when_it_is_asked_for():
    assert sav._PACKAGES == PACKAGES


@pytest.mark.parametrize("package", ["", *PACKAGES])
def test_the_reference_has_every_public_name(package):
    """Of a module that a page names, autodoc takes what has a docstring; tables are named one by one."""
    name = f"shiftaddvit_jax.{package}".rstrip(".")
    module, page = importlib.import_module(name), (ROOT / "docs/api" / f"{package or 'index'}.md").read_text()
    assert f".. automodule:: {name}\n" in page
    tables = re.findall(r"\.\. py:data:: (\w+)", page)
    elsewhere = re.findall(r"\w+", "".join(re.findall(r":exclude-members:(.*)", page)))
    assert set(elsewhere) <= set(sav.__all__)
    for public in set(module.__all__) - {*tables, *elsewhere}:
        thing = getattr(module, public)
        assert callable(thing), f"{public} needs a py:data of its own"
        assert thing.__doc__, f"{public} has no docstring"


def test_every_page_is_in_the_table_of_contents():
    for folder in (ROOT / "docs", ROOT / "docs" / "api"):
        listed = " ".join(
            body for kind, body in FENCE.findall((folder / "index.md").read_text()) if kind == "{toctree}"
        )
        for page in folder.glob("*.md"):
            assert page.stem == "index" or page.stem in listed.split()


def test_the_pictures_of_the_readme_are_small_and_say_what_they_show():
    pictures = re.findall(r"!\[([^\]]+)\]\(([^)]+)\)", (ROOT / "README.md").read_text())
    assert len(pictures) == 3
    for text, path in pictures:
        assert len(text) > 40
        assert (ROOT / path).stat().st_size < 150_000


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_picture_says_what_it_shows(page):
    text = page.read_text()
    assert "![](" not in text
    for body in re.findall(r"^```\{(?:image|figure)\}.*?^```$", text, re.MULTILINE | re.DOTALL):
        assert re.search(r"^:alt: \S", body, re.MULTILINE)


@pytest.fixture(scope="module")
def concept_figures():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        return importlib.import_module("concept_figures")


def row_of(name):
    """The cells behind ``name`` in a table of the page on concepts."""
    (row,) = re.findall(rf"^\| {name}.*", (ROOT / "docs/concepts.md").read_text(), re.MULTILINE)
    return [cell.strip() for cell in row.split("|")[2:-1]]


def test_concepts_has_the_operations_that_are_counted(concept_figures):
    for kind, operations in concept_figures.attention_operations().items():
        counts = operations.macs, operations.adds, operations.popcounts
        assert row_of(f"`{kind}`") == [f"{count / 1e6:.1f} M" if count else "" for count in counts]


@pytest.mark.parametrize("grid", ["one power", "two powers", "integers"])
def test_concepts_has_the_errors_that_are_computed(concept_figures, grid):
    errors = concept_figures.rounding_errors()
    levels, decibels = next(each[1:] for each in reversed(errors) if each[0] == grid)
    number, _, found, worth = row_of(grid)
    assert (number, found) == (str(levels), f"{decibels:.1f} dB")
    assert worth == f"{concept_figures.worth_in_bits(errors, grid):.1f} bits".replace(".0", "")


def test_the_attention_that_the_docs_add_is_a_mean():
    names = dict(vars(importlib.import_module("shiftaddvit_jax.nn.attention")))
    exec(blocks(ROOT / "docs/extend.md", "python")[0], names)
    layer, x = names["MeanAttention"](2), np.random.default_rng(0).normal(size=(1, 6, 4)).astype(np.float32)
    y, variables = layer.init_with_output(jax.random.key(0), x, (2, 3))
    qkv, proj = (variables["params"][name]["kernel"] for name in ("qkv", "proj"))
    expected = np.broadcast_to((x @ qkv[:, 8:]).mean(1, keepdims=True) @ proj, x.shape)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)


def test_a_browser_finds_what_is_wrong_with_pages(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    pages = {"good": "<p>short</p>", "wide": "<pre>" + 200 * "wide" + "</pre>", "blank": "<img src=none.png>"}
    for name, body in pages.items():
        (tmp_path / f"{name}.html").write_text(f"<!doctype html>{body}")
    try:
        found = importlib.import_module("check_pages").check_pages(tmp_path)
    except FileNotFoundError as no_browser:
        pytest.skip(str(no_browser))
    assert [line.partition(".")[0] for line in found] == ["blank", "blank", "wide", "wide", "wide"]


@pytest.mark.parametrize("script", sorted({path.stem for path in (ROOT / "docs").glob("*.py")} - {"conf"}))
def test_every_script_finds_what_it_imports(script, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    importlib.import_module(script)


@pytest.mark.parametrize("page", ["README.md", "docs/benchmarks.md"])
def test_tables_of_figures_are_those_that_were_measured(page, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "docs")
    text = (ROOT / page).read_text()
    assert "<!-- table: " in text
    assert importlib.import_module("benchmark_tables").with_tables(text) == text
