"""One Slurm for the whole folder, and short ways to submit to it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.slurm.lab import SlurmLab, missing

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="session")
def lab() -> Iterator[SlurmLab]:
    if absent := missing():
        pytest.skip(
            f"no Slurm here ({', '.join(absent)} not found); tools/install_system_packages.sh brings it"
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


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = os.path.dirname(__file__)
    for item in items:
        if str(item.path).startswith(here):
            item.add_marker(pytest.mark.slurm)
