"""Reads files of weights that others wrote as tensors by name."""

import io
import itertools
import json
import logging
import pickle
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from safetensors import safe_open

from shiftaddvit_jax.optional import require

logger = logging.getLogger(__name__)

# What training scripts call the entry with the weights, best first; those of an EMA come after them.
_ENTRIES = (
    "state_dict",
    "model_state_dict",
    "model",
    "module",
    "net",
    "network",
    "teacher",
    "student",
)
_EMA = re.compile(r"(^|_)ema(_|$)", re.IGNORECASE)
# Beginnings of files that are often taken for weights.
_FOREIGN = {
    b"version https://git-lfs": "a pointer of git-lfs, without the weights; run `git lfs pull` in its folder",
    b"\x89HDF": "an HDF5 file, as Keras writes; save its weights as .safetensors",
    b"GGUF": "a GGUF file; save its weights as .safetensors",
    b"\x1f\x8b": "compressed by gzip; unpack it first",
    b"\x93NUMPY": "one array without a name; save all of them by np.savez",
    b"<": "a web page or XML; download the weights again",
}
# By how much the tensors of a file may outgrow it, compressed or not.
_GROWTH, _SLACK = 16, 2**20
_AGAIN = "download or copy it again"


def weight_files(file: Path) -> list[Path]:
    """The files with the weights of what ``find_weights`` returns: itself, or an index's shards."""
    if _kind(file) != "index":
        return [file]
    return [file.with_name(shard) for shard in sorted(set(weight_map(file).values()))]


def read_tensors(file: Path, *, entry: str | None = None) -> dict[str, np.ndarray]:
    """The tensors in a file of weights by their names: floating point in float32, others as they are.

    Its bytes say what the file is, not its suffix: safetensors, PyTorch, ``.npz``, or the index of shards.
    PyTorch reads its own files, tensors alone: what lies beside them is neither imported nor made.

    Training scripts wrap the weights. The entry ``state_dict`` is taken first, then ``model_state_dict``,
    ``model``, ``module``, ``net``, ``network``, ``teacher`` and ``student``; an exponential moving average
    (``model_ema``, ``state_dict_ema``) only if there is nothing else. A line of the log says what was taken
    and what lies beside it.

    Args:
      file: as from `shiftaddvit_jax.checkpoints.find.find_weights`.
      entry: the entry to take instead, such as ``"model_ema"``, or ``"teacher.backbone"`` for one in it; also
        what a part of the tensors' names has before it.

    Raises:
      ValueError: a file that is damaged or holds something else; an entry that it lacks, or several that
        could be meant; numbers that are NaN or infinite in float32, by the tensor's name; PyTorch missing
        where it is needed.
    """
    try:
        found = _READERS[_kind(file)](file)
    except OSError as error:
        raise ValueError(f"{file} cannot be read: {first_line(error)}") from None
    tensors = _select(found, entry, file)
    if not tensors:
        raise ValueError(f"{file} holds no tensors; save the model's state_dict()")
    return {name: _as_float32(name, tensor, file) for name, tensor in tensors.items()}


