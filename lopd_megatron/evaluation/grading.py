"""Is a response right? Graders by name."""

from __future__ import annotations

import importlib.metadata
from collections.abc import Callable
from typing import Any

from lopd_megatron.evaluation.grading_process import GradingProcess

Grade = tuple[str | None, bool]
Grader = Callable[[str, str, str], Grade]
"""(response text, finish reason, reference answer) → Grade"""

_math = GradingProcess()


def math_verify(response: str, finish_reason: str, answer: str) -> Grade:
    """Mathematical equality with the last \\boxed{} of the response, or what it calls its answer without one.

    The answer found is in one form, so that 0.5 and 1/2 are one vote. At most 4 s; see `grading_process`.
    """
    return _math.grade(response, answer)


def exact(response: str, finish_reason: str, answer: str) -> Grade:
    """The whole response, without surrounding space, is the answer."""
    return response.strip(), response.strip() == answer.strip()


def tiny(response: str, finish_reason: str, answer: str) -> Grade:
    """The tiny task: words that end with `# ANSWER`, and the model stopped by itself."""
    words = response.split()
    if finish_reason != "stop" or len(words) < 2 or words[-2] != "#":
        return None, False
    return words[-1], words[-1] == answer.strip()


GRADERS: dict[str, Grader] = {"math_verify": math_verify, "exact": exact, "tiny": tiny}

BOXED_INSTRUCTION = "\nPlease reason step by step, and put your final answer within \\boxed{}."
SUFFIXES = {"math_verify": BOXED_INSTRUCTION, "exact": "", "tiny": ""}
"""What a grader asks of the model, added to the question."""

_VERSIONS = {"math_verify": 2, "exact": 1, "tiny": 1}
"""Raised when a grader may give another grade: answers that are there are then graded again."""


def grader_identity(name: str) -> dict[str, Any]:
    """What grades depend on; stored with them."""
    identity: dict[str, Any] = {"name": name, "version": _VERSIONS[name]}
    if name == "math_verify":
        identity["math-verify"] = importlib.metadata.version("math-verify")
    return identity
