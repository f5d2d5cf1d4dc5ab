import json
import re

import numpy as np
import pytest
from browser import open_page
from PIL import Image

import shiftaddvit_jax as sav
from shiftaddvit_jax.cli import main
from shiftaddvit_jax.command import program
from shiftaddvit_jax.demo import print_report, run_demo, stage_config
from shiftaddvit_jax.pictures import gallery, page
from shiftaddvit_jax.pictures.gallery import PICTURES, measured_latencies
from shiftaddvit_jax.subject import load_subject


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("demo")
    return workdir, run_demo(workdir, steps_scale=0.02)


@pytest.mark.slow
def test_the_report_on_disk_is_the_one_returned(demo):
    workdir, report = demo
    assert json.loads((workdir / "report.json").read_text()) == report
    assert [stage["name"] for stage in report["stages"]] == ["dense", "add_attention", "shift", "moe"]
    assert report["seconds"] > 0


@pytest.mark.slow
def test_even_a_few_steps_learn_something(demo):
    # Chance is 10 %.
    assert demo[1]["stages"][-1]["top1"] > 0.15


@pytest.mark.slow
def test_each_stage_multiplies_less_than_the_dense_model_and_shift_weights_are_smaller(demo):
    dense, attention, shift, moe = demo[1]["stages"]
    assert dense["shifts"] == dense["adds"] == attention["shifts"] == 0
    assert shift["macs"] < moe["macs"] < dense["macs"]
    assert shift["adds"] == attention["adds"] > 0
    assert shift["packed_bytes"] < 0.6 * dense["packed_bytes"]
    assert 0 < moe["shift_share"] < 1
    assert dense["shift_share"] is attention["shift_share"] is shift["shift_share"] is None


@pytest.mark.slow
def test_the_stages_hold_the_kinds_they_are_named_after(demo):
    workdir, _ = demo
    kinds = {}
    for name in ("dense", "add_attention", "shift", "moe"):
        model, _, _ = sav.load_model(workdir / name / "model")
        kinds[name] = (model.attention[0], model.mlp[0], model.projections[0])
    assert kinds == {
        "dense": ("msa", "dense", "dense"),
        "add_attention": ("hamming_linear", "dense", "dense"),
        "shift": ("hamming_linear", "shift", "shift"),
        "moe": ("hamming_linear", "moe", "moe"),
    }


@pytest.mark.slow
def test_the_pictures_show_something_and_the_samples_are_digits(demo):
    workdir, _ = demo
    for name in ("confusion.png", "training.png"):
        assert np.asarray(Image.open(workdir / name)).std() > 10
    assert len(list((workdir / "samples").glob("*.png"))) == 10


@pytest.mark.slow
def test_the_table_fits_100_columns_and_says_what_comes_next(demo, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    workdir, report = demo
    print_report(report, workdir)
    output = capsys.readouterr().out
    table = [line for line in output.splitlines() if line.startswith(("│", "┃", "┏", "└"))]
    assert len(table) >= 6
    assert max(map(len, table)) <= 100
    assert f"Next: {program()} predict --checkpoint {workdir}/moe/model {workdir}/samples/*.png" in output


def test_seeds_reach_every_stage(tmp_path):
    assert stage_config(tmp_path, "moe", seed=7).seed == 7
    assert stage_config(tmp_path, "moe").init_from == str(tmp_path / "add_attention" / "model")


@pytest.fixture(scope="module")
def latencies(demo):
    """Of the dense model and the mixture: compiling all their modules takes a while."""
    workdir, _ = demo
    return measured_latencies([load_subject(workdir / name) for name in ("dense", "moe")])


@pytest.fixture
def measured_once(latencies, monkeypatch):
    for module in (gallery, page):
        monkeypatch.setattr(
            module,
            "measured_latencies",
            lambda subjects: {each.name: latencies[each.name] for each in subjects},
        )


@pytest.mark.slow
@pytest.mark.usefixtures("measured_once")
@pytest.mark.parametrize("kind", list(PICTURES))
def test_every_picture_of_the_demo_shows_something(demo, kind, tmp_path, capsys):
    workdir, _ = demo
    names = ("moe",) if PICTURES[kind].most == 1 else ("dense", "moe")
    folders = [str(workdir / name) for name in names]
    assert main(["plot", kind, *folders, "--output", str(tmp_path / "picture.png")]) == 0
    pixels = np.asarray(Image.open(tmp_path / "picture.png").convert("RGB"))
    assert pixels.std() > 10
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 50
    assert PICTURES[kind].caption in capsys.readouterr().out
    assert [file.name for file in tmp_path.iterdir()] == ["picture.png"]


@pytest.mark.slow
@pytest.mark.usefixtures("measured_once")
def test_the_page_of_the_demo_is_whole_in_a_browser(demo, tmp_path):
    workdir, _ = demo
    file = tmp_path / "page.html"
    command = ["report", str(workdir / "moe"), "--compare", str(workdir / "dense" / "model")]
    assert main([*command, "--html", str(file)]) == 0
    text = file.read_text()
    assert "Not drawn" not in text
    for heading in ("Summary", "Energy", "Latency", "Accuracy and cost", *page.TRAINED.values(), "Modules"):
        assert f"<h2>{heading}</h2>" in text
    assert not re.search(r"""(src|href)=["'](?!data:)""", text)  # nothing from elsewhere

    script = """<script>addEventListener("load", () => {
      const broken = [...document.images].filter(image => !image.naturalWidth).length;
      const wide = document.documentElement.scrollWidth > innerWidth;
      document.title = `${document.images.length} images, ${broken} broken, wide: ${wide}`; });</script>"""
    watched = tmp_path / "watched.html"
    watched.write_text(text.replace("</head>", f"{script}</head>"))
    opened = open_page(watched, tmp_path, "--window-size=1280,800", "--dump-dom")
    assert "<title>8 images, 0 broken, wide: false</title>" in opened.stdout
    assert "CONSOLE" not in opened.stderr
    open_page(file, tmp_path, "--window-size=1280,4000", f"--screenshot={tmp_path}/page.png")
    rows = np.asarray(Image.open(tmp_path / "page.png").convert("L")).reshape(8, 500, 1280)
    assert rows.std(axis=(1, 2)).min() > 5
