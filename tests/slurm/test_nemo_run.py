"""NeMo-Run's executors with the real trainer and export, on the dataset that the chain has made."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.slurm.conftest import RECIPE, ROOT, Chain
from tests.slurm.lab import SlurmLab

ONE_PROCESS = [
    "launch.stages.train.nodes=1",
    "parallel.tensor_model_parallel_size=1",
    "parallel.pipeline_model_parallel_size=1",
]


def arguments(executor: str, tiny: Path, name: str) -> list[str]:
    program = ["python", "-m", "lopd_megatron.launch", "--recipe", RECIPE, "--executor", executor]
    data = f"data.prefixes=[{tiny}/opd/dataset/train]"
    return [
        *program,
        "--stages=train,export",
        f"name={name}",
        f"run_dir={tiny}/{name}",
        data,
        "train.train_iters=3",
    ]


@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_an_executor_runs_the_chain(lab: SlurmLab, chain: Chain, tiny: Path, executor: str) -> None:
    name = f"nemo_{executor}"
    layout = ONE_PROCESS if executor == "local" else ["parallel.tensor_model_parallel_size=1"]
    result = lab.run([*arguments(executor, tiny, name), *layout], cwd=ROOT, timeout_s=600, check=False)
    assert result.returncode == 0, result.stdout
    assert (tiny / name / "hf/model.safetensors").exists()


@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_a_failed_stage_fails_the_launch(lab: SlurmLab, chain: Chain, tiny: Path, executor: str) -> None:
    """NeMo-Run itself ends with 0, and its local executor would go on to the export."""
    name = f"nemo_{executor}_failed"
    broken = [f"model.student={tiny}/nothing", "launch.max_restarts=0", "launch.max_retries=0"]
    result = lab.run(
        [*arguments(executor, tiny, name), *ONE_PROCESS, *broken], cwd=ROOT, timeout_s=600, check=False
    )
    assert result.returncode == 1, result.stdout
    assert f"{name}-train: FAILED" in result.stdout
    assert not (tiny / name / "hf").exists()


def test_every_recipe_is_a_factory_of_nemo_runs_own_command_line(lab: SlurmLab, tiny: Path) -> None:
    run = tiny / "factory"
    overrides = f"run_dir={run} prompts.input=[{tiny}/task/prompts/opd.jsonl] prompts.contamination_files=[]"
    overrides += f" model.student={tiny}/task/student_init"
    command = ["python", "-m", "lopd_megatron.launch.nemo_run", "--factory", "tiny_lightning_opd", "--yes"]
    result = lab.run([*command, "stages=prompts", f"overrides={overrides}"], cwd=ROOT, timeout_s=300)
    assert (run / "prompts/shard-00000.json").exists(), result.stdout
