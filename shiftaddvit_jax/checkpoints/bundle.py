"""A bundle: a folder with all that a model needs to answer on another machine.

- ``config.json``: the model's arguments, the names of its classes, the pixels that it expects.
- ``model.safetensors``: its weights, see `shiftaddvit_jax.checkpoints.canonical`.
- ``kernels/TARGET/``: compiled kernels for the kinds of CPU or GPU that were asked for, and in
  ``kernels/runtime/`` what those for CPUs call of Apache TVM (Apache License 2.0): no compiler is needed.
- ``program.stablehlo``: the model as a program of `jax.export` for CPUs, for any number of images, that
  calls the kernels.
- ``model.onnx``: the model for other runtimes.
- ``manifest.json``: the format's version, and the digest of every other file.

The first two and the last are always there. Kernels and programs are machine code: run those that you trust.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict
from jax import export
from jaxtyping import PyTree

from kernels_tvm import store
from kernels_tvm.cpu import library
from kernels_tvm.cpu.compiled import RUNTIME, choose
from kernels_tvm.cpu.targets import named_target, thread_count
from kernels_tvm.gpu.targets import gpu_target
from shiftaddvit_jax.checkpoints.canonical import read_canonical, write_canonical
from shiftaddvit_jax.compile import check_compiler, export_kernels, kernels_of, write_kernels
from shiftaddvit_jax.files import check_digests, file_digests, read_object, whole_folder, write_json
from shiftaddvit_jax.models import Preprocessing, create_model, model_arguments
from shiftaddvit_jax.nn.kernels import is_packed
from shiftaddvit_jax.ops.implementation.custom_call import portable_calls, provide_kernels, register_provided
from shiftaddvit_jax.optional import how_to_install, require
from shiftaddvit_jax.pack import pack, packed_shapes

FORMAT, VERSION = "shiftaddvit bundle", 1
MANIFEST, CONFIG, WEIGHTS, PROGRAM, ONNX = (
    "manifest.json",
    "config.json",
    "model.safetensors",
    "program.stablehlo",
    "model.onnx",
)
MODEL_TYPE = "shiftaddvit"
CUDA = "cuda-"


def write_portable(folder: Path, model: nn.Module, variables: PyTree, about: Mapping[str, Any]) -> None:
    """Write ``config.json`` and ``model.safetensors`` into a folder: a model in the canonical packed format.

    Args:
      folder: where they go.
      model: from `create_model` or `reparameterize`.
      variables: its variables, packed or not.
      about: ``class_names`` and ``preprocessing``, and what else is known, in types that JSON can hold.

    Raises:
      ValueError: weights that can't be packed, see `shiftaddvit_jax.pack`.
    """
    config = {"model_type": MODEL_TYPE, "version": VERSION, "model": model_arguments(model), **about}
    write_canonical(folder / WEIGHTS, model, variables)
    write_json(folder / CONFIG, config)


def read_portable(folder: Path) -> tuple[nn.Module, PyTree, dict[str, Any]]:
    """What `write_portable` wrote: model, packed variables, and what is known of it.

    Raises:
      ValueError: a file that is missing, damaged, of another format or of a newer version, or weights that
        are not the model's.
    """
    model, variables, about = _read_portable(folder)
    trees: list[dict[str, Any]] = [flatten_dict(tree, sep="/") for tree in (variables, packed_shapes(model))]
    found, expected = ({name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()} for leaves in trees)
    different = sorted(name for name in found | expected if found.get(name) != expected.get(name))
    if different:
        raise ValueError(
            f"{folder / WEIGHTS} does not hold what {CONFIG} describes: {different[0]} is missing or of "
            "another shape or dtype"
        )
    return model, variables, about


def _read_portable(folder):
    try:
        config = json.loads((folder / CONFIG).read_text())
        if config.get("model_type") != MODEL_TYPE:
            raise ValueError(f"its model_type is {config.get('model_type')!r}, not {MODEL_TYPE!r}")
        _check_version(config.pop("version"), folder / CONFIG)
        del config["model_type"]
        model = create_model(**config.pop("model"))
        Preprocessing.from_dict(config["preprocessing"])
    except OSError as error:
        raise ValueError(f"{folder / CONFIG} can't be read: {error.strerror}") from None
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(f"{folder / CONFIG} does not describe a model: {error}") from None
    return model, read_canonical(folder / WEIGHTS), config


def export_bundle(
    folder: str | Path,
    model: nn.Module,
    variables: PyTree,
    about: Mapping[str, Any],
    *,
    targets: Sequence[str] = (),
    threads: int | None = None,
    stablehlo: bool = False,
    onnx: bool = False,
) -> dict[str, Any]:
    """Write a bundle, whole or not at all, and return its manifest.

    Args:
      folder: the bundle; an existing one is replaced.
      model: from `create_model` or `reparameterize`.
      variables: its variables, packed or not.
      about: ``class_names`` and ``preprocessing``, and what else is known, in types that JSON can hold.
      targets: for what to compile kernels: CPUs of `kernels_tvm.cpu.targets`, such as ``"avx2"``, and GPUs,
        such as ``"cuda-sm_86"``. This takes up to a minute for each, with a progress bar.
      threads: how many share a CPU kernel's work; by default as many as here.
      stablehlo: whether to write the program, which saves tracing the model.
      onnx: whether to write ``model.onnx``.

    Raises:
      ValueError: an unknown target, no compiler, something else in the folder, or a model that can't be
        written.
    """
    folder = Path(folder).resolve()
    if folder.exists() and any(folder.iterdir()) and not (folder / MANIFEST).is_file():
        raise ValueError(f"{folder} exists and is not a bundle; choose another folder")
    gpus = [gpu_target(name.removeprefix(CUDA)) for name in targets if name.startswith(CUDA)]
    cpus = [named_target(name) for name in targets if not name.startswith(CUDA)]
    if targets:
        check_compiler()
    threads = threads or thread_count()
    if not is_packed(variables["params"]):
        variables = pack(model, variables)
    manifest: dict[str, Any] = {"format": FORMAT, "version": VERSION}
    with whole_folder(folder) as temporary:
        write_portable(temporary, model, variables, about)
        if cpus:
            manifest["kernels"] = write_kernels(temporary, kernels_of(model), cpus, threads)
        for target in gpus:
            export_kernels(model, target, temporary / "kernels" / f"{CUDA}{target.name}")
        if stablehlo:
            program, calls = _program(model, variables, with_kernels=bool(cpus))
            (temporary / PROGRAM).write_bytes(program)
            manifest["program"] = {"calls": calls}
        if onnx:
            from shiftaddvit_jax.checkpoints.to_onnx import save_onnx

            save_onnx(model, variables, temporary / ONNX)
        manifest["files"] = file_digests(temporary)
        write_json(temporary / MANIFEST, manifest)
    return manifest


def is_bundle(folder: Path) -> bool:
    """Whether ``folder`` is a bundle, of whatever version, whole or not."""
    try:
        is_named = read_object(folder / MANIFEST).get("format") == FORMAT
    except OSError:
        return False
    except ValueError:
        is_named = False
    return is_named or is_portable(folder)


def is_portable(folder: Path) -> bool:
    """Whether ``folder`` holds what `write_portable` writes."""
    try:
        return read_object(folder / CONFIG).get("model_type") == MODEL_TYPE
    except (OSError, ValueError):
        return False


def open_bundle(folder: Path) -> tuple[nn.Module, PyTree, dict[str, Any], Callable | None, tuple[str, ...]]:
    """Model, packed variables, what is known of it, the program or None, and notes on its kernels.

    Kernels that suit this machine are made ready to run, unless other versions of this project or of what
    they call made them; a note says so.

    Raises:
      ValueError: a file that is missing or not what was written, another format, or a newer version.
    """
    folder = folder.absolute()
    try:
        manifest = json.loads((folder / MANIFEST).read_text())
    except OSError as error:
        raise ValueError(f"{folder / MANIFEST} can't be read: {error.strerror}") from None
    except ValueError:
        raise ValueError(f"{folder / MANIFEST} is not whole; copy the bundle again") from None
    if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
        raise ValueError(f"{folder} is not a bundle of this project: its manifest has another format")
    _check_version(manifest.get("version"), folder)
    files = manifest.get("files")
    if not isinstance(files, dict) or not {CONFIG, WEIGHTS} <= set(files):
        raise ValueError(f"{folder / MANIFEST} is not whole; copy the bundle again")
    check_digests(folder, files)
    model, variables, about = _read_portable(folder)
    try:
        notes = _provide(folder, manifest.get("kernels"), files)
        calls = manifest.get("program", {}).get("calls", [])
    except (KeyError, TypeError, AttributeError):
        raise ValueError(f"{folder / MANIFEST} is not whole; copy the bundle again") from None
    if jax.default_backend() == "gpu":
        for path in (folder / "kernels").glob(f"{CUDA}*/*.so"):
            store.adopt(path)
    program = None
    if PROGRAM in files and jax.default_backend() == "cpu" and all(map(library.is_provided, calls)):
        for key in calls:
            register_provided(key)
        program = export.deserialize(bytearray((folder / PROGRAM).read_bytes())).call
    return model, variables, about, program, notes


def _check_version(version, where):
    if not isinstance(version, int) or version > VERSION:
        raise ValueError(
            f"{where} is of version {version} of the format, and this installation reads up to {VERSION}; "
            "update shiftaddvit_jax"
        )


def _provide(folder, kernels, files):
    """Make a bundle's CPU kernels ready for this machine, if any suit it; notes on why not."""
    if not kernels or jax.default_backend() != "cpu":
        return ()
    if find_spec("jax_tvm_ffi") is None:
        return (f"the bundle's kernels are not used: {how_to_install('export')} brings what calls them",)
    try:
        libraries, threads = choose([kernels])
    except ValueError as reason:
        return (f"the bundle's kernels are not used: {reason}",)
    libraries = {key: folder / path for key, path in libraries.items() if path in files}
    provide_kernels(libraries, threads, folder / RUNTIME)
    return ()


def _program(model, variables, with_kernels):
    """The serialized program for any number of images, and the keys of the kernels that it calls."""
    require("export", "writing a program of jax.export", "flatbuffers")
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), variables)
    (batch,) = export.symbolic_shape("batch")
    side = model.image_size
    images = jax.ShapeDtypeStruct((batch, side, side, 3), jnp.float32)
    if not with_kernels:
        model = model.clone(primitives=dataclasses.replace(model.primitives, implementation="xla"))
    with portable_calls() as kernels:
        # Twice: which calls are allowed is asked for before tracing.
        jax.eval_shape(lambda *arguments: model.apply(*arguments), shapes, images)
        checks = [export.DisabledSafetyCheck.custom_call(name) for name in kernels]
        exported = export.export(
            jax.jit(lambda *arguments: model.apply(*arguments)), platforms=("cpu",), disabled_checks=checks
        )(shapes, images)
    return bytes(exported.serialize()), [kernel.key for kernel in kernels.values()]
