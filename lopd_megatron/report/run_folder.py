"""Reads what a run folder holds. Every part may be missing: a report can be made while a run is under way."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lopd_megatron.config import Paths, RunConfig
from lopd_megatron.data.manifest import Manifest, manifest_path, read_manifest
from lopd_megatron.errors import UserError
from lopd_megatron.lineage import LINEAGE_FILE, Lineage, read_model_lineage
from lopd_megatron.train.held_out import Validation, read_validations
from lopd_megatron.train.metrics import read_metrics


@dataclass(frozen=True)
class ShardFolder:
    """Finished shards of one offline stage, by their JSONs, and the lines its workers logged."""

    folder: Path
    shards: list[dict[str, Any]]
    worker_logs: list[list[dict[str, Any]]]

    @property
    def num_shards(self) -> int:
        return self.shards[0]["num_shards"]

    @property
    def rows(self) -> int:
        return sum(shard["rows"] for shard in self.shards)

    @property
    def tokens(self) -> int:
        return sum(shard["tokens"] for shard in self.shards)

    @property
    def failed(self) -> int:
        return sum(shard["failed"] for shard in self.shards)

    @property
    def lineage(self) -> Lineage:
        return Lineage.model_validate(self.shards[0]["lineage"])


@dataclass(frozen=True)
class RunFolder:
    """What one run has written so far. `config` is there once training has started."""

    folder: Path
    config: RunConfig | None
    prompt_counts: dict[str, int]
    prompts: ShardFolder | None
    rollouts: ShardFolder | None
    scored: ShardFolder | None
    datasets: list[Manifest]
    metrics: list[dict[str, Any]]
    weights: Lineage | None
    """Of the exported Hugging Face folder."""
    validations: list[Validation]
    warnings: list[dict[str, Any]]
    """What training warned of: `iteration`, `key`, `text`."""
    measurements: dict[str, dict[str, Any]]
    """By name, `before` and `after` among them: what `measure` found on fresh responses."""
    checkpoints: list[int]
    """Iterations that can be exported."""
    evaluations: list[dict[str, Any]]
    stage_seconds: dict[str, float]
    """Wall time by stage, where the program that ran the chain has measured it (`seconds.json`)."""

    @property
    def name(self) -> str:
        return self.config.name if self.config else self.folder.name

    @property
    def data_lineage(self) -> Lineage:
        """Of the dataset, or of the latest stage before it that has run."""
        if self.datasets:
            return self.datasets[0].lineage
        latest = self.scored or self.rollouts
        return latest.lineage if latest else Lineage()

    @property
    def is_sft(self) -> bool:
        return self.config is not None and not self.config.needs_teacher


def read_run(folder: Path) -> RunFolder:
    """Read a run folder; a folder in which no stage has left anything is refused."""
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder; give the run_dir of a run")
    paths = Paths(folder)
    config = RunConfig.read(paths.config) if paths.config.is_file() else None
    prefixes = config.dataset_prefixes if config and config.data.prefixes else [str(paths.dataset_prefix)]
    counts = paths.prompts / "counts.json"
    run = RunFolder(
        folder=folder,
        config=config,
        prompt_counts=json.loads(counts.read_text()) if counts.is_file() else {},
        prompts=_shards(paths.prompts),
        rollouts=_shards(paths.rollouts),
        scored=_shards(paths.scores),
        datasets=[read_manifest(prefix) for prefix in prefixes if manifest_path(prefix).is_file()],
        metrics=[_with_true_names(line) for line in read_metrics(paths.metrics)],
        weights=read_model_lineage(paths.hf) if (paths.hf / LINEAGE_FILE).is_file() else None,
        validations=read_validations(paths.validation),
        warnings=read_metrics(paths.warnings),
        measurements={found["name"]: found for found in read_evaluations(paths.measure)},
        checkpoints=sorted(int(path.name[5:]) for path in paths.checkpoints.glob("iter_*")),
        evaluations=read_evaluations(paths.evaluation),
        stage_seconds=_stage_seconds(folder, config.name if config else folder.name),
    )
    parts = (run.prompts, run.rollouts, run.scored, run.datasets, run.metrics, run.evaluations)
    if not any(parts):
        raise UserError(f"{folder} holds no output of any stage; give the run_dir of a run that was started")
    return run


def read_evaluations(folder: Path) -> list[dict[str, Any]]:
    """The summaries in an evaluation folder, by name."""
    return [json.loads(file.read_text()) for file in sorted(folder.glob("*.json"))]


def _with_true_names(line: dict[str, Any]) -> dict[str, Any]:
    """A line of a version that called the mean log-ratio `reverse_kl`, by today's names."""
    if "opd_reverse_kl" not in line:
        return line
    names = {"reverse_kl": "log_ratio_mean", "valid_reverse_kl": "valid_log_ratio_mean"}
    return {names.get(name, name): value for name, value in line.items() if "opd_reverse_kl" not in name}


def fresh_scores(run: RunFolder) -> tuple[Path, ShardFolder] | None:
    """Scored new responses of this run's student: those of `measure`, else of a run beside this one."""
    measured = run.measurements.get("after")
    if measured:
        folder = Paths(run.folder).measure / f"after-{measured['key']}"
        scores = _shards(folder / "scores")
        if scores:
            return folder, scores
    student = (run.folder / "hf").resolve()
    for folder in sorted(run.folder.parent.iterdir()):
        found = _shards(folder / "scores") if folder != run.folder else None
        made_by = found.lineage.generator if found else None
        if found and made_by and Path(made_by["origin"]).resolve() == student:
            return folder, found
    return None


def _shards(folder: Path) -> ShardFolder | None:
    shards = [json.loads(file.read_text()) for file in sorted(folder.glob("shard-*.json"))]
    logs = [
        [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        for file in sorted(folder.glob("metrics-*-of-*.jsonl"))
    ]
    return ShardFolder(folder, shards, logs) if shards else None


def _stage_seconds(folder: Path, name: str) -> dict[str, float]:
    """`<name>-<stage>` → seconds in the `seconds.json` of the chain, which lies beside its runs."""
    file = folder.parent / "seconds.json"
    if not file.is_file():
        return {}
    found = json.loads(file.read_text())
    prefix = f"{name}-"
    return {job.removeprefix(prefix): value for job, value in found.items() if job.startswith(prefix)}
