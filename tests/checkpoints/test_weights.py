"""Files of weights in the forms in which people have them: what is read, and what is said of the rest."""

import argparse
import json
import logging
import os
import pathlib
import shutil
import struct
import zipfile
from collections import OrderedDict
from typing import ClassVar

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch_file

from shiftaddvit_jax.checkpoints.find import find_weights
from shiftaddvit_jax.checkpoints.weights import read_tensors, weight_files

TENSORS = {
    f"blocks.{index}.weight": np.random.default_rng(index).normal(size=(3, 4)).astype(np.float32)
    for index in range(4)
}
OTHERS = {name: 2 * tensor for name, tensor in TENSORS.items()}
STATE = {name: torch.from_numpy(tensor) for name, tensor in TENSORS.items()}
OTHER_STATE = {name: torch.from_numpy(tensor) for name, tensor in OTHERS.items()}


def read(path, entry=None):
    return read_tensors(find_weights(path), entry=entry)


def assert_tensors(found, expected=TENSORS, **tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == np.float32
        np.testing.assert_allclose(found[name], tensor, **({"rtol": 0} | tolerance))


def assert_refused(message, path, entry=None):
    with pytest.raises(ValueError, match=message) as caught:
        read(path, entry)
    assert str(caught.value).isprintable()  # so it is one line


def save(tmp_path, value, name="weights.pth", **options):
    torch.save(value, tmp_path / name, **options)
    return tmp_path / name


def shards(folder, write, stem, suffix, variant="", **changes):
    """A folder of two shards, and their index."""
    names = list(TENSORS)
    files = [f"{stem}{variant}-0000{part}-of-00002{suffix}" for part in (1, 2)]
    for file, part in zip(files, (names[:2], names[2:]), strict=True):
        write({name: TENSORS[name] for name in part}, folder / file)
    weight_map = dict(zip(names, (files[0], files[0], files[1], files[1]), strict=True)) | changes
    index = folder / f"{stem}{suffix}.index{variant}.json"
    index.write_text(json.dumps({"metadata": {"total_size": 192}, "weight_map": weight_map}))
    return index


def write_torch(tensors, file):
    torch.save({name: torch.from_numpy(tensor) for name, tensor in tensors.items()}, file)


def test_the_files_of_an_index_are_its_shards(tmp_path):
    index = shards(tmp_path, save_file, "model", ".safetensors")
    assert weight_files(index) == sorted(tmp_path.glob("*.safetensors"))
    assert weight_files(weight_files(index)[0]) == weight_files(index)[:1]


@pytest.mark.parametrize("variant", ["", ".fp16"])
@pytest.mark.parametrize(
    "form", [(save_file, "model", ".safetensors"), (write_torch, "pytorch_model", ".bin")]
)
def test_shards_are_read_by_their_folder_or_index(tmp_path, form, variant):
    index = shards(tmp_path, *form, variant)
    assert_tensors(read(tmp_path))
    assert_tensors(read(index))
    first = next(file for file in sorted(tmp_path.iterdir()) if "00001" in file.name)
    assert_refused(r"is one of 2 shards; name .*index.json instead", first)
    index.unlink()
    assert_refused(r"is one of 2 shards; name the folder with all of them", first)
    if not variant:
        assert_refused(r"has shards, such as .*00001-of-00002.* but no index", tmp_path)


@pytest.mark.parametrize(
    ("shard", "message"),
    [
        ("../outside.safetensors", "a shard must be a file beside its index"),
        ("/etc/passwd", "a shard must be a file beside its index"),
        ("..", "a shard must be a file beside its index"),
        ("sub\\weights.safetensors", "a shard must be a file beside its index"),
        ("a\nb", "a shard must be a file beside its index"),
        (7, "a shard must be a file beside its index"),
        ("model-00003-of-00002.safetensors", "is missing, which model.safetensors.index.json names"),
        ("model-00001-of-00002.safetensors", "lacks blocks.3.weight, which .* puts there"),
        ("model.safetensors.index.json", "which is no weights but an index"),
    ],
)
def test_an_index_that_names_other_files_is_refused(tmp_path, shard, message):
    (tmp_path / "in").mkdir()
    save_file(TENSORS, tmp_path / "outside.safetensors")
    shards(tmp_path / "in", save_file, "model", ".safetensors", **{"blocks.3.weight": shard})
    assert_refused(message, tmp_path / "in")


@pytest.mark.parametrize(
    "text", ["{", "{}", '{"weight_map": []}', '{"weight_map": {}}', "{" * 9 + '"a":' * 9]
)
def test_json_that_is_no_index_is_refused(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    assert_refused("neither weights nor whole JSON|has no weight_map", tmp_path / "config.json")


def test_a_folder_with_both_gives_its_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    torch.save(OTHER_STATE, tmp_path / "pytorch_model.bin")
    assert_tensors(read(tmp_path))


def test_the_only_variant_is_taken_and_one_of_several_must_be_named(tmp_path):
    halves = {name: tensor.astype(np.float16) for name, tensor in TENSORS.items()}
    save_file(halves, tmp_path / "model.fp16.safetensors")
    assert_tensors(read(tmp_path), halves)
    save_file(TENSORS, tmp_path / "model.non_ema.safetensors")
    assert_refused(r"several variants, model.fp16.safetensors, model.non_ema.safetensors; name one", tmp_path)


def test_a_folder_without_weights_says_what_it_has(tmp_path):
    save(tmp_path, STATE, "best.pth")
    assert_refused(r"has neither .*; it has best.pth, and is no checkpoint.*, or the file itself", tmp_path)
    (tmp_path / "model.json").write_text("{}")
    (tmp_path / "variables").mkdir()
    assert_refused("is a checkpoint of this package; read it by load_model", tmp_path)


def test_content_decides_what_a_file_is(tmp_path):
    save_file(TENSORS, tmp_path / "weights.pth")
    assert_tensors(read(tmp_path / "weights.pth"))
    assert_tensors(read(save(tmp_path, STATE, "weights.safetensors")))
    assert_tensors(read(save(tmp_path, STATE, "weights")))
    assert_tensors(read(save(tmp_path, STATE, "old.npz", _use_new_zipfile_serialization=False)))
    with open(tmp_path / "weights.bin", "wb") as stream:
        np.savez_compressed(stream, **TENSORS)
    assert_tensors(read(tmp_path / "weights.bin"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 22\n",
            "pointer of git-lfs.*git lfs pull",
        ),
        (b"<!DOCTYPE html><html>", "a web page"),
        (b"\x89HDF\r\n\x1a\n", "HDF5"),
        (b"\x1f\x8b\x08", "gzip; unpack it first"),
        (b"\x93NUMPY\x01\0", "np.savez"),
        (b"PK\x03\x04 and then nothing", "zip archive that is cut off or damaged"),
        (b"\x80\x02}q\0.", "not a whole PyTorch file"),
        (b"weights", "neither a whole PyTorch file, nor safetensors, nor .npz"),
        (struct.pack("<Q", 2**50) + b"{}", "not a whole safetensors file"),
        (struct.pack("<Q", 2**62) + b"{}", "neither a whole PyTorch file, nor safetensors"),
    ],
)
def test_what_is_no_weights_is_told(tmp_path, content, message):
    (tmp_path / "weights.pth").write_bytes(content)
    assert_refused(message, tmp_path / "weights.pth")


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".old", ".npz", ".json"])
def test_cut_files_are_refused_wherever_they_end(tmp_path, suffix):
    whole = tmp_path / "whole"
    if suffix == ".safetensors":
        save_file(TENSORS, whole)
    elif suffix == ".npz":
        with open(whole, "wb") as stream:
            np.savez(stream, **TENSORS)
    elif suffix == ".json":
        whole.write_text(json.dumps({"weight_map": dict.fromkeys(TENSORS, "model.safetensors")}))
    else:
        torch.save(STATE, whole, _use_new_zipfile_serialization=suffix == ".pth")
    data = whole.read_bytes()
    for length in np.random.default_rng(0).integers(1, len(data), 25):
        (tmp_path / f"cut{suffix}").write_bytes(data[:length])
        assert_refused(f"cut{suffix}", tmp_path / f"cut{suffix}")


