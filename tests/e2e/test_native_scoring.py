"""The native path, which GPUs use, on a CPU: see `native_scoring`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TRITON = Path(sys.prefix) / "triton-interpreter"


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.skipif(
    not (TRITON / "triton").is_dir(),
    reason="no Triton interpreter beside the environment; `make triton-interpreter` installs it (1 GB)",
)
def test_native_scores_equal_transformers_and_the_other_paths(tmp_path: Path) -> None:
    run = subprocess.run(
        [sys.executable, "-m", "tests.e2e.native_scoring", str(tmp_path / "model")],
        capture_output=True,
        text=True,
        timeout=600,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(TRITON), "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    result = json.loads(run.stdout.splitlines()[-1])
    assert result["model_runner"] == "v2"
    assert result["chosen"] == "native"
    assert result["chosen_topk"] == "flat"
    for path in ("native", "flat", "stock"):
        assert result[path] < 1e-4, result  # rounding; see test_inference
