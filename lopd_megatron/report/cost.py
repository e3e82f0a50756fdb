"""What the stages of a run cost, beside the split of the paper."""

from __future__ import annotations

from dataclasses import dataclass

from lopd_megatron.report.run_folder import RunFolder, ShardFolder

STAGES = ("rollouts", "scores", "train")
PAPER_8B = {"rollouts": 10.0, "scores": 4.0, "train": 16.0}
"""GPU-hours of the 8B student, arXiv 2604.13010, table 2."""


@dataclass(frozen=True)
class StageCost:
    stage: str
    seconds: float
    """Wall time; of several workers, the sum."""
    gpus: int
    """Of one worker; 0 on CPU."""
    source: str

    @property
    def gpu_hours(self) -> float:
        return self.seconds * self.gpus / 3600

    @property
    def weight(self) -> float:
        """What shares are taken of: GPU-seconds, or seconds on CPU."""
        return self.seconds * max(self.gpus, 1)


def stage_costs(run: RunFolder) -> list[StageCost]:
    """The three stages that the paper counts, as far as they are measured.

    Wall times: from `seconds.json` where the chain's program wrote it (with start-up), else from the worker
    logs and the metrics (without start-up). Nothing where a stage's log has no times.
    """
    found = []
    for stage, folder in (("rollouts", run.rollouts), ("scores", run.scored)):
        gpus = _gpus(run, stage)
        if stage in run.stage_seconds:
            found.append(StageCost(stage, run.stage_seconds[stage], gpus, "seconds.json"))
        elif folder and (seconds := _worker_seconds(folder)):
            found.append(StageCost(stage, seconds, gpus, "worker logs, without start-up"))
    if "train" in run.stage_seconds:
        found.append(StageCost("train", run.stage_seconds["train"], _gpus(run, "train"), "seconds.json"))
    elif run.metrics:
        seconds = _train_seconds(run.metrics)
        found.append(StageCost("train", seconds, _gpus(run, "train"), "metrics.jsonl, without start-up"))
    return found


def shares(costs: list[StageCost]) -> list[float] | None:
    """Share of each of `STAGES`; None unless all are measured."""
    weights = {cost.stage: cost.weight for cost in costs}
    if set(weights) != set(STAGES):
        return None
    total = sum(weights.values())
    return [weights[stage] / total for stage in STAGES]


def paper_shares() -> list[float]:
    total = sum(PAPER_8B.values())
    return [PAPER_8B[stage] / total for stage in STAGES]


def _gpus(run: RunFolder, stage: str) -> int:
    if run.config is None:
        return 0
    resources = getattr(run.config.launch.stages, stage)
    return resources.nodes * resources.gpus_per_node


def _worker_seconds(folder: ShardFolder) -> float:
    """Sum over workers of their wall time up to the last commit; one that was started again counts each time.

    A line holds the seconds since its process began, so a smaller number is a new process.
    """
    total = 0.0
    for lines in folder.worker_logs:
        before = 0.0
        for line in lines:
            seconds = line.get("seconds", 0.0)
            total += seconds if seconds < before else seconds - before
            before = seconds
    return total


def _train_seconds(metrics: list[dict]) -> float:
    """Every line is the mean over the iterations since the line before."""
    total, before = 0.0, 0
    for line in metrics:
        total += line["iteration_time_ms"] / 1e3 * (line["iteration"] - before)
        before = line["iteration"]
    return total
