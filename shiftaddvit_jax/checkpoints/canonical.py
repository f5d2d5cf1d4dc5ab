"""A model's weights for inference in a file that no machine's layout is in: the canonical packed format.

A file ``model.safetensors`` holds each variable under its path, such as ``params/head/bias``. Weights of
shift layers, [inputs, outputs], are in two or three tensors, row by row:

- ``codes``, uint8 [ceil(inputs outputs / 2)]: weight number i in the low half of byte i // 2 if i is even, in
  its high half if i is odd. A code k from 1 stands for 2^(k - 1 + exponent), 0 for 0.
- ``signs``, uint8 [ceil(inputs outputs / 8)], where weights have 5 bits: the sign of weight i is bit i % 8 of
  byte i // 8, 1 if it is negative. Where they have 4, the highest bit of a code's half is the sign.
- ``exponents``, int8 [outputs].

From version 2 on, ``codes`` int8 [inputs, outputs] are numbers of 8 bits, times 2^exponent each.

Everything else is as Flax has it: dense weights are float32, or bfloat16 where the model multiplies in that,
or int8 (version 2) with a ``scale`` float32 [outputs] beside the ``kernel``.
The file's metadata have ``format`` and ``version``, and in ``shapes`` each shift weight's shape.
`kernels_tvm.packing` says how kernels want the same numbers; they are laid out when a file is read.
"""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from jaxtyping import Int8, PyTree, UInt8
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from kernels_tvm.packing import (
    TILE_OUTPUTS,
    bits_of,
    read_blocks,
    read_numbers,
    read_tiles,
    write_blocks,
    write_numbers,
    write_tiles,
)
from shiftaddvit_jax.files import whole_file
from shiftaddvit_jax.models.variables import variable_shapes
from shiftaddvit_jax.nn.kernels import is_packed
from shiftaddvit_jax.pack import pack

Tiles = UInt8[np.ndarray, "columns rows bytes"] | Int8[np.ndarray, "columns rows bytes"]

FORMAT = "shiftaddvit"
VERSION = 2
_WRITTEN_WITH = {"exponent": "codes", "scale": "blocks"}
OLDEST = 1  # which says the same, but for weights that are whole numbers of 8 bits: it has none


def write_canonical(file: str | Path, model: nn.Module, variables: PyTree) -> None:
    """Write ``variables``, packed or not, whole or not at all.

    Raises:
      ValueError: weights that can't be packed, see `shiftaddvit_jax.pack`; or a path that can't be written.
    """
    if not is_packed(variables["params"]):
        variables = pack(model, variables)
    kernels: dict[str, Any] = flatten_dict(variable_shapes(model), sep="/")
    arrays, shapes, blocked, whole_numbers = {}, {}, [], False
    flat = {name: np.asarray(leaf) for name, leaf in flatten_dict(variables, sep="/").items()}
    for name, leaf in flat.items():
        layer, _, last = name.rpartition("/")
        if last == "codes":
            shape = kernels[f"{layer}/kernel"].shape
            shapes[layer] = list(shape)
            arrays |= {f"{layer}/{part}": array for part, array in _read_rows(leaf, *shape).items()}
            whole_numbers |= bits_of(leaf) == 8
            arrays[f"{layer}/exponents"] = flat[f"{layer}/exponent"][: shape[1]]
        elif last == "blocks":
            shape = kernels[f"{layer}/kernel"].shape
            blocked.append(layer)
            if leaf.dtype == np.int8:
                whole_numbers = True
                kernel = read_numbers(leaf, math.prod(shape[:-1]), shape[-1])
                arrays[f"{layer}/scale"] = flat[f"{layer}/scale"][: shape[-1]]
            else:
                kernel = read_blocks(leaf, shape[-1])
            arrays[f"{layer}/kernel"] = kernel.reshape(shape)
        elif f"{layer}/{_WRITTEN_WITH.get(last)}" not in flat:
            arrays[name] = leaf
    metadata = {
        "format": FORMAT,
        "version": str(VERSION if whole_numbers else OLDEST),
        "shapes": json.dumps(shapes),
        "blocked": json.dumps(blocked),
    }
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    try:
        with whole_file(file) as temporary:
            save_file(arrays, temporary, metadata)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} cannot be written: {error}") from None


