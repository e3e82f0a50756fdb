"""The rollout and scoring stages as whole programs: checks first, then one engine for all the shards."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from lopd_megatron.config import EngineConfig, RunConfig
from lopd_megatron.errors import EXIT_DOCUMENTS_FAILED, UserError
from lopd_megatron.inference import shards
from lopd_megatron.inference.engine import VllmEngine
from lopd_megatron.inference.requests import Sampling
from lopd_megatron.inference.rollouts import RolloutStage, stop_token_ids
from lopd_megatron.inference.score_paths import choose_path
from lopd_megatron.inference.scoring import ScoringStage
from lopd_megatron.inference.worker import Stage, Worker
from lopd_megatron.lineage import Lineage, check_consistency, model_fingerprint, read_model_lineage
from lopd_megatron.progress import say


@dataclass(frozen=True)
class Share:
    """Which part of a sharded stage one process does, and how many failed documents it accepts."""

    index: int = 0
    count: int = 1
    max_failed: int = 0

    @classmethod
    def parse(cls, text: str, max_failed: int = 0) -> Share:
        """`2/8` → the third of eight workers."""
        first, slash, second = text.partition("/")
        if not (slash and first.isdigit() and second.isdigit() and int(first) < int(second)):
            raise UserError(f"--worker {text!r} is not I/N with 0 ≤ I < N, as in 0/8")
        return cls(int(first), int(second), max_failed)


def generator_model(config: RunConfig) -> str:
    return config.model.teacher if config.rollout.generator == "teacher" else config.model.student


def run_rollouts(config: RunConfig, share: Share) -> int:
    """Prompt shards → rollout shards. Returns the exit code."""
    rollout, model, paths = config.rollout, generator_model(config), config.paths
    _refuse_missing(model, f"model.{rollout.generator}")
    prompts = shards.complete_manifests(paths.prompts, "prompts")
    longest = max(manifest["longest"] for manifest in prompts) + rollout.max_response_tokens
    _refuse_too_long(longest, "prompt + rollout.max_response_tokens", "rollout", rollout.engine)
    stop = stop_token_ids(model, rollout.stop_token_ids)
    sampling = Sampling(rollout.temperature, rollout.top_p, rollout.max_response_tokens, stop)
    lineage = _checked(config, shards.lineage_of(paths.prompts, prompts))
    lineage.generator = model_fingerprint(model)
    lineage.sampling = {
        **rollout.model_dump(mode="json", exclude={"engine", "generator"}),
        "stop_token_ids": list(stop),
    }
    if model == config.model.student:
        lineage.sft_teacher = read_model_lineage(model).sft_teacher
    lineage.parents = [shards.content_hash(prompts)]
    stage = RolloutStage(sampling, rollout.num_samples_per_prompt, rollout.seed, lineage)

    def open_engine(engine_config: EngineConfig) -> VllmEngine:
        engine = VllmEngine(
            model, engine_config, task="generate", trust_remote_code=config.model.trust_remote_code
        )
        lineage.engine[stage.kind] = engine.describe()
        return engine

    return _run(stage, paths.prompts, paths.rollouts, len(prompts), rollout.engine, open_engine, share)


def run_scoring(config: RunConfig, share: Share) -> int:
    """Rollout shards → scored shards. Returns the exit code."""
    scoring, model, paths = config.scoring, config.model.teacher, config.paths
    _refuse_missing(model, "model.teacher")
    rollouts = shards.complete_manifests(paths.rollouts, "rollouts")
    longest = max(manifest["longest"] for manifest in rollouts)
    _refuse_too_long(longest, "the longest rollout", "scoring", scoring.engine)
    lineage = _checked(config, shards.lineage_of(paths.rollouts, rollouts))
    lineage.teacher = model_fingerprint(model)
    lineage.scoring = {"topk": scoring.topk}
    lineage.parents = [shards.content_hash(rollouts)]
    stage = ScoringStage(scoring.topk, lineage)

    def open_engine(engine_config: EngineConfig) -> VllmEngine:
        engine = VllmEngine(
            model,
            engine_config,
            task="score",
            max_topk=scoring.topk,
            trust_remote_code=config.model.trust_remote_code,
        )
        stage.path = choose_path(engine, scoring.path, scoring.topk, engine_config.max_model_len)
        lineage.engine[stage.kind] = {**engine.describe(), "scoring_path": stage.path}
        say(f"scoring path: {stage.path}")
        return engine

    return _run(stage, paths.rollouts, paths.scored, len(rollouts), scoring.engine, open_engine, share)


def _run(
    stage: Stage,
    source_folder: Path,
    folder: Path,
    num_shards: int,
    engine_config: EngineConfig,
    open_engine: Callable[[EngineConfig], VllmEngine],
    share: Share,
) -> int:
    shards.refuse_other_lineage(folder, num_shards, stage.lineage, but=["engine"])
    done = shards.manifests(folder, num_shards)
    if len(done) == num_shards:
        say(f"{folder} is complete: {sum(manifest['rows'] for manifest in done)} documents")
        return _exit_code(sum(manifest["failed"] for manifest in done), folder, share)
    say(f"{stage.kind}: starting vLLM")
    engine = open_engine(engine_config)
    worker = Worker(stage, source_folder, folder, num_shards, worker=(share.index, share.count))
    failed = worker.run(engine, engine_config, open_engine)
    worker.engine.close()
    return _exit_code(failed, folder, share)


def _checked(config: RunConfig, data: Lineage) -> Lineage:
    """The lineage of what a stage reads, after the consistency rules were held."""
    reason = check_consistency(
        student=config.model.student or None,
        teacher=config.model.teacher or None,
        data=data,
        objective=config.loss.objective,
        allow_mismatch=config.lineage.allow_mismatch,
    )
    return data.model_copy(update={"allow_mismatch": reason}, deep=True)


def _exit_code(failed: int, folder: Path, share: Share) -> int:
    if failed <= share.max_failed:
        return 0
    say(
        f"{failed} documents were set aside, see {folder}/failed-*.json; delete those shards' .json to "
        f"try them again, or accept the loss with --max-failed {failed}"
    )
    return EXIT_DOCUMENTS_FAILED


def _refuse_missing(model: str, setting: str) -> None:
    if not (Path(model) / "config.json").is_file():
        raise UserError(f"{setting}={model!r} is not a Hugging Face folder (no config.json); set it to one")


def _refuse_too_long(longest: int, what: str, section: str, engine: EngineConfig) -> None:
    if longest > engine.max_model_len:
        raise UserError(
            f"{what} = {longest} tokens is more than {section}.engine.max_model_len={engine.max_model_len}; "
            f"raise it to at least {longest}"
        )
