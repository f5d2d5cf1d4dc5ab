"""Files that are whole or absent: below every floor that writes."""

import json
import os
from pathlib import Path
from typing import Any


def write_json(file: Path, value: Any) -> None:
    """Write ``value`` as JSON under a temporary name, then rename it into place."""
    temporary = file.with_name(f".{file.name}.new")
    temporary.write_text(json.dumps(value, indent=2) + "\n")
    os.replace(temporary, file)
