"""How far to go along the direction of the last updates: the search of EffOPD (arXiv 2605.11739, 4.1).

With W the trained weights and Δ their distance from the last accepted ones, the candidates are W + 2k·Δ for
k = 1 … max_k. The first candidate that does not pass ends the search; the last one that passed is taken.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

Acceptance = Literal["at_least", "strict"]


@dataclass(frozen=True)
class HeldOutScore:
    """A held-out measurement of the weights in the model; larger is better."""

    value: float
    standard_error: float
    """The error of `value`, from the spread over documents or problems."""
    count: int
    """Documents or problems behind it."""


@dataclass(frozen=True)
class Trial:
    """One scored point W + multiplier·Δ."""

    multiplier: int
    score: HeldOutScore


@dataclass(frozen=True)
class SearchResult:
    """The multiplier to use, 0 where no candidate passed, and every point that was scored, in order."""

    multiplier: int
    trials: tuple[Trial, ...]

    @property
    def score(self) -> HeldOutScore:
        """Of the point that was taken."""
        return next(trial.score for trial in self.trials if trial.multiplier == self.multiplier)


def is_trigger(iteration: int, first_trigger: int) -> bool:
    """Whether a search follows this completed iteration: the powers of two from `first_trigger` on."""
    return iteration >= first_trigger and iteration & (iteration - 1) == 0


def search(score: Callable[[int], HeldOutScore], *, max_k: int, acceptance: Acceptance) -> SearchResult:
    """Walk outwards while the score holds. Calls `score(0)` and then at most `max_k` candidates.

    `at_least` (the paper) takes a candidate as good as the best so far, `strict` (the released code) only a
    better one; with few binary problems ties are common, so the two differ. Because multiplier 0 is scored
    too, the result is never worse than plain training on this score. A candidate whose score is not finite
    has diverged and fails; ValueError where the trained weights themselves have no finite score.
    """
    trials = [Trial(0, score(0))]
    best = trials[0]
    if not math.isfinite(best.score.value):
        raise ValueError(f"the trained weights have no finite score: {best.score}")
    for k in range(1, max_k + 1):
        trial = Trial(2 * k, score(2 * k))
        trials.append(trial)
        if not _passes(trial.score.value, best.score.value, acceptance):
            break
        best = trial
    return SearchResult(best.multiplier, tuple(trials))


def _passes(value: float, best: float, acceptance: Acceptance) -> bool:
    return math.isfinite(value) and (value >= best if acceptance == "at_least" else value > best)