def test_a_changed_byte_in_a_pytorch_file_is_found(tmp_path):
    file = save(tmp_path, STATE)
    data = bytearray(file.read_bytes())
    data[data.index(TENSORS["blocks.2.weight"].tobytes()) + 2] ^= 1
    file.write_bytes(data)
    assert_refused("cut off or damaged", file)


def test_a_file_that_grows_without_measure_is_refused(tmp_path):
    np.savez_compressed(tmp_path / "zeros.npz", zeros=np.zeros(10**7, np.float32))
    assert_refused(r"has 39,\d+ bytes, but its tensors would need 40,000,\d+", tmp_path / "zeros.npz")
    repeated = save(tmp_path, {"blocks.0.weight": torch.zeros(1).expand(10**9)})
    assert_refused(r"would need 4,000,000,000", repeated)
    with zipfile.ZipFile(tmp_path / "lie.npz", "w") as archive:
        header = (
            b"\x93NUMPY\x01\0v\0"
            + f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({10**15},)}}".encode()
        )
        archive.writestr("a.npy", header.ljust(127) + b"\n")
    assert_refused("a of .* cannot be read", tmp_path / "lie.npz")


def test_npz_never_unpickles(tmp_path):
    np.savez(tmp_path / "weights.npz", **TENSORS, settings=np.array({"lr": 1}, object))
    assert_refused("settings of .* cannot be read", tmp_path / "weights.npz")


