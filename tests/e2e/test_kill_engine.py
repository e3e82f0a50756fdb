"""kill −9 of the real stages with vLLM inside; unit/inference/test_kills goes through the file operations."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.vllm
@pytest.mark.slow
def test_killed_stages_go_on_and_the_shards_are_the_same(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.e2e.kill_engine", str(tmp_path), "3", "2"],
        capture_output=True,
        text=True,
        timeout=900,
        cwd=Path(__file__).resolve().parents[2],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["killed"] == {"rollouts": 3, "scores": 2}, result
    assert result["shards"] == 24, result
    assert result["same"], result
