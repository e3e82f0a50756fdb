"""The step as CUDA runs it, on a device without numbers: see `fake_device.py`.

What it cannot show is what a kernel computes; a tensor left on the CPU, a dtype or a shape that only the CUDA
branches have, and a wait for the device that nobody meant to add, it does.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

READS = {
    "of",
    "finalize_model_grads",
    "_apply_rotary_pos_emb_thd",
    "step_with_ready_grads",
    "has_grad_norm_group",
}
"""Functions that may wait for the device: the trained rows are counted once a micro-batch; Megatron-Core's
rotary embedding without Transformer Engine reads the lengths in every layer, for queries and keys; torch's
AdamW reads its step on a device that it does not know, on CUDA it does not; Megatron-Core 0.19 asks once, and
keeps the answer, which groups of gradients have a norm of their own."""


@pytest.mark.dist
def test_a_wide_step_keeps_to_one_device() -> None:
    command = [sys.executable, "-W", "ignore", "-m", "tests.distributed.fake_device"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert result.returncode == 0, result.stderr[-3000:]
    reads = json.loads(result.stdout.splitlines()[-1])
    print(reads)
    assert len(reads) == 2
    for name, counts in reads.items():
        assert {read.split(" ")[2] for read in counts} <= READS, (name, counts)
