"""A run knows its data and its steps: what is damaged is set aside, what is another run is refused."""

import json
import logging
import os
import resource
import shutil
from contextlib import contextmanager

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import shiftaddvit_jax as sav
from shiftaddvit_jax.checkpoints.configs import imagenet_classes
from shiftaddvit_jax.data.examples import Dataset, Examples
from shiftaddvit_jax.data.identity import (
    class_difference,
    data_difference,
    data_summary,
    describe_data,
)
from shiftaddvit_jax.data.images import open_image
from shiftaddvit_jax.train.config import resolved_defaults
from shiftaddvit_jax.train.devices import create_mesh, state_shardings
from shiftaddvit_jax.train.workdir import (
    Best,
    Checkpoints,
    check_not_shorter,
    check_same_run,
    claim,
    read_run,
)

STATE = {"weight": jnp.arange(3000.0), "count": jnp.int32(7)}
DATA = {"class_names": ["ant", "bee"], "train": [[4, "a"], [5, "b"]], "test": [[2, "c"], [1, "d"]]}
BEGAN = {"data": DATA, "model": {"name": "pvt_v2_nano"}, "preprocessing": {}}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A workdir with the steps 10 and 20."""
    workdir = tmp_path_factory.mktemp("saved")
    claim(workdir, resolved_defaults(), BEGAN)
    checkpoints = Checkpoints(workdir)
    for step in (10, 20):
        checkpoints.save(step, {**STATE, "count": jnp.int32(step)})
    checkpoints.close()
    return workdir


@pytest.fixture
def workdir(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "run")


def restore(workdir, state=STATE):
    shapes = jax.eval_shape(lambda: state)
    return Checkpoints(workdir).restore(shapes, state_shardings(create_mesh(), shapes))


def largest(folder):
    return max((file for file in folder.rglob("*") if file.is_file()), key=lambda file: file.stat().st_size)


def flip(file):
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 0x40
    file.write_bytes(data)


def empty(folder):
    for file in folder.rglob("*"):
        if file.is_file():
            file.write_bytes(b"")


def without_digests(damage):
    """As in a checkpoint of an earlier version."""

    def change(folder):
        (folder / "digests.json").unlink()
        damage(folder)

    return change


DAMAGES = {
    "its arrays deleted": lambda folder: shutil.rmtree(folder / "default"),
    "a file cut": lambda folder: os.truncate(largest(folder), largest(folder).stat().st_size // 2),
    "a file deleted": lambda folder: largest(folder).unlink(),
    "all files emptied": empty,
    "a bit flipped": lambda folder: flip(largest(folder)),
    "metadata deleted": lambda folder: (folder / "default" / "_METADATA").unlink(),
    "metadata emptied": lambda folder: os.truncate(folder / "_CHECKPOINT_METADATA", 0),
    "digests flipped": lambda folder: flip(folder / "digests.json"),
    "digests of nothing": lambda folder: (folder / "digests.json").write_text("{}"),
    "no digests, its arrays deleted": without_digests(lambda folder: shutil.rmtree(folder / "default")),
    "no digests, all files emptied": without_digests(empty),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_checkpoint_is_named_and_the_one_before_taken(damage, workdir, caplog):
    damage(workdir / "checkpoints" / "20")
    with caplog.at_level(logging.WARNING):
        step, state = restore(workdir)
    assert step == state["count"] == 10
    np.testing.assert_array_equal(state["weight"], STATE["weight"])
    assert "the checkpoint of step 20 is not whole and set aside: " in caplog.text
    assert (workdir / "damaged" / "20").is_dir()
    again = Checkpoints(workdir)
    again.save(20, STATE)  # the damaged one is not in its way
    again.close()
    assert restore(workdir)[0] == 20


def test_an_empty_folder_of_a_later_step_is_none(workdir, caplog):
    (workdir / "checkpoints" / "30").mkdir()
    assert restore(workdir)[0] == 20
    assert "step 30 is not whole" in caplog.text


def test_a_checkpoint_without_digests_is_taken_if_it_can_be_read(workdir):
    (workdir / "checkpoints" / "20" / "digests.json").unlink()
    assert restore(workdir)[0] == 20


def test_what_else_lies_among_the_checkpoints_stays(workdir):
    (workdir / "checkpoints" / ".DS_Store").write_text("x")
    (workdir / "checkpoints" / "backup").mkdir()
    assert restore(workdir)[0] == 20
    checkpoints = Checkpoints(workdir)
    checkpoints.save(30, STATE)
    checkpoints.close()
    assert (workdir / "checkpoints" / "backup").is_dir()


def test_without_a_whole_checkpoint_the_log_says_that_the_run_starts_anew(workdir, caplog):
    for step in (10, 20):
        empty(workdir / "checkpoints" / str(step))
    assert restore(workdir) == (0, None)
    assert "no checkpoint is whole; the run starts from the beginning" in caplog.text
    shutil.rmtree(workdir / "checkpoints")
    assert restore(workdir) == (0, None)


def test_a_whole_checkpoint_of_another_model_is_refused(workdir):
    with pytest.raises(ValueError, match="is whole, but not of this model") as caught:
        restore(workdir, {**STATE, "more": jnp.zeros(3)})
    assert "\n" not in str(caught.value)
    assert (workdir / "checkpoints" / "20").is_dir()


def test_a_file_in_the_checkpoints_place_is_refused(workdir):
    shutil.rmtree(workdir / "checkpoints")
    (workdir / "checkpoints").write_text("x")
    with pytest.raises(ValueError, match="checkpoints is a file, expected a folder"):
        Checkpoints(workdir)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda file: file.write_text(""), "is empty or no config"),
        (lambda file: file.write_text("[1]"), "is empty or no config"),
        (lambda file: file.write_bytes(b"\xff\xfe"), "is empty or no config"),
        (lambda file: file.unlink(), r"holds a run \(run\.json, checkpoints\) without its config\.json"),
    ],
)
def test_a_workdir_that_does_not_say_what_it_holds_is_refused(change, message, workdir):
    change(workdir / "config.json")
    with pytest.raises(ValueError, match=message):
        read_run(workdir)


def test_a_key_that_the_run_did_not_know_yet_has_its_default(workdir):
    written = json.loads((workdir / "config.json").read_text())
    del written["model"]["threshold"]
    (workdir / "config.json").write_text(json.dumps(written))
    config = resolved_defaults()
    check_same_run(workdir, read_run(workdir), config, DATA)
    config.model.threshold = "zero"
    with pytest.raises(ValueError, match=r"another model\.threshold; .*was 'sample', is 'zero'"):
        check_same_run(workdir, read_run(workdir), config, DATA)


def test_steps_and_logging_may_change_and_nothing_else(workdir):
    config = resolved_defaults()
    config.train.update({"steps": 7, "log_every": 1, "evaluate_every": 2, "checkpoint_every": 3})
    check_same_run(workdir, read_run(workdir), config, DATA)
    config.data.batch_size = 3
    with pytest.raises(ValueError, match=r"another data\.batch_size; choose another workdir"):
        check_same_run(workdir, read_run(workdir), config, DATA)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"class_names": ["zebra", "bee"]}, "class 'ant' gone and class 'zebra' new"),
        ({"class_names": ["ant", "bee", "cat"]}, "class 'cat' new"),
        ({"class_names": ["bee", "ant"]}, "the same classes in another order"),
        ({"train": [[9, "x"], [5, "b"]]}, "class 'ant' has 9 training images instead of 4"),
        ({"test": [[2, "c"], [1, "x"]]}, "class 'bee' has other test images, 1 as before"),
    ],
)
def test_other_data_is_refused_with_the_difference(change, message, workdir):
    with pytest.raises(ValueError, match=f"holds a run on other data: {message}; put the data back"):
        check_same_run(workdir, read_run(workdir), resolved_defaults(), DATA | change)


@pytest.mark.parametrize("text", [None, "", "{}"])
def test_a_run_that_does_not_know_its_data_compares_its_models_classes(text, workdir, caplog):
    (workdir / "run.json").unlink() if text is None else (workdir / "run.json").write_text(text)
    check_same_run(workdir, read_run(workdir), resolved_defaults(), DATA)
    assert "does not say on what data it began" in caplog.text
    (workdir / "model").mkdir()
    (workdir / "model" / "model.json").write_text(json.dumps({"class_names": ["ant", "cow"]}))
    with pytest.raises(ValueError, match="class 'cow' gone and class 'bee' new"):
        check_same_run(workdir, read_run(workdir), resolved_defaults(), DATA)


def test_a_shorter_run_than_what_is_done_says_how(workdir):
    with pytest.raises(ValueError, match=r"has done 20 steps, .*train\.steps = 15; set it to 20 or more"):
        check_not_shorter(workdir, 20, 15)


def test_the_datas_identity_is_its_list_and_not_its_pixels(tmp_path):
    def dataset(names, test=("ant/9.png",), root=tmp_path):
        train, held_out = (
            Examples([root / name for name in part], [0] * len(part), open_image, list(map(str.encode, part)))
            for part in (names, test)
        )
        return Dataset(train, held_out, ("ant",))

    first = describe_data(dataset(["ant/1.png", "ant/2.png"]))
    assert data_summary(first) == "1 classes, 2 training and 1 test images: ant 2 + 1"
    assert data_difference(first, describe_data(dataset(["ant/1.png", "ant/2.png"]))) is None
    elsewhere = describe_data(dataset(["ant/1.png", "ant/2.png"], root=tmp_path / "elsewhere"))
    assert data_difference(first, json.loads(json.dumps(elsewhere))) is None
    renamed = describe_data(dataset(["ant/1.png", "ant/3.png"]))
    assert data_difference(first, renamed) == "class 'ant' has other training images, 2 as before"
    fewer = describe_data(dataset(["ant/1.png"], test=("ant/8.png",)))
    assert data_difference(first, fewer) == (
        "class 'ant' has 1 training image instead of 2; class 'ant' has other test images, 1 as before"
    )


def test_pixels_are_known_by_their_places():
    def identity(labels):
        examples = Examples(np.zeros((len(labels), 2, 2), np.uint8), labels, lambda pixels: pixels)
        return describe_data(Dataset(examples, examples, ("0", "1")))

    assert data_difference(identity([0, 1, 1]), identity([0, 1, 1])) is None
    assert data_difference(identity([0, 1, 1]), identity([1, 0, 1])) is not None


@contextmanager
def disk_that_fills():
    """Files cannot grow beyond a kilobyte, as on a disk without room."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_step_that_finds_no_room_is_said_in_a_line_and_the_one_before_is_whole(workdir):
    checkpoints = Checkpoints(workdir)
    with disk_that_fills():
        checkpoints.save(30, STATE)
        with pytest.raises(ValueError, match=r"30 cannot be written: .*; what was saved") as caught:
            checkpoints.finish()
    assert "\n" not in str(caught.value)
    assert restore(workdir)[0] == 20


