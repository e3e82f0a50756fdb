"""What in a run deserves a second look. A finding names the value, the limit and what to do."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lopd_megatron.config import RunConfig
from lopd_megatron.report.lineage_diagram import rules
from lopd_megatron.report.run_folder import RunFolder

MAX_TRUNCATED = 0.10
"""Share of rollouts cut at max_response_tokens: their last tokens are trained without an end."""
MAX_CLIPPED = 0.20
"""Share of tokens beyond ±τ: the loss is no longer a regression but mostly a sign."""
MAX_WITHOUT_ANSWER = 0.10


def findings(run: RunFolder) -> list[str]:
    return [*_stages(run), *_data(run), *_lineage(run), *_training(run), *_evaluation(run)]


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
        if "rollout_logprobs" in manifest.columns and manifest.alignment is None:
            yield "no alignment proof was made (data.alignment_sample=0); run lopd verify"


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
    if not run.is_sft:  # answers of a teacher are never those of the student
        yield from _staleness(run.metrics, config)
    clipped = _mean(_recent(run.metrics, config), "clip_fraction")
    if clipped is not None and clipped > MAX_CLIPPED:
        yield (
            f"clip_fraction is {clipped:.0%} (limit {MAX_CLIPPED:.0%}); "
            f"loss.advantage_clip={config.loss.advantage_clip} may be too small"
        )
    if "reverse_kl" in last and last["reverse_kl"] > run.metrics[0]["reverse_kl"]:
        yield (
            f"reverse_kl rose from {run.metrics[0]['reverse_kl']:.4f} to {last['reverse_kl']:.4f}; "
            "lower optimizer.lr, and look at the lineage"
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