def is_canonical(file: str | Path) -> bool:
    """Whether ``file`` is a safetensors file in this format, of any version."""
    try:
        with safe_open(file, "numpy") as opened:
            return (opened.metadata() or {}).get("format") == FORMAT
    except (OSError, SafetensorError):
        return False


def read_canonical(file: str | Path) -> PyTree:
    """The packed variables in ``file``, as `shiftaddvit_jax.pack` lays them out for kernels.

    Raises:
      ValueError: a file that is damaged, in another format or of a newer version.
    """
    try:
        with safe_open(file, "numpy") as opened:
            metadata: Mapping[str, str] = opened.metadata() or {}
            _check_format(metadata, file)
            arrays = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118, no mapping
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} is not a whole safetensors file: {str(error).splitlines()[0]}") from None
    try:
        shapes, blocked = (json.loads(metadata[name]) for name in ("shapes", "blocked"))
        for layer, (inputs, outputs) in shapes.items():
            codes, signs = arrays.pop(f"{layer}/codes"), arrays.pop(f"{layer}/signs", None)
            arrays[f"{layer}/codes"] = _write_rows(codes, signs, inputs, outputs)
            exponents = arrays.pop(f"{layer}/exponents")
            arrays[f"{layer}/exponent"] = np.pad(exponents, (0, -outputs % TILE_OUTPUTS))
        for layer in blocked:
            kernel = arrays.pop(f"{layer}/kernel")
            matrix = kernel.reshape(-1, kernel.shape[-1])
            if kernel.dtype == np.int8:
                arrays[f"{layer}/blocks"] = write_numbers(matrix)
                scale = arrays[f"{layer}/scale"]
                arrays[f"{layer}/scale"] = np.pad(scale, (0, -len(scale) % TILE_OUTPUTS))
            else:
                arrays[f"{layer}/blocks"] = write_blocks(matrix)
    except (KeyError, ValueError, IndexError, TypeError) as error:
        raise ValueError(f"{file} does not hold what its metadata say: {error}") from None
    return jax.device_put(unflatten_dict(arrays, sep="/"))


def _check_format(metadata, file):
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{file} is not in this project's format; its format is {metadata.get('format')!r}")
    version = metadata.get("version", "")
    if not version.isdigit() or int(version) > VERSION:
        raise ValueError(
            f"{file} is of version {version!r} of the format, and this installation reads up to {VERSION}; "
            "update shiftaddvit_jax"
        )


def _read_rows(tiles: Tiles, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    """Codes and signs, or numbers of 8 bits, row by row, of what kernels read tile by tile."""
    if bits_of(tiles) == 8:
        return {"codes": read_numbers(tiles, inputs, outputs)}
    codes, negative = (part.ravel() for part in read_tiles(tiles, inputs, outputs))
    if bits_of(tiles) == 4:
        return {"codes": _join_halves(codes | (negative << 3))}
    return {"codes": _join_halves(codes), "signs": np.packbits(negative, bitorder="little")}


def _write_rows(codes, signs, inputs: int, outputs: int) -> Tiles:
    """The inverse of `_read_rows`; without ``signs``, weights have 4 bits, or 8 if they are int8."""
    if codes.dtype == np.int8:
        return write_numbers(codes)
    count = inputs * outputs
    codes = np.stack([codes & 15, codes >> 4], axis=-1).ravel()[:count]
    if signs is None:
        codes, negative = codes & 7, codes >> 3
    else:
        negative = np.unpackbits(signs, count=count, bitorder="little")
    codes, negative = (part.reshape(inputs, outputs) for part in (codes, negative))
    return write_tiles(codes, negative, 4 if signs is None else 5)


def _join_halves(numbers: UInt8[np.ndarray, "count"]) -> UInt8[np.ndarray, "half"]:
    numbers = np.pad(numbers, (0, len(numbers) % 2))
    return numbers[::2] | (numbers[1::2] << 4)