class Call:
    """An object whose unpickling calls a function."""

    def __init__(self, *function_and_argument):
        self.function, *self.arguments = function_and_argument

    def __reduce__(self):
        return self.function, tuple(self.arguments)


class Settings(dict):
    """As configs of training frameworks are."""


class TestPyTorch:
    """What PyTorch writes beside and around weights."""

    EMA: ClassVar = {"state_dict_ema": OTHER_STATE, "model_ema": OTHER_STATE, "ema_model": OTHER_STATE}

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda state: state,
            OrderedDict,
            lambda state: {
                "model": state,
                "optimizer": {"state": {0: {"exp_avg": torch.ones(2)}}},
                "epoch": 3,
            },
            lambda state: {"state_dict": state, "callbacks": {"best": {"score": torch.tensor(0.7)}}},
            lambda state: {
                "model_state_dict": state,
                "loss": 0.1,
                "rng_state": torch.zeros(8, dtype=torch.uint8),
            },
            lambda state: {"net": state, "acc": 0.9},
            lambda state: {"module": state},
            lambda state: {"my_own_name": state, "epoch": 1},
            lambda state: {"checkpoint": {"state_dict": {"model": state}}},
            lambda state: {"teacher": state, "dino_loss": {"center": torch.zeros(1, 3)}},
            lambda state: {**state, "epoch": 3, "note": None},
        ],
    )
    def test_wrapped_weights_are_found(self, tmp_path, wrap, caplog):
        assert_tensors(read(save(tmp_path, wrap(STATE))))
        assert all(record.levelno < logging.WARNING for record in caplog.records)

    @pytest.mark.parametrize("ema", EMA)
    @pytest.mark.parametrize("plain", ["model", "state_dict", "model_state_dict", "net"])
    def test_plain_weights_come_before_an_ema_that_is_told(self, tmp_path, plain, ema, caplog):
        file = save(tmp_path, {ema: OTHER_STATE, plain: STATE, "epoch": 3})
        assert_tensors(read(file))
        assert f"took the entry {plain}; {ema} beside it, see entry='{ema}'" in caplog.text
        assert_tensors(read(file, entry=ema), OTHERS)

    def test_an_ema_alone_is_taken_and_told(self, tmp_path, caplog):
        assert_tensors(read(save(tmp_path, {"model_ema": STATE})))
        assert "took the entry model_ema, an average (EMA): there is nothing else" in caplog.text

    def test_dinos_teacher_is_taken(self, tmp_path, caplog):
        file = save(tmp_path, {"student": OTHER_STATE, "teacher": STATE})
        assert_tensors(read(file))
        assert "took the entry teacher; student beside it" in caplog.text
        assert_tensors(read(file, entry="student"), OTHERS)

    def test_a_lone_entry_is_told_in_detail_alone(self, tmp_path, caplog):
        with caplog.at_level(logging.INFO):
            read(save(tmp_path, {"model": STATE}))
        assert "took the entry model" in caplog.text

    def test_entries_that_could_both_be_meant_are_refused(self, tmp_path):
        file = save(tmp_path, {"generator": STATE, "critic": OTHER_STATE})
        assert_refused(r"several sets of weights, generator, critic; name one: .*entry='generator'", file)
        assert_tensors(read(file, entry="critic"), OTHERS)
        assert_refused("has no entry 'model'; it has generator, critic", file, entry="model")

    def test_an_entry_may_be_what_names_begin_with(self, tmp_path):
        flat = {f"teacher.backbone.{name}": tensor for name, tensor in TENSORS.items()}
        save_file(flat | {"student.weight": np.zeros(1, np.float32)}, tmp_path / "weights.safetensors")
        assert_tensors(read(tmp_path / "weights.safetensors", entry="teacher.backbone"))
        nested = {"teacher": {f"backbone.{name}": tensor for name, tensor in STATE.items()}}
        assert_tensors(read(save(tmp_path, nested), entry="teacher.backbone"))
        assert_refused("has no entry 'ema'; it has student, teacher", tmp_path / "weights.safetensors", "ema")

    def test_parameters_and_views_are_read(self, tmp_path):
        assert_tensors(read(save(tmp_path, {name: torch.nn.Parameter(it) for name, it in STATE.items()})))
        transposed = {name: tensor.T.contiguous().T for name, tensor in STATE.items()}
        assert_tensors(read(save(tmp_path, transposed)))
        module = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
        found = read(save(tmp_path, module.state_dict(keep_vars=True)))
        np.testing.assert_array_equal(found["0.weight"], module[0].weight.detach().numpy())
        assert found["1.num_batches_tracked"].dtype == np.int64

    def test_objects_beside_the_weights_are_not_made(self, tmp_path):
        beside = {
            "args": argparse.Namespace(lr=1.0, nested=argparse.Namespace()),
            "best": np.float64(0.7),
            "path": pathlib.PurePosixPath("x"),
            "log": np.ones(3),
            "never": Call(shutil.rmtree, tmp_path),
        }
        assert_tensors(read(save(tmp_path, {"model": STATE, **beside})))

    @pytest.mark.parametrize("zipped", [True, False])
    @pytest.mark.parametrize(
        "beside", [Call(os.mkdir, "made"), Call(pathlib.Path.touch, pathlib.Path("made")), Settings(lr=1)]
    )
    def test_what_cannot_be_left_out_is_refused(self, tmp_path, monkeypatch, beside, zipped):
        monkeypatch.chdir(tmp_path)
        file = save(tmp_path, {"model": STATE, "x": beside}, _use_new_zipfile_serialization=zipped)
        assert_refused(r"holds an object of .*, and nothing but tensors is unpickled", file)
        assert not (tmp_path / "made").exists()

    @pytest.mark.parametrize("zipped", [True, False])
    def test_whole_modules_are_refused(self, tmp_path, zipped):
        file = save(tmp_path, torch.nn.Linear(2, 2), _use_new_zipfile_serialization=zipped)
        assert_refused(r"object of torch.nn.modules.linear.Linear.*torch.save\(model.state_dict\(\)", file)

    def test_a_module_in_an_entry_is_refused(self, tmp_path):
        file = save(tmp_path, {"model": torch.nn.Linear(2, 2), "epoch": 1})
        assert_refused("holds an object of torch.nn.modules.linear.Linear", file)

    def test_an_array_of_numpy_among_tensors_is_told(self, tmp_path):
        file = save(tmp_path, {**STATE, "blocks.9.weight": np.ones(3)})
        assert_refused(r"blocks.9.weight of .* is no tensor but numpy", file)

    def test_torchscript_is_told(self, tmp_path):
        torch.jit.trace(torch.nn.Linear(2, 2), torch.ones(1, 2)).save(tmp_path / "script.pt")
        assert_refused(r"is TorchScript.*torch.jit.load\(FILE\).state_dict\(\)", tmp_path / "script.pt")

    @pytest.mark.parametrize("value", [[1, 2], torch.ones(2), {}, {"epoch": 1}, {0: torch.ones(2)}])
    def test_what_has_no_named_tensors_is_told(self, tmp_path, value):
        assert_refused("does not hold a dictionary of tensors", save(tmp_path, value))


DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_floating_point_comes_in_float32(tmp_path, dtype):
    state = {name: tensor.to(dtype) for name, tensor in STATE.items()}
    expected = {name: tensor.float().numpy() for name, tensor in state.items()}
    assert_tensors(read(save(tmp_path, state)), expected)
    save_torch_file(state, tmp_path / "weights.safetensors")
    assert_tensors(read(tmp_path / "weights.safetensors"), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(tmp_path, dtype, value):
    state = {name: tensor.to(dtype, copy=True) for name, tensor in STATE.items()}
    state["blocks.2.weight"][1, 2] = value
    message = r"blocks.2.weight of .* has NaN or infinity in float32, 1 times"
    assert_refused(message, save(tmp_path, {"model": state}))
    save_torch_file(state, tmp_path / "weights.safetensors")
    assert_refused(message, tmp_path / "weights.safetensors")


def test_numbers_too_large_for_float32_are_refused(tmp_path):
    save_file({"weight": np.array([1.0, 1e39])}, tmp_path / "weights.safetensors")
    assert_refused("weight of .* has NaN or infinity in float32, 1 times", tmp_path / "weights.safetensors")


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2, torch.complex64], ids=str)
def test_other_dtypes_are_refused_by_name(tmp_path, dtype):
    state = STATE | {"blocks.1.weight": STATE["blocks.1.weight"].to(dtype)}
    assert_refused(r"blocks.1.weight of .* has dtype (float8|complex)", save(tmp_path, state))
    save_torch_file(state, tmp_path / "weights.safetensors")
    assert_refused(r"blocks.1.weight of .* has dtype (F8|C64)", tmp_path / "weights.safetensors")


