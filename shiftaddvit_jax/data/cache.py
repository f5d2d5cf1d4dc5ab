"""What was found out about data sets, kept between runs for the owner alone; never trusted to be whole."""

import hashlib
import json
import logging
import os
import tempfile
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where it is kept: $XDG_CACHE_HOME/shiftaddvit_jax/data, by default in ~/.cache."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "shiftaddvit_jax" / "data"


def recall(kind: str, of: str | Path) -> Any:
    """What `remember` kept of a file or folder, None if there is nothing or it is damaged."""
    try:
        return json.loads(_file(kind, of).read_bytes())
    except (OSError, ValueError):
        return None


def remember(kind: str, of: str | Path, value: Any) -> None:
    """Keep ``value``, which JSON can hold, of a file or folder; if that fails, the log says so."""
    file = _file(kind, of)
    try:
        file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        handle, temporary = tempfile.mkstemp(dir=file.parent)  # of its own: hosts may share the folder
        with open(handle, "w") as out:
            json.dump(value, out, separators=(",", ":"))
        os.replace(temporary, file)
    except OSError as error:
        logger.warning("%s cannot be written (%s); %s is read at every start", file, error.strerror, of)


def _file(kind, of):
    name = hashlib.sha256(os.fsencode(os.path.realpath(of))).hexdigest()[:32]
    return cache_folder() / f"{kind}-{name}.json"
