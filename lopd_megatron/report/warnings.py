"""What in a run deserves a second look. A finding names the value, the limit and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lopd_megatron.config import RunConfig
from lopd_megatron.report.lineage_diagram import rules
from lopd_megatron.report.run_folder import RunFolder
from lopd_megatron.train.held_out import change

MAX_TRUNCATED = 0.10
"""Share of rollouts cut at max_response_tokens: their last tokens are trained without an end."""
MAX_CLIPPED = 0.20
"""Share of tokens beyond ±τ: the loss is no longer a regression but mostly a sign."""
MAX_WITHOUT_ANSWER = 0.10
LOWEST_STOP_LOGPROB = -4.0
"""Nats: a teacher that ends with the same token gives it most of its probability where a response is over."""
MAX_SPECIAL = 0.20
"""Share of Σ ½ (log π_rollout − log π_T)² on special tokens, which are few."""
MAX_FEWER_STOPS = 0.10


def findings(run: RunFolder) -> list[str]:
    return [*_stages(run), *_data(run), *_lineage(run), *_training(run), *_held_out(run), *_evaluation(run)]


def _stages(run: RunFolder) -> Iterator[str]:
    for name, part in (("prompts", run.prompts), ("rollouts", run.rollouts), ("scores", run.scored)):
        if part is None:
            continue
        if len(part.shards) < part.num_shards:
            yield (
                f"{name}: {len(part.shards)} of {part.num_shards} shards are finished; "
                "start the stage again to make the rest"
            )
        if part.failed:
            yield f"{name}: {part.failed:,} documents failed; their errors are in {name}/failed-*.json"


def _data(run: RunFolder) -> Iterator[str]:
    for manifest in run.datasets:
        truncated = manifest.kept.get("truncated", 0) + manifest.dropped.get("truncated", 0)
        built_from = manifest.documents + sum(manifest.dropped.values())
        if truncated > MAX_TRUNCATED * built_from:
            yield (
                f"{truncated / built_from:.0%} of the rollouts are truncated (limit {MAX_TRUNCATED:.0%}); "
                "raise rollouts.max_response_tokens, or set data.drop_truncated=true"
            )
        unusable = manifest.dropped.get("non_finite", 0)
        if unusable:
            yield f"{unusable:,} rollouts had log-probs that are not finite; look at the scoring engine"
        yield from _stops(manifest.stops)
        if "rollout_logprobs" in manifest.columns and manifest.alignment is None:
            yield "no alignment proof was made (data.alignment_sample=0); run lopd verify"


def _stops(stops: dict[str, Any] | None) -> Iterator[str]:
    if stops is None:
        return
    logprob, share = stops["teacher_logprob"], stops["special_k2_share"]
    if logprob is not None and logprob < LOWEST_STOP_LOGPROB:
        yield (
            f"the teacher's mean log-prob of the tokens that end the rollouts is {logprob:.1f} nats (limit "
            f"{LOWEST_STOP_LOGPROB:g}; ids {', '.join(stops['last_tokens'])}): it ends with another token, "
            "and the student would learn not to stop; compare eos_token_id of both generation_config.json"
        )
    if share is not None and share > MAX_SPECIAL:
        yield (
            f"{share:.0%} of the loss at the start is carried by {stops['special_tokens']:,} special tokens "
            f"(limit {MAX_SPECIAL:.0%}); compare chat template and stop tokens of student and teacher"
        )


def _held_out(run: RunFolder) -> Iterator[str]:
    found = change(run.validations)
    if found is not None and found.best is not found.after:
        since_best = change([found.best, found.after])
        if since_best is not None and since_best.verdict == "worse":
            kept = (
                "is kept"
                if found.best.iteration in run.checkpoints
                else "is not kept (checkpoint.keep_every)"
            )
            yield (
                f"the best held-out {found.best.metric} was {found.best.value:.4g} at iteration "
                f"{found.best.iteration}, the last one is {found.after.value:.4g}; that checkpoint {kept}"
            )
    before, after = (run.measurements.get(name) for name in ("before", "after"))
    if before and after:
        fall = before["stopped"]["value"] - after["stopped"]["value"]
        if fall > MAX_FEWER_STOPS:
            yield (
                f"{after['stopped']['value']:.0%} of fresh responses stop by themselves, {fall:.0%} of them "
                f"fewer than before training (limit {MAX_FEWER_STOPS:.0%}); look at the stop tokens"
            )


def _lineage(run: RunFolder) -> Iterator[str]:
    recorded = [run.data_lineage, *([run.weights] if run.weights else [])]
    reasons = {lineage.allow_mismatch for lineage in recorded} | {
        run.config.lineage.allow_mismatch if run.config else ""
    }
    for reason in sorted(reasons - {""}):
        yield f"lineage.allow_mismatch is set: “{reason}”. Rules of lineage may be broken in this run."
    for rule in rules(run):
        if rule.verdict is False:
            yield f"Broken rule: {rule.text} ({rule.detail})."


def _training(run: RunFolder) -> Iterator[str]:
    if not run.metrics or run.config is None:
        return
    config, last = run.config, run.metrics[-1]
    if last["iteration"] < config.train.train_iters:
        yield f"training stands at iteration {last['iteration']:,} of {config.train.train_iters:,}"
    for warning in run.warnings:
        yield f"iteration {warning['iteration']}: {warning['text']}"
    told = any(warning["key"] == "stale" for warning in run.warnings)
    if not run.is_sft and not told:  # answers of a teacher are never those of the student
        yield from _staleness(run.metrics, config)
    clipped = _mean(_recent(run.metrics, config), "clip_fraction")
    if clipped is not None and clipped > MAX_CLIPPED:
        yield (
            f"clip_fraction is {clipped:.0%} (limit {MAX_CLIPPED:.0%}); "
            f"loss.advantage_clip={config.loss.advantage_clip} may be too small"
        )


def _staleness(metrics: list[dict[str, Any]], config: RunConfig) -> Iterator[str]:
    recent = _recent(metrics, config)
    fraction = _mean(recent, "effective_sample_fraction")
    lowest = config.staleness.min_effective_sample_fraction
    if fraction is not None and fraction < lowest:
        yield (
            f"effective_sample_fraction is {fraction:.2f} (limit {lowest}): the rollouts are stale; sample "
            "new ones from the export, or train in rounds (docs/online.md)"
        )
    drift = _mean(recent, "drift_kl")
    if drift is not None and drift > config.staleness.max_drift_kl:
        yield (
            f"drift_kl is {drift:.3f} nats per token (limit {config.staleness.max_drift_kl}): the student "
            "has left the policy that wrote the rollouts"
        )


def _evaluation(run: RunFolder) -> Iterator[str]:
    for summary in run.evaluations:
        answers = summary["num_problems"] * summary["num_samples_per_problem"]
        for key, what in (("num_truncated", "are truncated"), ("num_without_answer", "hold no answer")):
            if summary[key] > MAX_WITHOUT_ANSWER * answers:
                yield (
                    f"evaluation of {summary['name']}: {summary[key] / answers:.0%} of the samples {what} "
                    f"(limit {MAX_WITHOUT_ANSWER:.0%})"
                )


def _recent(metrics: list[dict[str, Any]], config: RunConfig) -> list[dict[str, Any]]:
    """The lines of the last `staleness.window` iterations."""
    begin = metrics[-1]["iteration"] - config.staleness.window
    return [line for line in metrics if line["iteration"] > begin]


def _mean(lines: list[dict[str, Any]], name: str) -> float | None:
    values = [line[name] for line in lines if name in line]
    return sum(values) / len(values) if values else None
