"""Grading and the statistics of an evaluation."""

from __future__ import annotations

import math

import pytest

from lopd_megatron.evaluation.accuracy import summarize
from lopd_megatron.evaluation.grading import GRADERS


@pytest.mark.processes
@pytest.mark.parametrize(
    ("grader", "response", "reason", "answer", "extracted", "correct"),
    [
        ("math_verify", r"so the answer is \boxed{\frac{1}{2}}.", "stop", "0.5", "1/2", True),
        ("math_verify", r"first \boxed{3}, no: \boxed{204}", "stop", "204", "204", True),
        ("math_verify", r"\boxed{0.5}", "stop", r"\frac{1}{2}", "1/2", True),
        ("math_verify", "the answer is 72", "stop", "72", "72", True),
        ("math_verify", r"\boxed{7} and then \boxed{1", "length", "7", "7", True),
        ("math_verify", r"\boxed{205}", "stop", "204", "205", False),
        ("math_verify", "I do not know", "length", "204", None, False),
        ("math_verify", r"\boxed{103}", "stop", "103", "103", True),
        ("exact", " 7 \n", "stop", "7", "7", True),
        ("tiny", "3 + 4 = 7 # 7", "stop", "7", "7", True),
        ("tiny", "3 + 4 = 7 # 7", "length", "7", None, False),
        ("tiny", "3 + 4 = 7 7", "stop", "7", None, False),
        ("tiny", "# 8", "stop", "7", "8", False),
        ("tiny", "7", "stop", "7", None, False),
        ("tiny", "", "stop", "7", None, False),
    ],
)
def test_graders(
    grader: str, response: str, reason: str, answer: str, extracted: str | None, correct: bool
) -> None:
    assert GRADERS[grader](response, reason, answer) == (extracted, correct)


def rows(*problems: str) -> list[dict]:
    """One row per letter: an answer; capital means that it is right, a dot that none was found."""
    return [
        {
            "problem_id": str(number),
            "sample_index": sample,
            "response_tokens": [1, 2],
            "finish_reason": "stop",
            "extracted": None if letter == "." else letter.lower(),
            "answer": "x",
            "correct": letter.isupper(),
        }
        for number, letters in enumerate(problems)
        for sample, letter in enumerate(letters)
    ]


def test_summary_by_hand() -> None:
    summary = summarize(rows("AAbb", "Abbc", "....", "AAAA"))
    means = [0.5, 0.25, 0.0, 1.0]
    mean = sum(means) / 4
    error = math.sqrt(sum((m - mean) ** 2 for m in means) / 3 / 4)
    assert summary["accuracy"] == pytest.approx(mean)
    assert summary["standard_error"] == pytest.approx(error)
    assert summary["metrics"]["avg@4"]["value"] == pytest.approx(mean)
    # "AAbb" is a tie, won by the answer sampled first; "Abbc" has a wrong majority.
    assert summary["metrics"]["maj@4"]["value"] == pytest.approx(0.5)
    assert summary["metrics"]["pass@4"]["value"] == pytest.approx(0.75)
    assert summary["metrics"]["pass@1"]["value"] == pytest.approx(mean)
    assert (summary["num_problems"], summary["num_samples_per_problem"]) == (4, 4)
    assert (summary["num_correct"], summary["num_without_answer"]) == (7, 4)


def test_standard_error_is_that_of_repeated_evaluations() -> None:
    """Many evaluations of a model with known chances scatter as the mean of their standard errors says."""
    import random

    draw = random.Random(0)
    means, errors = [], []
    for _ in range(400):
        chances = [draw.random() for _ in range(30)]
        summary = summarize(
            rows(*("".join("A" if draw.random() < p else "b" for _ in range(4)) for p in chances))
        )
        means.append(summary["accuracy"])
        errors.append(summary["standard_error"])
    mean = sum(means) / len(means)
    scatter = math.sqrt(sum((m - mean) ** 2 for m in means) / (len(means) - 1))
    # 400 evaluations give the scatter to 1/√800 = 3.5 %; four of these.
    assert sum(errors) / len(errors) == pytest.approx(scatter, rel=0.14)
