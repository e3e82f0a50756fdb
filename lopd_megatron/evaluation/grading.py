"""Is a response right? Graders by name."""

from __future__ import annotations

import re
from collections.abc import Callable

Grade = tuple[str | None, bool]
Grader = Callable[[str, str, str], Grade]
"""(response text, finish reason, reference answer) → Grade"""


def math_verify(response: str, finish_reason: str, answer: str) -> Grade:
    """Mathematical equality with the last \\boxed{} of the response, or its last number where it has none.

    The answer found is in sympy's form, so that 0.5 and 1/2 are one vote. Uses the math-verify package, whose
    time limits need the main thread.
    """
    from math_verify import parse, verify

    found = parse(last_boxed(response) or response)
    gold = parse(f"\\boxed{{{answer}}}")
    return (str(found[0]) if found else None), bool(found) and bool(verify(gold, found))


def last_boxed(text: str) -> str | None:
    """The last \\boxed{...} whose braces are closed."""
    for match in reversed(list(re.finditer(r"\\boxed\{", text))):
        depth = 1
        for end in range(match.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0)
            if depth == 0:
                return text[match.start() : end + 1]
    return None


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
