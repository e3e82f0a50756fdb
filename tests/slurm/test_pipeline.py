"""The real pipeline on a real Slurm: two nodes, two processes on each."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
from safetensors.torch import load_file

from tests.slurm.conftest import RECIPE, ROOT, Chain
from tests.slurm.lab import SlurmLab

STAGES = ["prompts", "rollouts", "score", "build", "train", "export", "evaluate"]


def iteration(run: Path) -> int:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    return max((json.loads(line).get("iteration", 0) for line in lines if line.endswith("}")), default=0)


def wait_for(what: str, lab: SlurmLab, value: Callable[[], int], least: int) -> None:
    lab.until(what, lambda: value() >= least, 600)


def test_the_chain_runs_to_its_end(chain: Chain, tiny: Path) -> None:
    assert list(chain) == STAGES
    assert {name: job["JobState"] for name, job in chain.items()} == dict.fromkeys(STAGES, "COMPLETED")
    run = tiny / "opd"
    rows = sum(pq.read_metadata(shard).num_rows for shard in (run / "scored").glob("shard-*.parquet"))
    assert rows == 16
    assert iteration(run) == 200
    assert json.loads((run / "evaluation/opd.json").read_text())["accuracy"] >= 0
    logs = run / "logs/train/latest"
    assert "n1,n2: fit, checked in" in "".join(file.read_text() for file in logs.glob("health-*.log"))
    assert "on 4 rank(s)" in (logs / "node-0.log").read_text()


def test_a_training_disturbed_three_times_ends_with_the_same_weights(
    lab: SlurmLab, chain: Chain, tiny: Path
) -> None:
    """A stop signal, `scontrol requeue` and a lost node; bit for bit the chain's result."""
    run = tiny / "disturbed"
    launch = ["python", "-m", "lopd_megatron.launch", "--executor", "sbatch", "--stages", "train,export"]
    overrides = ["name=disturbed", f"run_dir={run}", f"data.prefixes=[{tiny}/opd/dataset/train]"]
    submitted = lab.run([*launch, "--recipe", RECIPE, *overrides], cwd=ROOT, timeout_s=300)
    train, export = (line.split()[1] for line in submitted.stdout.splitlines() if line.startswith("dist"))

    def restarts() -> int:
        return int(lab.job(train)["Restarts"])

    disturbances = (
        (10, ["scancel", "--batch", "-s", "USR1", train]),
        (70, ["scontrol", "requeue", train]),
        (130, ["scontrol", "update", "nodename=n2", "state=down", "reason=test"]),
    )
    for attempt, (after, command) in enumerate(disturbances):
        wait_for(f"iteration {after}", lab, lambda: iteration(run), after)
        assert restarts() == attempt
        assert iteration(run) < 200
        lab.run(command)
        wait_for("a requeue", lab, restarts, attempt + 1)
    lab.run(["scontrol", "update", "nodename=n2", "state=resume"], check=False)

    record = lab.wait(train, 600)
    assert (record["JobState"], record["Restarts"]) == ("COMPLETED", "3")
    assert lab.wait(export, 300)["JobState"] == "COMPLETED"
    expected, weights = (load_file(folder / "hf/model.safetensors") for folder in (tiny / "opd", run))
    assert expected.keys() == weights.keys()
    assert all(weights[name].equal(expected[name]) for name in expected)
    # the signal came between two saves, and no step was lost
    first = (run / "logs/train" / f"{train}.0/node-0.log").read_text()
    assert "SIGUSR1" in first
    assert len(list((run / "logs/train").glob(f"{train}.[0-9]"))) == 4