def test_a_disk_that_has_no_room_for_a_step_is_said_with_both_numbers(workdir, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10**6, 10**6, 2**13))
    with pytest.raises(
        ValueError, match=r"it needs 0\.0 MiB, and the disk has 0\.0 MiB left; what was saved"
    ):
        Checkpoints(workdir).save(30, STATE)


def test_the_models_that_score_best_are_kept(tmp_path):
    model = sav.create_model("pvt_v2_nano", num_classes=2)
    variables = sav.init_variables(model, jax.random.key(0))
    best = Best(tmp_path, keep=2, score="top1")
    for step, top1 in ((10, 0.5), (20, 0.7), (30, 0.4), (40, 0.7), (50, 0.6)):
        best.offer(step, top1, model, variables, {"class_names": ["ant", "bee"]})
    assert sorted(path.name for path in (tmp_path / "best").iterdir()) == ["20", "40"]
    assert best.first() == {"step": 20, "top1": 0.7, "path": "best/20"}
    assert sav.load_model(tmp_path / "best" / "40")[2]["top1"] == 0.7


def test_imagenets_classes_are_the_same_by_words_and_by_folders():
    synsets = ("n01440764", *(f"n{number:08}" for number in range(2000000, 2000998)), "n15075141")
    words = imagenet_classes()
    assert class_difference(words, synsets) is None
    assert class_difference(synsets, words) is None
    assert class_difference(words[::-1], synsets) is not None
    assert class_difference(words, synsets[1:]) is not None
