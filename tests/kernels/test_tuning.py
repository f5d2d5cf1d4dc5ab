"""What `tune` makes of times: the kernels' own are another matter."""

import os

import pytest

from kernels_tvm.cpu import library, tuning
from kernels_tvm.cpu.targets import host_target
from kernels_tvm.descriptions import BinarizeDescription, LinearDescription, MlpDescription
from kernels_tvm.store import Kernel

MLP = Kernel(
    "mlp",
    MlpDescription(LinearDescription("dense", 16, 32), LinearDescription("dense", 32, 16), 1e-6, 9, (3, 3)),
)
OWN = host_target()
OTHER = next(value for value in tuning.CHOICES[OWN.name]["strip_bytes"] if value != OWN.strip_bytes)


@pytest.fixture
def times(monkeypatch):
    """A function that sets the times of variants, by their strips; and what was measured."""
    measured = []

    def script(seconds):
        def take(kernel, target, threads, arrays):
            measured.append(target)
            return seconds(target.strip_bytes)

        monkeypatch.setattr(tuning, "_seconds", take)
        return measured

    return script


def test_what_is_faster_is_kept(times):
    times(lambda strip: 0.5 if strip == OTHER else 1.0)
    assert tuning.tune(MLP, [], lambda: None) == ({"strip_bytes": OTHER}, 1.0, 0.5)


def test_a_gain_within_the_noise_is_none(times):
    times(lambda strip: 0.98 if strip == OTHER else 1.0)
    assert tuning.tune(MLP, [], lambda: None) == ({}, 1.0, 1.0)


def test_a_gain_that_turns_do_not_confirm_is_none(times):
    lucky = iter([0.5])
    times(lambda strip: next(lucky, 1.5) if strip == OTHER else 1.0)
    assert tuning.tune(MLP, [], lambda: None) == ({}, 1.0, 1.0)


def test_every_variant_is_measured_once_where_none_is_faster(times):
    measured, trials = times(lambda strip: 1.0), []
    tuning.tune(MLP, [], lambda: trials.append(None))
    assert len(trials) == len(measured) - 1 == len(set(measured[1:])) <= tuning.count_trials(MLP)


@pytest.mark.parametrize(
    "linear",
    [
        LinearDescription("shift", 16, 32, 4, "int8"),
        LinearDescription("shift", 16, 32, 8, "int8"),
        LinearDescription("dense", 16, 32, precision="int8"),
    ],
    ids=["one power", "two powers", "dense"],
)
def test_the_tile_of_int8_sums_is_tried_where_there_are_some(linear):
    tried = tuning.count_trials(Kernel("linear", linear))
    without = tuning.count_trials(Kernel("linear", LinearDescription("dense", 16, 32)))
    assert tried - without == len(tuning.CHOICES[OWN.name].get("int8_tile", ()))


def test_a_kernel_without_tiles_has_nothing_to_try():
    assert tuning.count_trials(Kernel("binarize", BinarizeDescription(16, True))) == 0


def test_kernels_are_built_for_what_was_kept(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    tuning.save_record(MLP, {"strip_bytes": OTHER})
    assert library.kernel_target(MLP).strip_bytes == OTHER


def test_a_record_that_cannot_be_written_leaves_the_old_ones_and_nothing_else(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_DATA_HOME", str(tmp_path))
    path = tuning.save_record(MLP, {"strip_bytes": OTHER})
    before = path.read_text()

    def fail(*paths):
        raise OSError("no space")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="no space"):
        tuning.save_record(MLP, {})
    assert list(path.parent.iterdir()) == [path]
    assert path.read_text() == before
