"""Is a response right? Graders by name."""

from __future__ import annotations

from collections.abc import Callable

Grade = tuple[str | None, bool]
Grader = Callable[[str, str, str], Grade]
"""(response text, finish reason, reference answer) → Grade"""


def math_verify(response: str, finish_reason: str, answer: str) -> Grade:
    """Mathematical equality of the last \\boxed{} (or plain) answer, by the math-verify package."""
    from math_verify import parse, verify

    found = parse(response, parsing_timeout=None)
    gold = parse(f"\\boxed{{{answer}}}", parsing_timeout=None)
    correct = bool(found) and bool(verify(gold, found, timeout_seconds=None))
    return (str(found[-1]) if found else None), correct


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
