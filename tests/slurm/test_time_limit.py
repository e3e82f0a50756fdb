from __future__ import annotations

import json
from pathlib import Path

from tests.slurm.lab import SlurmLab
from tests.slurm.slow_trainer import STEPS, advance


def test_a_job_that_hits_its_limit_saves_and_ends_with_the_undisturbed_result(
    lab: SlurmLab, time_limited: tuple[str, Path]
) -> None:
    job, folder = time_limited
    record = lab.wait(job, 300)
    assert record["JobState"] == "COMPLETED"
    assert int(record["Restarts"]) >= 1
    assert "told to stop" in (folder / "batch.log").read_text()
    value = 1
    for _ in range(STEPS):
        value = advance(value)
    assert json.loads((folder / "result.json").read_text()) == value
