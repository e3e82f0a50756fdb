"""NeMo-Run's two executors run the whole tiny chain, and a failure is one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.conftest import ODD_SITE, RECIPE, ROOT
from tests.slurm.lab import SlurmLab

LAUNCH = ["python", "-m", "lopd_megatron.launch", "--recipe", RECIPE]
TENSOR_1, PIPELINE_1 = (f"parallel.{kind}_model_parallel_size=1" for kind in ("tensor", "pipeline"))


def assert_ran(run: Path) -> None:
    """Every stage has left its product: two rollout shards of two workers, an export and an accuracy."""
    for product in ("prompts", "rollouts", "scored"):
        assert (run / product / "shard-00001.json").exists(), product
    assert (run / "hf/model.safetensors").exists()
    assert len(list((run / "evaluation").glob("*.json"))) == 1


def test_the_slurm_executor_runs_the_chain(lab: SlurmLab, tiny: Path) -> None:
    """Two nodes train, two tasks roll out."""
    run = tiny / "nemo_slurm"
    overrides = ["name=nemo", f"run_dir={run}", "train.train_iters=3", TENSOR_1]
    command = [*LAUNCH, "--executor=slurm", *overrides]
    result = lab.run(command, cwd=ROOT, env=ODD_SITE, timeout_s=900, check=False)
    assert result.returncode == 0, result.stdout
    assert_ran(run)
    assert (run / "logs/nemorun/experiments").exists()  # and not in the home folder
    assert "on 2 rank(s)" in "".join(
        path.read_text() for path in run.glob("logs/nemorun/experiments/nemo/*/nemo-train/log-*")
    )


def test_the_local_executor_runs_the_chain_of_a_factory(lab: SlurmLab, tiny: Path) -> None:
    """By NeMo-Run's own command line, where every recipe is a factory. Two workers take turns to roll out."""
    run, task = tiny / "nemo_local", tiny / "task"
    files = [
        f"run_dir={run}",
        f"model.student={task}/student_init",
        f"model.teacher={task}/teacher_init",
        f"prompts.input=[{task}/prompts/opd.jsonl]",
        f"evaluation.input=[{task}/problems/test.jsonl]",
    ]
    sizes = ["prompts.contamination_files=[]", "prompts.num_shards=2", "launch.stages.rollouts.array=2"]
    sizes += ["data.seq_length=256", "train.train_iters=3", "train.global_batch_size=8", TENSOR_1, PIPELINE_1]
    command = ["python", "-m", "lopd_megatron.launch.nemo_run", "--factory", "tiny_lightning_opd", "--yes"]
    result = lab.run(
        [*command, f"overrides={' '.join([*files, *sizes])}"], cwd=ROOT, timeout_s=900, check=False
    )
    assert result.returncode == 0, result.stdout
    assert_ran(run)
    assert (run / "logs/nemorun/experiments").exists()  # and not in the home folder


@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_a_failed_stage_fails_the_launch(lab: SlurmLab, tiny: Path, executor: str) -> None:
    """NeMo-Run itself ends with 0, its local executor would go on, and its retries know no exit codes."""
    name = f"nemo_{executor}_failed"
    broken = [f"name={name}", f"run_dir={tiny}/{name}", f"prompts.input=[{tiny}/nothing.jsonl]"]
    command = [*LAUNCH, "--stages=prompts,rollouts", f"--executor={executor}", *broken]
    result = lab.run(command, cwd=ROOT, timeout_s=600, check=False)
    assert result.returncode == 1, result.stdout
    assert f"{name}-prompts: FAILED" in result.stdout
    assert not (tiny / name / "rollouts").exists()
    if executor == "slurm":
        assert f"{name}-rollouts-1: CANCELLED" in result.stdout
        (log,) = tiny.glob(f"{name}/logs/nemorun/experiments/*/*/{name}-prompts/sbatch_*.out")
        assert "wrong input (exit code 2): not tried again" in log.read_text()
