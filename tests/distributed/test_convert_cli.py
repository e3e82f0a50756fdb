"""`tools/convert_checkpoint.py` as a user runs it; e2e/test_pipeline verifies an export that is right."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lopd_megatron.model.verify import differing_tensors
from tests.distributed.tiny_hf import save_model

ROOT = Path(__file__).resolve().parents[2]


def convert(*arguments: str | Path) -> tuple[int, str]:
    """(exit code, what was printed)."""
    result = subprocess.run(
        [sys.executable, "-W", "ignore", ROOT / "tools/convert_checkpoint.py", *map(str, arguments)],
        capture_output=True,
        text=True,
    )
    return result.returncode, result.stdout + result.stderr


@pytest.mark.dist
def test_import_export_verify_and_refusals(tmp_path: Path) -> None:
    hf, checkpoint, out = tmp_path / "hf", tmp_path / "checkpoint", tmp_path / "out"
    save_model("qwen3_moe", hf)
    (hf / "tokenizer_config.json").write_text("{}")

    assert convert("import", "--hf", hf, "--checkpoint", checkpoint)[0] == 0
    assert convert("export", "--checkpoint", checkpoint, "--hf", hf, "--output", out)[0] == 0
    assert (out / "tokenizer_config.json").is_file()
    assert differing_tensors(hf, out) == []

    code, text = convert("export", "--checkpoint", checkpoint, "--hf", hf, "--output", out)
    assert (code, "is not empty" in text, "Traceback" in text) == (2, True, False), text

    weights = load_file(out / "model.safetensors")
    weights["model.layers.2.self_attn.v_proj.weight"][:16] *= 2  # one value head of one layer
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    code, text = convert("verify", "--hf", out, "--checkpoint", checkpoint)
    assert (code, "DIFFERENT" in text) == (1, True), text