def first_line(error: Exception) -> str:
    """What ``error`` says, in one line of printable characters."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    line = re.sub(r"\x1b\[\d*m", "", (str(error).splitlines() or [""])[0])
    return printable(line) or type(error).__name__


def printable(name: object) -> str:
    """A name out of a file, on one line and not too long."""
    name = str(name)
    name = name if name.isprintable() else repr(name)[1:-1]
    return name if len(name) <= 200 else f"{name[:200]}..."


def of_other_kind(name: str, kind: object, file: Path) -> str:
    """What is wrong with a tensor that is not of floating point."""
    return (
        f"{printable(name)} of {file} has dtype {kind}; expected floating point of 16, 32 or 64 bits: "
        "quantized weights need their scales, so save them dequantized"
    )


def _kind(file: Path) -> str:
    """What ``file`` is by its content, a key of `_READERS`."""
    with open(file, "rb") as stream:
        start = stream.read(64)
    if not start:
        raise ValueError(f"{file} is empty; {_AGAIN}")
    if start.startswith(b"PK"):
        return _kind_of_zip(file)
    if start[7:9] == b"\0{":  # a length in eight bytes, little-endian, then JSON
        return "safetensors"
    if start.lstrip().startswith(b"{"):
        return "index"
    if start.startswith(b"\x80"):
        return "pytorch"
    for beginning, what in _FOREIGN.items():
        if start.lstrip().startswith(beginning):
            raise ValueError(f"{file} is {what}")
    if file.suffix == ".safetensors":
        raise ValueError(f"{file} is not a whole safetensors file; {_AGAIN}")
    raise ValueError(
        f"{file} is neither a whole PyTorch file, nor safetensors, nor .npz; {_AGAIN}, or name the weights"
    )


def _kind_of_zip(file: Path) -> str:
    damaged = f"{file} is a zip archive that is cut off or damaged; {_AGAIN}"
    try:
        with zipfile.ZipFile(file) as archive:
            members = archive.infolist()
    except Exception:  # damaged bytes make zipfile raise almost anything
        raise ValueError(damaged) from None
    _check_growth(sum(member.file_size for member in members), file)
    names = [member.filename for member in members]
    try:
        with zipfile.ZipFile(file) as archive:
            for member in members:
                # PyTorch does not look at the checksums. Where it is told to write none, they are 0.
                with archive.open(member) as stream:
                    while member.CRC and stream.read(2**20):
                        pass
    except Exception:
        raise ValueError(damaged) from None
    last = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in last:
        raise ValueError(
            f"{file} is TorchScript, a program; write its weights alone by PyTorch: "
            'torch.save(torch.jit.load(FILE).state_dict(), "weights.pth")'
        )
    if "data.pkl" in last:
        return "pytorch"
    if names and all(name.endswith(".npy") for name in names):
        return "npz"
    raise ValueError(f"{file} is a zip archive of neither PyTorch nor .npz; unpack it and name the weights")


def _read_index(file: Path) -> dict[str, Any]:
    """The tensors of all shards that an index names."""
    names: dict[str, list[str]] = {}
    for name, shard in weight_map(file).items():
        names.setdefault(shard, []).append(name)
    tensors = {}
    for shard, wanted in names.items():
        path = file.with_name(shard)
        if not path.is_file():
            raise ValueError(f"{path} is missing, which {file.name} names; download it too")
        kind = _kind(path)
        if kind == "index":
            raise ValueError(f"{file} names {shard}, which is no weights but an index; write the index anew")
        found = _READERS[kind](path)
        for name in wanted:
            if not isinstance(found, Mapping) or name not in found:
                raise ValueError(f"{path} lacks {printable(name)}, which {file.name} puts there; {_AGAIN}")
            tensors[name] = found[name]
    return tensors


def weight_map(file: Path) -> dict[str, str]:
    """The shard of each tensor in an index, all of them files beside it."""
    try:
        found = json.loads(file.read_text())
    except (ValueError, RecursionError):
        raise ValueError(f"{file} is neither weights nor whole JSON; {_AGAIN}") from None
    shards = found.get("weight_map") if isinstance(found, dict) else None
    if not isinstance(shards, dict) or not shards:
        raise ValueError(
            f"{file} has no weight_map, as an index of shards has; name the file with the weights"
        )
    for shard in shards.values():
        inside = isinstance(shard, str) and shard.isprintable() and re.fullmatch(r"[^/\\:]+", shard)
        if not inside or shard in (".", ".."):
            raise ValueError(f"{file} names {printable(shard)!r}; a shard must be a file beside its index")
    return shards


# The dtypes of safetensors that NumPy has; bfloat16 is the upper half of a float32.
_DTYPES = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "?"},
    **{
        "I64": "<i8",
        "I32": "<i4",
        "I16": "<i2",
        "I8": "i1",
        "U64": "<u8",
        "U32": "<u4",
        "U16": "<u2",
        "U8": "u1",
    },
}


def _read_safetensors(file: Path) -> dict[str, Any]:
    try:
        with safe_open(file, "np"):  # proves the header, its size and that every tensor lies in the file
            pass
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{file} is not a whole safetensors file: {first_line(error)}; {_AGAIN}") from None
    tensors = {}
    with open(file, "rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        header = json.loads(stream.read(length))
        header.pop("__metadata__", None)
        for name, described in header.items():
            kind, shape, (start, end) = (described[key] for key in ("dtype", "shape", "data_offsets"))
            if kind not in _DTYPES:
                raise ValueError(of_other_kind(name, kind, file))
            stream.seek(8 + length + start)
            tensor = np.frombuffer(stream.read(end - start), _DTYPES[kind]).reshape(shape)
            if kind == "BF16":
                tensor = (tensor.astype(np.uint32) << 16).view(np.float32)
            tensors[name] = tensor
    return tensors


def _read_npz(file: Path) -> dict[str, Any]:
    tensors = {}
    name = ""
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                name = member.filename.removesuffix(".npy")
                data = io.BytesIO(archive.read(member))
                tensors[name] = np.lib.format.read_array(data, allow_pickle=False)
    except Exception as error:  # a damaged header makes NumPy raise almost anything
        raise ValueError(f"{printable(name)} of {file} cannot be read: {first_line(error)}") from None
    return tensors


class _Foreign:
    """What an object beside the tensors becomes: nothing of its class is imported or run."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        pass


