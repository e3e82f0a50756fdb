"""kill −9 at any moment: the same command goes on, and the files come out as if nothing had happened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.processes

POINTS = 60


def test_kills_at_random_file_operations(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.unit.rollouts.kill_points", str(tmp_path), str(POINTS)],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=Path(__file__).resolve().parents[3],
    )
    assert run.returncode == 0, run.stderr[-2000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["killed"] == POINTS, result
    assert result["wrong"] == [], result
    assert result["leases_left"] == 0, result
