"""`RunConfig`: all sections of one run, the checks that span sections, and the folders of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lopd_megatron.config.data import (
    DataConfig,
    EvaluationConfig,
    ModelConfig,
    PromptsConfig,
    RolloutsConfig,
    ScoresConfig,
)
from lopd_megatron.config.launch import LaunchConfig
from lopd_megatron.config.objectives import objective_spec
from lopd_megatron.config.section import Section
from lopd_megatron.config.training import (
    CheckpointConfig,
    EffOPDConfig,
    LossConfig,
    OnlineConfig,
    OptimizerConfig,
    ParallelConfig,
    StalenessConfig,
    TrainConfig,
)
from lopd_megatron.errors import UserError
from lopd_megatron.files import write_json


class LineageConfig(Section):
    allow_mismatch: str = ""
    """A reason, recorded in every artifact, to go on although lineage rules are broken."""


class RunConfig(Section):
    """The whole description of one run. `run_dir` is the only place a run writes to."""

    name: str = "run"
    """Name of the run, in logs and job names."""
    run_dir: str = "runs/run"
    """Folder that everything of this run is written to."""
    model: ModelConfig = ModelConfig()
    prompts: PromptsConfig = PromptsConfig()
    rollouts: RolloutsConfig = RolloutsConfig()
    scores: ScoresConfig = ScoresConfig()
    data: DataConfig = DataConfig()
    loss: LossConfig = LossConfig()
    parallel: ParallelConfig = ParallelConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    effopd: EffOPDConfig = EffOPDConfig()
    online: OnlineConfig = OnlineConfig()
    staleness: StalenessConfig = StalenessConfig()
    lineage: LineageConfig = LineageConfig()
    launch: LaunchConfig = LaunchConfig()

    @property
    def paths(self) -> Paths:
        return Paths(Path(self.run_dir))

    @property
    def needs_teacher(self) -> bool:
        """Whether the objective compares with a teacher; without one the run is SFT on its rollouts."""
        return objective_spec(self.loss.objective).needs_teacher

    @property
    def dataset_prefixes(self) -> list[str]:
        return self.data.prefixes or [str(self.paths.dataset_prefix)]

    def check(self) -> None:
        """Facts that span sections. Called once by every program, after the overrides."""
        if objective_spec(self.loss.objective).classes and self.loss.topk < 1:
            raise UserError(
                f"loss.objective={self.loss.objective} needs loss.topk ≥ 1 (value {self.loss.topk}); "
                "set loss.topk to the number of teacher tokens that were scored"
            )
        if not self.data.prefixes and self.loss.topk > self.scores.topk:
            raise UserError(
                f"loss.topk={self.loss.topk} is more than scores.topk={self.scores.topk}; "
                "raise scores.topk and score again, or lower loss.topk"
            )
        rollouts = self.rollouts
        need = self.prompts.max_prompt_tokens + rollouts.max_response_tokens
        if need > rollouts.engine.max_model_len:
            raise UserError(
                f"prompts.max_prompt_tokens + rollouts.max_response_tokens = {need} is more than "
                f"rollouts.engine.max_model_len={rollouts.engine.max_model_len}; raise the latter"
            )
        if need > self.data.seq_length:
            raise UserError(
                f"the longest rollout ({need} tokens) does not fit a packed row of "
                f"data.seq_length={self.data.seq_length}; raise data.seq_length to at least {need}"
            )
        if self.effopd.enabled:
            self._check_effopd()

    def _check_effopd(self) -> None:
        if self.optimizer.use_precision_aware_optimizer:
            raise UserError(
                "effopd.enabled=true writes fp32 main parameters, which "
                "optimizer.use_precision_aware_optimizer=true does not have; switch one of them off"
            )
        if self.effopd.score != "accuracy":
            if not self.data.valid_prefixes:
                raise UserError(
                    f"effopd.score={self.effopd.score} needs held-out data; set data.valid_prefixes"
                )
            return
        if not self.effopd.accuracy_problems:
            raise UserError("effopd.score=accuracy needs validation problems; set effopd.accuracy_problems")
        reported = set(self.effopd.accuracy_problems) & set(self.evaluation.input)
        if reported:
            raise UserError(
                f"{min(reported)} is in effopd.accuracy_problems and evaluation.input: what weights are "
                "chosen by cannot measure them; take another file for one of them"
            )

    def dump(self, path: Path) -> None:
        """Write the resolved configuration beside an output."""
        write_json(path, self.model_dump(mode="json"))

    @classmethod
    def read(cls, path: Path) -> RunConfig:
        return cls.model_validate(json.loads(path.read_text()))

    def leaves(self) -> dict[str, Any]:
        """Every field by its dotted name; a dictionary counts as one leaf."""

        def walk(section: Section, prefix: str) -> dict[str, Any]:
            found: dict[str, Any] = {}
            for name in type(section).model_fields:
                value = getattr(section, name)
                if isinstance(value, Section):
                    found |= walk(value, f"{prefix}{name}.")
                else:
                    found[f"{prefix}{name}"] = value
            return found

        return walk(self, "")


class Paths:
    """Where the stages of a run read and write, all below `run_dir`."""

    def __init__(self, run_dir: Path) -> None:
        self.run_dir = run_dir
        self.config = run_dir / "config.json"
        self.prompts = run_dir / "prompts"
        self.rollouts = run_dir / "rollouts"
        self.scores = run_dir / "scores"
        self.dataset_prefix = run_dir / "dataset" / "train"
        self.checkpoints = run_dir / "checkpoints"
        self.metrics = run_dir / "metrics.jsonl"
        self.validation = run_dir / "validation.jsonl"
        self.warnings = run_dir / "warnings.jsonl"
        self.hf = run_dir / "hf"
        self.evaluation = run_dir / "evaluation"
        self.measure = run_dir / "measure"
        self.logs = run_dir / "logs"
        self.online_weights = run_dir / "online" / "weights"
        self.online_log = run_dir / "online" / "log.jsonl"
