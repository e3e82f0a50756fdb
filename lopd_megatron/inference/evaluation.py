"""Accuracy of a model on problems with known answers: avg@k, maj@k and pass@k with standard errors."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from lopd_megatron.config import EvaluationConfig
from lopd_megatron.errors import UserError
from lopd_megatron.inference.grading import GRADERS, SUFFIXES
from lopd_megatron.inference.prompts import Template
from lopd_megatron.inference.requests import Engine, Failure, GenerationRequest, Sampling, document_seed
from lopd_megatron.inference.sources import read_rows


def read_problems(config: EvaluationConfig, template: Template) -> list[dict[str, Any]]:
    """`problem_id`, `prompt_tokens`, `answer` of every problem, in the order of the files."""
    if not config.input:
        raise UserError("evaluation.input is empty; set it to jsonl files with questions and answers")
    problems = []
    for path in config.input:
        for number, row in enumerate(read_rows(path)):
            if row.answer is None:
                raise UserError(f"{path} row {number} has no answer; evaluation needs one for every problem")
            tokens = template.tokens(row.content, SUFFIXES[config.grader])
            name = f"{Path(path).stem}/{number}"
            problems.append({"problem_id": name, "prompt_tokens": tokens, "answer": row.answer})
    return problems


def evaluate(
    engine: Engine,
    tokenizer: Any,
    problems: Sequence[dict[str, Any]],
    config: EvaluationConfig,
    stop_token_ids: tuple[int, ...],
) -> list[dict[str, Any]]:
    """Sample and grade; one row of PROBLEM_RESULT_SCHEMA per response, in order."""
    sampling = Sampling(config.temperature, config.top_p, config.max_response_tokens, stop_token_ids)
    requests = (
        GenerationRequest(
            (index, sample),
            problem["prompt_tokens"],
            document_seed(config.seed, f"{problem['problem_id']}/{sample}"),
        )
        for index, problem in enumerate(problems)
        for sample in range(config.num_samples_per_problem)
    )
    grader = GRADERS[config.grader]
    rows = []
    for answer in sorted(engine.generate(requests, sampling), key=lambda a: a.key):
        index, sample = answer.key
        if isinstance(answer, Failure):
            raise UserError(f"problem {problems[index]['problem_id']}: {answer.error}")
        text = tokenizer.decode(answer.response_tokens, skip_special_tokens=True)
        extracted, correct = grader(text, answer.finish_reason, problems[index]["answer"])
        rows.append(
            {
                "problem_id": problems[index]["problem_id"],
                "sample_index": sample,
                "response_tokens": answer.response_tokens,
                "finish_reason": answer.finish_reason,
                "extracted": extracted,
                "answer": problems[index]["answer"],
                "correct": correct,
            }
        )
    return rows


def summarize(rows: Iterable[dict[str, Any]]) -> dict[str, Any]:
    """Accuracy over problems, each the mean of its k samples (avg@k = mean pass@1), and majority vote.

    `standard_error` is that of the mean over problems, sqrt(variance of the per-problem means / (n − 1));
    it covers both the choice of problems and the sampling.
    """
    by_problem: dict[str, list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        by_problem[row["problem_id"]].append(row)
    samples = {len(group) for group in by_problem.values()}
    assert len(samples) == 1, samples
    k = samples.pop()
    means = [sum(row["correct"] for row in group) / k for group in by_problem.values()]
    majorities = [float(_majority(group)) for group in by_problem.values()]
    passes = [float(any(row["correct"] for row in group)) for group in by_problem.values()]
    all_rows = [row for group in by_problem.values() for row in group]
    accuracy, error = _mean_and_error(means)
    metrics = {
        f"{name}@{count}": dict(zip(("value", "standard_error"), _mean_and_error(values), strict=True))
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


def _mean_and_error(values: list[float]) -> tuple[float, float]:
    n = len(values)
    mean = sum(values) / n
    if n == 1:
        return mean, 0.0
    return mean, math.sqrt(sum((value - mean) ** 2 for value in values) / (n - 1) / n)
