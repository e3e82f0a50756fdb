"""NeMo-Run on a real Slurm runs the whole tiny chain, and a failure is one.

Its local executor does so in e2e/test_pipeline.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.conftest import ODD_SITE, RECIPE, ROOT
from tests.slurm.lab import SlurmLab

LAUNCH = ["python", "-m", "lopd_megatron", "run", RECIPE]


def test_the_slurm_executor_runs_the_chain(lab: SlurmLab, tiny: Path) -> None:
    """Two nodes train, two tasks roll out."""
    run = tiny / "nemo_slurm"
    overrides = [
        "name=nemo",
        f"run_dir={run}",
        "train.train_iters=3",
        "parallel.tensor_model_parallel_size=1",
    ]
    command = [*LAUNCH, "--on=nemo", *overrides]
    result = lab.run(command, cwd=ROOT, env=ODD_SITE, timeout_s=900, check=False)
    assert result.returncode == 0, result.stdout
    for product in ("prompts", "rollouts", "scores"):
        assert (run / product / "shard-00001.json").exists(), product
    assert (run / "hf/model.safetensors").exists()
    assert len(list((run / "evaluation").glob("*.json"))) == 1
    assert (run / "logs/nemorun/experiments").exists()  # and not in the home folder
    assert "on 2 rank(s)" in "".join(
        path.read_text() for path in run.glob("logs/nemorun/experiments/nemo/*/nemo-train/log-*")
    )


@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_a_failed_stage_fails_the_launch(lab: SlurmLab, tiny: Path, executor: str) -> None:
    """NeMo-Run itself ends with 0, its local executor would go on, and its retries know no exit codes."""
    name = f"nemo_{executor}_failed"
    broken = [f"name={name}", f"run_dir={tiny}/{name}", f"prompts.input=[{tiny}/nothing.jsonl]"]
    command = [
        *LAUNCH,
        "--stages=prompts,rollouts",
        "--on=nemo" if executor == "slurm" else "--on=nemo-local",
        *broken,
    ]
    result = lab.run(command, cwd=ROOT, timeout_s=600, check=False)
    assert result.returncode == 1, result.stdout
    assert f"{name}-prompts: FAILED" in result.stdout
    assert not (tiny / name / "rollouts").exists()
    if executor == "slurm":
        assert f"{name}-rollouts-1: CANCELLED" in result.stdout
        (log,) = tiny.glob(f"{name}/logs/nemorun/experiments/*/*/{name}-prompts/sbatch_*.out")
        assert "wrong input (exit code 2): not tried again" in log.read_text()
