"""The command line of `tools/convert_checkpoint.py`; e2e/test_pipeline runs it as a process of its own."""

from __future__ import annotations

import contextlib
import io
import runpy
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from lopd_megatron.model.verify import differing_tensors
from tests.distributed.tiny_hf import save_model
from tests.distributed.world import ROOT, run_world


def run_tool(arguments: list[str]) -> tuple[int, str]:
    sys.argv = ["convert_checkpoint.py", *arguments]
    output = io.StringIO()
    with (
        contextlib.redirect_stdout(output),
        contextlib.redirect_stderr(output),
        pytest.raises(SystemExit) as leave,
    ):
        runpy.run_path(str(ROOT / "tools/convert_checkpoint.py"), run_name="__main__")
    return int(leave.value.code or 0), output.getvalue()


def convert(*arguments: str | Path) -> tuple[int, str]:
    """(exit code, what was printed), of the program in a process that has imported torch before."""
    return run_world(run_tool, 1, [str(argument) for argument in arguments])[0]


@pytest.mark.dist
def test_import_export_verify_and_refusals(tmp_path: Path) -> None:
    hf, checkpoint, out = tmp_path / "hf", tmp_path / "checkpoint", tmp_path / "out"
    save_model("qwen3_moe", hf)
    companions = (
        "tokenizer_config.json",
        "chat_template.jinja",
        "LICENSE",
        "additional_chat_templates/a.jinja",
    )
    for name in companions:
        (hf / name).parent.mkdir(exist_ok=True)
        (hf / name).write_text("{}")
    (hf / "README.md").write_text("of another model")

    assert convert("import", "--hf", hf, "--checkpoint", checkpoint)[0] == 0
    assert convert("export", "--checkpoint", checkpoint, "--hf", hf, "--output", out)[0] == 0
    assert [(out / name).read_text() for name in companions] == ["{}"] * 4
    assert not (out / "README.md").exists()
    assert differing_tensors(hf, out) == []

    code, text = convert("verify", "--hf", out, "--checkpoint", checkpoint)
    assert (code, "SAME: max |logit difference|" in text) == (0, True), text

    code, text = convert("export", "--checkpoint", checkpoint, "--hf", hf, "--output", out)
    assert (code, "is not empty" in text, "Traceback" in text) == (2, True, False), text

    weights = load_file(out / "model.safetensors")
    weights["model.layers.2.self_attn.v_proj.weight"][:16] *= 2  # one value head of one layer
    save_file(weights, out / "model.safetensors", metadata={"format": "pt"})
    code, text = convert("verify", "--hf", out, "--checkpoint", checkpoint)
    assert (code, "DIFFERENT" in text) == (1, True), text

    for said in ("model.safetensors was changed", "is already the export of"):
        code, text = convert("export", "--checkpoint", checkpoint, "--hf", hf, "--output", out, "--overwrite")
        assert (code, said in text) == (0, True), text
    assert differing_tensors(hf, out) == []