def _foreign_kind(value: Any) -> str:
    """The name of what `_Foreign` stands for, empty for anything else."""
    kind = value if isinstance(value, type) else type(value)
    return printable(kind.__name__) if issubclass(kind, _Foreign) else ""


def _read_pytorch(file: Path) -> Any:
    require("peers", f"{file} is a PyTorch file, no .safetensors one; reading it", "torch")
    import torch

    # A file that is no zip archive is not searched for them, and training scripts most often write this one.
    names = ["argparse.Namespace"]
    try:
        if zipfile.is_zipfile(file):
            names = torch.serialization.get_unsafe_globals_in_checkpoint(file)
        foreign: list[Any] = [(type(name, (_Foreign,), {}), name) for name in names]
        # A stream, since PyTorch goes by the suffix of a path.
        with torch.serialization.safe_globals(foreign), open(file, "rb") as stream:
            found = torch.load(stream, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # damaged bytes make PyTorch raise almost anything
        refused = re.search(r"GLOBAL (\S+) (was not|whose module)", str(error))
        if refused or (zipfile.is_zipfile(file) and names and isinstance(error, pickle.UnpicklingError)):
            raise ValueError(_not_tensors(file, refused[1] if refused else ", ".join(names[:3]))) from None
        reason = ValueError(str(error).rpartition("WeightsUnpickler error: ")[2].strip())
        raise ValueError(
            f"{file} is not a whole PyTorch file of tensors alone: {first_line(reason)}; {_AGAIN}"
        ) from None
    # A tensor may repeat one number as often as its shape says.
    sizes = [
        4 * value.numel() for it in _candidates(found) for value in it.values.values() if _is_tensor(value)
    ]
    _check_growth(sum(sizes), file)
    return found


_READERS = {
    "safetensors": _read_safetensors,
    "pytorch": _read_pytorch,
    "npz": _read_npz,
    "index": _read_index,
}


def _not_tensors(file: Path, kind: str) -> str:
    return (
        f"{file} holds an object of {printable(kind)}, and nothing but tensors is unpickled; where you trust "
        'it, torch.load(FILE, weights_only=False) and torch.save(model.state_dict(), "weights.pth")'
    )


def _check_growth(size: int, file: Path) -> None:
    on_disk = file.stat().st_size
    if size > _GROWTH * on_disk + _SLACK:
        raise ValueError(
            f"{file} has {on_disk:,} bytes, but its tensors would need {size:,}; expected at most {_GROWTH} "
            "times as many: save them anew, if it is not damaged"
        )


# Choosing what was wrapped.


class _Candidate(NamedTuple):
    path: tuple[str, ...]
    values: Mapping[Any, Any]


def _is_tensor(value) -> bool:
    return hasattr(value, "dtype") and hasattr(value, "shape")


def _candidates(found: Any, path: tuple[str, ...] = ()) -> Iterator[_Candidate]:
    """Dictionaries of tensors in ``found``, at most four entries deep."""
    if not isinstance(found, Mapping) or not all(isinstance(name, str) for name in found):
        return
    if any(_is_tensor(value) for value in found.values()):
        yield _Candidate(path, found)
    if len(path) < 4:
        for name, value in found.items():
            yield from _candidates(value, (*path, name))


def _rank(candidate: _Candidate) -> tuple[int, ...]:
    """Of several candidates, that of the lowest rank is taken."""
    known = [
        _ENTRIES.index(name) if name in _ENTRIES else len(_ENTRIES) + (0 if _EMA.search(name) else 2)
        for name in candidate.path
    ]
    return tuple(known) or (len(_ENTRIES) + 1,)


def _select(found: Any, entry: str | None, file: Path) -> dict[str, Any]:
    """The tensors of one of the entries in ``found``."""
    candidates = list(_candidates(found))
    # Weights are inside of modules; the state of a random generator is not.
    candidates = [
        it for it in candidates if any("." in name or "/" in name for name in it.values)
    ] or candidates
    if not candidates:
        for value in found.values() if isinstance(found, Mapping) else (found,):
            if _foreign_kind(value):
                raise ValueError(_not_tensors(file, _foreign_kind(value)))
        raise ValueError(f"{file} does not hold a dictionary of tensors; save the model's state_dict() alone")
    if entry is None:
        return _tensors(_best(candidates, file).values, file)
    inside = {}
    for path, values in sorted(candidates, key=lambda it: len(it.path)):
        for name, value in values.items():
            whole = ".".join((*path, name))
            if whole.startswith(f"{entry}."):
                inside.setdefault(whole.removeprefix(f"{entry}."), value)
    if not inside:
        raise ValueError(f"{file} has no entry {entry!r}; it has {', '.join(_places(candidates))}")
    return _tensors(inside, file)


def _best(candidates: list[_Candidate], file: Path) -> _Candidate:
    best, *others = sorted(candidates, key=_rank)
    taken = ".".join(best.path)
    if others and _rank(others[0]) == _rank(best):
        raise ValueError(
            f"{file} holds several sets of weights, {', '.join(_places(candidates))}; "
            f"name one: load_pretrained(..., entry={taken!r})"
        )
    if others:
        beside = [".".join(it.path) for it in others]
        hint = f"{', '.join(map(printable, beside))} beside it, see entry={beside[0]!r}"
        logger.warning("%s: took the entry %s; %s", file, printable(taken) or "without a name", hint)
    elif best.path and any(_EMA.search(name) for name in best.path):
        logger.warning("%s: took the entry %s, an average (EMA): there is nothing else", file, taken)
    elif best.path:
        logger.info("%s: took the entry %s", file, printable(taken))
    return best


def _places(candidates: list[_Candidate]) -> list[str]:
    """What an entry could be, for messages."""
    paths = [".".join(it.path) for it in candidates if it.path]
    if not paths:
        paths = list(dict.fromkeys(name.partition(".")[0] for name in candidates[0].values))
    return [printable(path) for path in itertools.islice(paths, 6)]


def _tensors(values: Mapping[str, Any], file: Path) -> dict[str, Any]:
    """Those of ``values`` that are tensors; what is none must not look like one."""
    for name, value in values.items():
        if _foreign_kind(value):
            raise ValueError(
                f"{printable(name)} of {file} is no tensor but {_foreign_kind(value)}; save it as a tensor"
            )
    return {name: value for name, value in values.items() if _is_tensor(value)}


def _as_float32(name: str, tensor: Any, file: Path) -> np.ndarray:
    """``tensor`` of NumPy or PyTorch for NumPy, floating point in float32."""
    if not isinstance(tensor, np.ndarray):
        tensor = _from_torch(name, tensor, file)
    kind = str(tensor.dtype)
    if kind not in ("float16", "bfloat16", "float32", "float64"):
        if tensor.dtype.kind not in "iub":
            raise ValueError(of_other_kind(name, kind, file))
        return tensor
    with np.errstate(over="ignore"):
        tensor = np.asarray(tensor, np.float32)
    wrong = tensor.size - int(np.isfinite(tensor).sum())
    if wrong:
        raise ValueError(
            f"{printable(name)} of {file} has NaN or infinity in float32, {wrong} times; expected finite "
            "weights: take the checkpoint of an earlier step, or one that was saved in float32"
        )
    return tensor


def _from_torch(name: str, tensor: Any, file: Path) -> np.ndarray:
    import torch

    if tensor.is_quantized or tensor.is_meta or tensor.layout != torch.strided:
        what = "meta, without numbers" if tensor.is_meta else f"{tensor.dtype}, {tensor.layout}"
        raise ValueError(of_other_kind(name, what, file))
    tensor = tensor.detach()
    if tensor.dtype in (torch.bfloat16, torch.float16):
        tensor = tensor.float()
    try:
        return tensor.numpy()
    except (TypeError, RuntimeError):
        raise ValueError(of_other_kind(name, str(tensor.dtype).removeprefix("torch."), file)) from None
