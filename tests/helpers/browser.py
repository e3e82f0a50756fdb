"""A real browser without a way out to a network."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
needs_browser = pytest.mark.skipif(
    BROWSER is None, reason="needs the Debian package chromium; `make system` installs it"
)


def browse(folder: Path, *arguments: str) -> str:
    """Run the browser; what it printed. A script error, a failed and a refused load fail the test."""
    command = [BROWSER or "", "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
    command += [
        "--proxy-server=127.0.0.1:9",
        "--enable-logging=stderr",
        f"--user-data-dir={folder / 'profile'}",
    ]
    done = subprocess.run([*command, *arguments], capture_output=True, text=True, timeout=180, check=True)
    assert not re.search(r"CONSOLE|Refused|ERR_", done.stderr), done.stderr
    return done.stdout
