"""`make test` fails on a test that was skipped for a reason it could do something about."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[2]
TEST = """
import pytest

@pytest.mark.skip(reason={reason!r})
def test_that_is_skipped():
    pass
"""


@pytest.mark.parametrize(("reason", "code"), [("needs CUDA", 0), ("nobody installed Triton", 1)])
@pytest.mark.parametrize("processes", [[], ["-n1"]])
def test_an_unknown_skip_fails(tmp_path: Path, reason: str, code: int, processes: list[str]) -> None:
    (tmp_path / "conftest.py").write_text((ROOT / "tests" / "conftest.py").read_text())
    (tmp_path / "test_one.py").write_text(TEST.format(reason=reason))
    command = [sys.executable, "-m", "pytest", "-q", "--only-known-skips", *processes, "."]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}  # conftest.py imports from tests
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == code, done.stdout + done.stderr
    assert ("tests that should have run" in done.stdout) == bool(code)
