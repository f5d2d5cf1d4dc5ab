"""A real browser without a window, for tests of pages."""

import shutil
import subprocess
from pathlib import Path

import pytest

NAMES = ("chromium", "chromium-browser", "google-chrome")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--enable-logging=stderr",
)


def open_page(page: Path, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Open a file in the browser, with a new profile in ``folder``; its output is the browser's."""
    binary = next(filter(None, map(shutil.which, NAMES)), None)
    if binary is None:
        pytest.skip(f"there is no browser here: none of {', '.join(NAMES)}")
    command = [binary, *FLAGS, f"--user-data-dir={folder}/profile", *arguments, page.as_uri()]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
