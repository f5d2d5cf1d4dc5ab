"""Finds the weights that others wrote: a file, a folder, or a repository of the Hub."""

import logging
import re
from pathlib import Path

from shiftaddvit_jax.checkpoints.weights import first_line, weight_map

logger = logging.getLogger(__name__)

# What a folder or repository is searched for, in this order.
FILES = (
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
    "pytorch_model.bin.index.json",
)
# What is downloaded with them where a repository has it: what model they are, and what pixels it expects.
DESCRIPTIONS = ("config.json", "preprocessor_config.json")
# The same as a variant writes them, such as model.fp16.safetensors.
_VARIANTS = (
    "model.*.safetensors",
    "model.safetensors.index.*.json",
    "pytorch_model.*.bin",
    "pytorch_model.bin.index.*.json",
)
_SUFFIXES = (".safetensors", ".bin", ".pth", ".pt", ".ckpt", ".npz", ".tar")
_SHARD = re.compile(r"(?P<stem>.+)-\d{5}-of-(?P<count>\d{5})(?P<suffix>\.safetensors|\.bin)")


def find_weights(path_or_name: str | Path) -> Path:
    """The file that ``path_or_name`` stands for, downloaded if need be: weights, or the index of shards.

    Args:
      path_or_name: a file; a folder, whose ``model.safetensors`` is taken before its ``pytorch_model.bin``,
        and one file before shards; or a name to download, ``hf:ORG/NAME`` or ``timm:NAME``.

    Raises:
      ValueError: nothing there, one shard of several, or a repository that cannot be downloaded.
    """
    name = str(path_or_name)
    for prefix, repository in (("hf:", "{}"), ("timm:", "timm/{}")):
        if name.startswith(prefix):
            return _download(repository.format(name.removeprefix(prefix)))
    try:
        path = Path(path_or_name).expanduser()
        if path.is_file():
            return _not_one_shard(path)
        if path.is_dir():
            return _in_folder(path)
    except (OSError, RuntimeError) as error:
        raise ValueError(f"{name} cannot be read: {first_line(error)}") from None
    raise ValueError(
        f"no file or folder {name}; to download weights, write hf:ORG/NAME or timm:NAME: those of "
        "`shiftaddvit models --pretrained`"
    )


def _not_one_shard(path: Path) -> Path:
    found = _SHARD.fullmatch(path.name)
    if found is None or int(found["count"]) == 1:
        return path
    index = path.with_name(f"{found['stem']}{found['suffix']}.index.json")
    whole = index if index.is_file() else f"the folder with all of them and {index.name}"
    raise ValueError(f"{path} is one of {int(found['count'])} shards; name {whole} instead")


def _in_folder(folder: Path) -> Path:
    for file in FILES:
        if (folder / file).is_file():
            return folder / file
    for pattern in _VARIANTS:
        # Shards of a variant are in its index.
        found = [file for file in sorted(folder.glob(pattern)) if not _SHARD.fullmatch(file.name)]
        if len(found) == 1:
            logger.info("%s has no other weights than %s", folder, found[0].name)
            return found[0]
        if found:
            names = ", ".join(file.name for file in found)
            raise ValueError(f"{folder} has several variants, {names}; name one of these files")
    if (folder / "model.json").is_file() and (folder / "variables").is_dir():
        raise ValueError(f"{folder} is a checkpoint of this package; read it by load_model")
    others = sorted(file.name for file in folder.iterdir() if file.suffix in _SUFFIXES)
    shards = [file for file in others if _SHARD.fullmatch(file)]
    if shards:
        raise ValueError(f"{folder} has shards, such as {shards[0]}, but no index of them; add {FILES[1]}")
    has = f"; it has {', '.join(others[:4])}" if others else ""
    raise ValueError(
        f"{folder} has neither model.safetensors nor pytorch_model.bin{has}, and is no checkpoint of this "
        "project either; name another folder, or the file itself"
    )


def _download(repository: str) -> Path:
    """The weights of a repository on the Hub, in a folder with what describes them."""
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import (
        EntryNotFoundError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        RepositoryNotFoundError,
    )

    missing = []

    def get(file):
        try:
            # Where there was no connection, the next file is not waited for again.
            return Path(hf_hub_download(repository, file, local_files_only=bool(missing)))
        except LocalEntryNotFoundError:
            missing.append(file)
            return None
        except RepositoryNotFoundError:
            raise ValueError(f"there is no public repository {repository}; check its spelling") from None
        except EntryNotFoundError:
            return None
        except (HfHubHTTPError, HFValidationError, OSError) as error:
            raise ValueError(f"cannot download {repository}: {first_line(error)}") from None

    for file in FILES:
        path = get(file)
        if path is None:
            continue
        if path.suffix == ".json":
            for shard in dict.fromkeys(weight_map(path).values()):
                if get(shard) is None:
                    raise ValueError(f"{repository} lacks {shard}, which its {file} names; ask its publisher")
        for beside in DESCRIPTIONS:
            get(beside)
        return path
    if missing:
        raise ValueError(
            f"cannot download {repository}: no connection to the Hub, and the cache does not have it; "
            "download it elsewhere and name the folder"
        )
    raise ValueError(
        f"{repository} has neither model.safetensors nor pytorch_model.bin; download another file of it and "
        "name that"
    )
