"""From a run configuration to the stages of `worker`, with what every shard says of its origin."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lopd_megatron.config import RunConfig
from lopd_megatron.files import sha256_file
from lopd_megatron.inference.requests import Sampling, ScoringPath
from lopd_megatron.inference.rollouts import RolloutStage, stop_token_ids
from lopd_megatron.inference.scoring import ScoringStage


def generator_model(config: RunConfig) -> str:
    return config.model.teacher if config.rollout.generator == "teacher" else config.model.student


def rollout_stage(config: RunConfig, prompts_lineage: dict[str, Any], engine: dict[str, Any]) -> RolloutStage:
    rollout, model = config.rollout, generator_model(config)
    stop = stop_token_ids(model, rollout.stop_token_ids)
    sampling = Sampling(rollout.temperature, rollout.top_p, rollout.max_response_tokens, stop)
    lineage = {
        "prompts": prompts_lineage,
        "generator": model_fingerprint(model),
        "sampling": {**rollout.model_dump(mode="json", exclude={"engine"}), "stop_token_ids": list(stop)},
        "engine": engine,
    }
    return RolloutStage(sampling, rollout.num_samples_per_prompt, rollout.seed, lineage)


def scoring_stage(
    config: RunConfig, rollouts_lineage: dict[str, Any], engine: dict[str, Any], path: ScoringPath
) -> ScoringStage:
    lineage = {
        "rollouts": rollouts_lineage,
        "teacher": model_fingerprint(config.model.teacher),
        "scoring": {"topk": config.scoring.topk, "path": path},
        "engine": engine,
    }
    return ScoringStage(config.scoring.topk, path, lineage)


def model_fingerprint(model: str) -> str:
    digest = hashlib.sha256()
    for path in sorted([Path(model) / "config.json", *Path(model).glob("*.safetensors")]):
        digest.update(f"{path.name} {sha256_file(path)}\n".encode())
    return digest.hexdigest()
