"""One Slurm for the whole folder, and short ways to submit to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.lab import SlurmLab, missing

ROOT = Path(__file__).resolve().parents[2]
RECIPE = "tests/slurm/recipe.py:opd"
ODD_SITE = {
    "SBATCH_EXPORT": "NONE",  # nothing reaches a job or its steps
    "SLURM_EXPORT_ENV": "NONE",
    "SLURM_JOB_ID": "77",  # submitted from inside another job, a requeued array job with GPUs
    "SLURM_GPUS_PER_NODE": "2",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_RESTART_COUNT": "99",
}


@pytest.fixture(scope="session")
def lab() -> Iterator[SlurmLab]:
    if absent := missing():
        pytest.skip(
            f"needs the Debian package of Slurm ({', '.join(absent)} not found); `make system` installs it"
        )
    with SlurmLab() as running:
        # The jobs find this test's Python, whatever the checkout's .venv is.
        running.env["PATH"] = f"{Path(sys.executable).parent}:{running.env['PATH']}"
        running.env |= {"LOPD_VENV": "/nonexistent", "LOPD_HEALTH_CHECK": "0", "OMP_NUM_THREADS": "1"}
        running.env["SLURM_TIME_FORMAT"] = "%s"
        yield running


Submit = Callable[..., str]


@pytest.fixture
def submit(lab: SlurmLab, tmp_path: Path) -> Submit:
    """`submit("train", "bash", "-c", "exit 3", options=[...], retries=1)` → job id."""

    def call(
        stage: str, *command: str, options: tuple[str, ...] = (), restarts: int = 8, retries: int = 1
    ) -> str:
        environment = {
            "LOPD_LOGS": str(tmp_path / "logs"),
            "LOPD_MAX_RESTARTS": str(restarts),
            "LOPD_MAX_RETRIES": str(retries),
        }
        batch = ["sbatch", "--parsable", f"--output={tmp_path}/%x-%A_%a.batch.log", *options]
        result = lab.run([*batch, f"slurm/{stage}.sbatch", *command], cwd=ROOT, env=environment)
        return result.stdout.strip()

    return call


@pytest.fixture(scope="session")
def tiny(lab: SlurmLab, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the tiny task; the recipe in recipe.py writes below it."""
    folder = tmp_path_factory.mktemp("tiny")
    lab.env["LOPD_TINY"] = str(folder)
    sizes = [
        f"--{name}-{kind}={count}"
        for name, kind, count in (
            ("teacher", "samples", 64),
            ("base", "samples", 64),
            ("sft", "prompts", 4),
            ("opd", "prompts", 16),
        )
    ]
    make = ["python", "tools/make_tiny_task.py", f"--output={folder}/task", "--problems=4", *sizes]
    lab.run(make, cwd=ROOT, timeout_s=300)
    return folder


Chain = dict[str, dict[str, str]]


@pytest.fixture(scope="session")
def chain(lab: SlurmLab, tiny: Path) -> Chain:
    """The tiny chain, run once by slurm/pipeline.sh: stage → record of its job."""
    submitted = lab.run(
        ["slurm/pipeline.sh", "--recipe", RECIPE],
        cwd=ROOT,
        env={"LOPD_HEALTH_CHECK": "1", **ODD_SITE},
        timeout_s=300,
    )
    jobs = dict(line.split() for line in submitted.stdout.splitlines() if line.startswith("opd-"))
    return {name.removeprefix("opd-"): lab.wait(job, 900) for name, job in jobs.items()}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.slurm)
