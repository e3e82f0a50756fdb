"""Accuracy on problems with known answers: pass@1, avg@k, maj@k and pass@k with standard errors."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable
from typing import Any

from lopd_megatron import estimates
from lopd_megatron.errors import UserError


def summarize(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy over problems, each the mean of its k samples (avg@k = mean pass@1), and majority vote.

    `standard_error` is that of the mean over problems, sqrt(variance of the per-problem means / (n − 1));
    it covers both the choice of problems and the sampling.
    """
    by_problem: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_problem[row["problem_id"]].append(row)
    samples = sorted({len(group) for group in by_problem.values()})
    if len(samples) != 1:
        raise UserError(f"problems have {samples} answers each, not one number of answers; evaluate again")
    k = samples[0]
    means = [sum(row["correct"] for row in group) / k for group in by_problem.values()]
    majorities = [float(_majority(group)) for group in by_problem.values()]
    passes = [float(any(row["correct"] for row in group)) for group in by_problem.values()]
    all_rows = [row for group in by_problem.values() for row in group]
    accuracy, error = estimates.mean(means)
    metrics = {
        f"{name}@{count}": estimates.mean(values)._asdict()
        for name, count, values in (
            ("pass", 1, means),
            ("avg", k, means),
            ("maj", k, majorities),
            ("pass", k, passes),
        )
    }
    return {
        "accuracy": accuracy,
        "standard_error": error,
        "num_problems": len(by_problem),
        "num_samples_per_problem": k,
        "num_correct": sum(row["correct"] for row in all_rows),
        "num_truncated": sum(row["finish_reason"] == "length" for row in all_rows),
        "num_without_answer": sum(row["extracted"] is None for row in all_rows),
        "response_tokens": sum(len(row["response_tokens"]) for row in all_rows),
        "metrics": metrics,
    }


def _majority(group: list[dict[str, Any]]) -> bool:
    """Whether the most frequent extracted answer is right; ties go to the one sampled first."""
    votes = Counter(row["extracted"] for row in group if row["extracted"] is not None)
    if not votes:
        return False
    winner = votes.most_common(1)[0][0]
    return next(row["correct"] for row in group if row["extracted"] == winner)