def test_tensors_that_are_not_dense_are_refused(tmp_path):
    for tensor in (STATE["blocks.1.weight"].to_sparse(), torch.ones(2, 2, device="meta")):
        file = save(tmp_path, STATE | {"blocks.1.weight": tensor})
        assert_refused("blocks.1.weight of .* has dtype (meta|torch.float32, torch.sparse_coo)", file)


def test_the_hub_gives_all_shards(tmp_path, monkeypatch):
    from huggingface_hub.errors import EntryNotFoundError

    shards(tmp_path, save_file, "model", ".safetensors")
    asked = []

    def download(repository, file, local_files_only):
        asked.append(file)
        if not (tmp_path / file).is_file():
            raise EntryNotFoundError(file)
        return str(tmp_path / file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert_tensors(read("hf:ORG/NAME"))
    assert {"model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"} <= set(asked)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert_refused("ORG/NAME lacks model-00002-of-00002.safetensors", "hf:ORG/NAME")


def test_without_a_connection_the_hub_is_asked_once(monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    asked = []

    def download(repository, file, local_files_only):
        asked.append(local_files_only)
        raise LocalEntryNotFoundError(file)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert_refused("no connection to the Hub, and the cache does not have it", "hf:ORG/NAME")
    assert asked == [False, True, True, True]
