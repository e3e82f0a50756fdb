"""The rollout and scoring stages as whole programs: checks first, then one engine for all the shards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lopd_megatron.config import EngineConfig, RunConfig
from lopd_megatron.errors import EXIT_DOCUMENTS_FAILED, UserError
from lopd_megatron.fingerprints import model_fingerprint
from lopd_megatron.inference.engine import VllmEngine
from lopd_megatron.inference.requests import Engine, Sampling
from lopd_megatron.inference.score_paths import choose_path
from lopd_megatron.inference.sizes import read_shape
from lopd_megatron.lineage import Lineage, check_consistency, read_model_lineage
from lopd_megatron.progress import log_line
from lopd_megatron.rollouts import shard_files
from lopd_megatron.rollouts.rollout_stage import RolloutJob, stop_token_ids
from lopd_megatron.rollouts.score_stage import ScoreJob
from lopd_megatron.rollouts.share import Share, generator_model
from lopd_megatron.rollouts.stop_tokens import check_stop_tokens
from lopd_megatron.rollouts.teacher_proof import is_proved, prove_teacher_column
from lopd_megatron.rollouts.worker import ShardJob, Worker


def run_rollouts(config: RunConfig, share: Share) -> int:
    """Prompt shards → rollout shards. Returns the exit code."""
    rollouts, model, paths = config.rollouts, generator_model(config), config.paths
    _refuse_missing(model, f"model.{rollouts.generator}")
    prompts = shard_files.complete_manifests(paths.prompts, "prompts")
    longest = max(manifest["longest"] for manifest in prompts) + rollouts.max_response_tokens
    _refuse_too_long(longest, "prompt + rollouts.max_response_tokens", "rollouts", rollouts.engine)
    stop = stop_token_ids(model, rollouts.stop_token_ids)
    sampling = Sampling(rollouts.temperature, rollouts.top_p, rollouts.max_response_tokens, stop)
    lineage = _checked(config, shard_files.lineage_of(paths.prompts, prompts))
    lineage.generator = model_fingerprint(model)
    lineage.sampling = {
        **rollouts.model_dump(mode="json", exclude={"engine", "generator"}),
        "stop_token_ids": list(stop),
    }
    if model == config.model.student:
        if (Path(config.model.teacher) / "config.json").is_file():
            check_stop_tokens(stop, config.model.teacher, config.lineage.allow_mismatch)
        lineage.sft_teacher = read_model_lineage(model).sft_teacher
    lineage.parents = [shard_files.content_hash(prompts)]
    job = RolloutJob(sampling, rollouts.num_samples_per_prompt, rollouts.seed, lineage)

    def open_engine(engine_config: EngineConfig) -> VllmEngine:
        engine = VllmEngine(
            model, engine_config, task="generate", trust_remote_code=config.model.trust_remote_code
        )
        lineage.engine[job.kind] = engine.describe()
        return engine

    return _run(job, paths.prompts, paths.rollouts, len(prompts), rollouts.engine, open_engine, share)


def run_scoring(config: RunConfig, share: Share) -> int:
    """Rollout shards → scored shards. Returns the exit code."""
    return score_with(config, config.model.teacher, config.paths.scores, share)


def score_with(config: RunConfig, model: str, folder: Path, share: Share) -> int:
    """Let `model` score the rollouts of a run into `folder`. Returns the exit code."""
    scores, paths = config.scores, config.paths
    _refuse_missing(model, "model.teacher")
    rollouts = shard_files.complete_manifests(paths.rollouts, "rollouts")
    longest = max(manifest["longest"] for manifest in rollouts)
    _refuse_too_long(longest, "the longest rollout", "scores", scores.engine)
    lineage = _checked(config, shard_files.lineage_of(paths.rollouts, rollouts))
    if model == config.model.teacher and lineage.generator != model_fingerprint(model):
        ids = lineage.sampling.get("stop_token_ids", ())
        check_stop_tokens(ids, model, config.lineage.allow_mismatch)
    lineage.teacher = model_fingerprint(model)
    lineage.scoring = {"topk": scores.topk}
    lineage.parents = [shard_files.content_hash(rollouts)]
    vocab_size = read_shape(model).vocab_size
    if scores.topk > vocab_size - 2:
        raise UserError(
            f"scores.topk={scores.topk} leaves no token of the {vocab_size} of {model} beside the top-k and "
            f"the sampled one; set it to at most {vocab_size - 2}"
        )
    job = ScoreJob(scores.topk, lineage)
    num_shards, documents = len(rollouts), config.data.alignment_sample

    def prove(engine: Engine) -> None:
        prove_teacher_column(
            engine,
            folder,
            num_shards,
            documents=documents,
            tolerance=config.data.alignment_tolerance,
            topk=scores.topk,
            path=job.path,
        )

    def open_engine(engine_config: EngineConfig) -> VllmEngine:
        engine = VllmEngine(
            model,
            engine_config,
            task="score",
            max_topk=scores.topk,
            trust_remote_code=config.model.trust_remote_code,
        )
        job.path = choose_path(engine, scores.path, scores.topk, engine_config.max_model_len)
        lineage.engine[job.kind] = {**engine.describe(), "scoring_path": job.path}
        log_line(f"scoring path: {job.path}")
        return engine

    proved = not documents or share.index > 0 or is_proved(folder, num_shards)
    last = None if proved else prove
    return _run(job, paths.rollouts, folder, num_shards, scores.engine, open_engine, share, last)


def _run(
    job: ShardJob,
    source_folder: Path,
    folder: Path,
    num_shards: int,
    engine_config: EngineConfig,
    open_engine: Callable[[EngineConfig], VllmEngine],
    share: Share,
    last: Callable[[Engine], None] | None = None,
) -> int:
    """`last` is done with the open engine when all shards are there."""
    shard_files.refuse_other_lineage(folder, num_shards, job.lineage, but=["engine"])
    done = shard_files.manifests(folder, num_shards)
    if len(done) == num_shards and last is None:
        log_line(f"{folder} is complete: {sum(manifest['rows'] for manifest in done)} documents")
        return _exit_code(sum(manifest["failed"] for manifest in done), folder, share)
    log_line(f"{job.kind}: starting vLLM")
    engine = open_engine(engine_config)
    worker = Worker(job, source_folder, folder, num_shards, worker=(share.index, share.count))
    failed = worker.run(engine, engine_config, open_engine)
    try:
        if last is not None:
            last(worker.engine)
    finally:
        worker.engine.close()
    return _exit_code(failed, folder, share)


def _checked(config: RunConfig, data: Lineage) -> Lineage:
    """The lineage of what a stage reads, after the consistency rules were held."""
    reason = check_consistency(
        student=config.model.student or None,
        teacher=config.model.teacher or None,
        data=data,
        needs_teacher=config.needs_teacher,
        allow_mismatch=config.lineage.allow_mismatch,
    )
    return data.model_copy(update={"allow_mismatch": reason}, deep=True)


def _exit_code(failed: int, folder: Path, share: Share) -> int:
    if failed <= share.max_failed:
        return 0
    log_line(
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
