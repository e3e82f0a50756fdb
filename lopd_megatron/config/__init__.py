"""One typed, strict description of a run. A recipe returns a `RunConfig`; every program reads the same one.

A run is one pass through the pipeline: prompts → rollouts → scores → dataset → training → HF weights →
evaluation. SFT is the same pipeline with the teacher as generator and no scoring.

Names are Megatron's where Megatron has one. Batch sizes count sequences (rollouts), log-probs are nats.
An unknown key, a wrong type or an impossible value is an error that names the closest valid name.
Command-line side: `lopd_megatron.cli`.
"""

from lopd_megatron.config.data import (
    DataConfig,
    EngineConfig,
    EvaluationConfig,
    ModelConfig,
    PromptsConfig,
    RolloutsConfig,
    ScoresConfig,
)
from lopd_megatron.config.launch import LaunchConfig, StageResources, StagesConfig
from lopd_megatron.config.run import LineageConfig, Paths, RunConfig
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

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "EffOPDConfig",
    "EngineConfig",
    "EvaluationConfig",
    "LaunchConfig",
    "LineageConfig",
    "LossConfig",
    "ModelConfig",
    "OnlineConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Paths",
    "PromptsConfig",
    "RolloutsConfig",
    "RunConfig",
    "ScoresConfig",
    "Section",
    "StageResources",
    "StagesConfig",
    "StalenessConfig",
    "TrainConfig",
]
