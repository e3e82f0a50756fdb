"""The real pipeline on a real Slurm: two nodes, two processes on each."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from safetensors.torch import load_file

from lopd_megatron.launch import sbatch, stages
from tests.slurm.conftest import RECIPE, ROOT, Chain
from tests.slurm.lab import SlurmLab

ITERATIONS = 40
STAGES = ["prompts", "rollouts", "scores", "dataset", "train", "export", "evaluate"]


def iteration(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line).get("iteration", 0) for line in lines if line.endswith("}")), default=0)


def wait_for(what: str, lab: SlurmLab, value: Callable[[], int], least: int) -> None:
    lab.until(what, lambda: value() >= least, 600, every_s=0.4)


def test_the_chain_runs_to_its_end(chain: Chain, tiny: Path) -> None:
    assert list(chain) == STAGES
    assert {name: job["JobState"] for name, job in chain.items()} == dict.fromkeys(STAGES, "COMPLETED")
    run = tiny / "opd"
    rows = sum(pq.read_metadata(shard).num_rows for shard in (run / "scores").glob("shard-*.parquet"))
    assert rows == 16
    assert iteration(run) == ITERATIONS
    assert json.loads((run / "evaluation/opd.json").read_text())["accuracy"] >= 0
    logs = run / "logs/train/latest"
    assert "n1,n2: fit, checked in" in "".join(file.read_text() for file in logs.glob("health-*.log"))
    assert "on 4 rank(s)" in (logs / "node-0.log").read_text()


def test_a_job_that_hits_its_limit_and_is_disturbed_twice_ends_with_the_same_weights(
    lab: SlurmLab, chain: Chain, tiny: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Slurm's timer with its least limit, `scontrol requeue` and a lost node; bit for bit the chain's result.

    A brake holds the training up until all of that has happened, which costs time and no CPU.
    """
    monkeypatch.setenv("LOPD_TINY", str(tiny))
    run = tiny / "a disturbed run"
    run.mkdir()
    (run / "brake").touch()
    # Slurm looks every 30 s, so the warning comes 29 to 59 s after the start.
    site = ["launch.stages.train.time=00:01:00", "launch.sbatch_options=[--signal=B:USR1@1]"]
    site.append("launch.max_restarts=20")
    overrides = ["name=disturbed", f"run_dir={run}", f"data.prefixes=[{tiny}/opd/dataset/train]", *site]
    train, export = stages.chain([RECIPE], overrides, ["train", "export"])
    command = tuple("tests.slurm.slow_train" if w == "lopd_megatron.train" else w for w in train.command)
    script = sbatch.render([replace(train, command=command), export])
    submitted = lab.run(["bash", "-c", script], cwd=ROOT).stdout.splitlines()
    job, after = (line.split()[1] for line in submitted)

    def restarts() -> int:
        return int(lab.job(job)["Restarts"])

    def stopped() -> list[str]:
        logs = "".join(path.read_text() for path in (run / "logs/train").glob("*/node-0.log"))
        return re.findall(r"stopping after iteration (\d+): SIGUSR1", logs)

    minutes = 1  # and one more each time that a busy machine has taken no step before the warning
    while not stopped():
        wait_for("warning", lab, lambda: 99 if stopped() else restarts(), minutes)
        minutes += 1
        lab.run(["scontrol", "update", f"jobid={job}", f"timelimit={minutes}"])
    wait_for("requeue", lab, restarts, 1)
    lab.run(["scontrol", "update", f"jobid={job}", "timelimit=60"])
    for command in (
        ["scontrol", "requeue", job],
        ["scontrol", "update", "nodename=n2", "state=down", "reason=test"],
    ):
        before, reached = restarts(), iteration(run)
        wait_for("progress", lab, lambda: iteration(run), reached + 2)
        lab.run(command)
        wait_for("requeue", lab, restarts, before + 1)
    assert iteration(run) < ITERATIONS
    (run / "brake").unlink()
    lab.run(["scontrol", "update", "nodename=n2", "state=resume"], check=False)

    assert lab.wait(job, 600)["JobState"] == "COMPLETED"
    assert lab.wait(after, 300)["JobState"] == "COMPLETED"
    expected, weights = (load_file(folder / "hf/model.safetensors") for folder in (tiny / "opd", run))
    assert expected.keys() == weights.keys()
    assert all(weights[name].equal(expected[name]) for name in expected)
    # The warning came between two saves, and no step was lost.
    count = restarts() + 1
    assert count >= 4
    logs = [(run / f"logs/train/{job}.{attempt}/node-0.log").read_text() for attempt in range(count)]
    warned = next(index for index, log in enumerate(logs) if "SIGUSR1" in log)
    assert f"at iteration {stopped()[0]}" in logs[warned + 1]
