"""Numbers of a study: means with 95 % intervals over seeds, paired differences, verdicts on claims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lopd_megatron import estimates

Result = dict[str, Any]
"""What result.json of a cell holds."""
Results = dict[str, dict[int, Result]]
"""Cell → seed → result."""
Metric = Callable[[Result], float | None]

# Student's t at 97.5 %, by degrees of freedom from 1; 1.96 beyond.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228, 2.201, 2.179, 2.160, 2.145)


@dataclass(frozen=True)
class Interval:
    """Mean of n seeds and half the width of its 95 % interval (Student's t); None with one seed."""

    mean: float
    half: float | None
    count: int

    def text(self, scale: float = 1.0, digits: int = 1) -> str:
        if self.half is None:
            return f"{scale * self.mean:.{digits}f}"
        return f"{scale * self.mean:.{digits}f} ± {scale * self.half:.{digits}f}"


def interval(values: Sequence[float]) -> Interval | None:
    """None where there is no value."""
    n = len(values)
    if n == 0:
        return None
    mean, error = estimates.mean(values)
    if n == 1:
        return Interval(mean, None, 1)
    t = _T[n - 2] if n - 2 < len(_T) else 1.96
    return Interval(mean, t * error, n)


def over_seeds(results: Results, cell: str, metric: Metric) -> Interval | None:
    """A metric of a cell over the seeds that have it."""
    values = [metric(result) for _, result in sorted(results.get(cell, {}).items())]
    return interval([value for value in values if value is not None])


def quality(name: Literal["greedy", "sampled", "reverse_kl"]) -> Metric:
    """An end result on the test problems."""
    return lambda result: result["test"][name]["value"]


def total_seconds(result: Result) -> float:
    """Everything the method costs after the SFT student: rollouts, scores, training."""
    return sum(result["seconds"].values())


def at_iteration(iteration: int) -> Metric:
    """Greedy validation accuracy after some iterations."""

    def metric(result: Result) -> float | None:
        return next((p["value"] for p in result["curve"] if p["iteration"] == iteration), None)

    return metric


def at_end(result: Result) -> float | None:
    """Greedy validation accuracy at the last point of the curve."""
    return result["curve"][-1]["value"] if result["curve"] else None


def until(accuracy: float, what: Literal["iteration", "seconds"]) -> Metric:
    """Iterations or seconds to the first point of the curve with this accuracy; None if there is none."""

    def metric(result: Result) -> float | None:
        return next((p[what] for p in result["curve"] if p["value"] >= accuracy), None)

    return metric


@dataclass(frozen=True)
class Claim:
    """`better` − `worse` of a metric, seed by seed, should be more than −`margin`.

    With `less` the second pair of cells is subtracted: a difference of differences.
    """

    source: str
    text: str
    better: str
    worse: str
    metric: Metric
    unit: str
    scale: float = 1.0
    margin: float = 0.0
    less: tuple[str, str] | None = None

    def cells(self) -> tuple[str, ...]:
        return (self.better, self.worse, *(self.less or ()))

    def difference(self, results: Results) -> Interval | None:
        """Over the seeds that have all cells."""
        seeds = set.intersection(*(set(results.get(cell, {})) for cell in self.cells()))
        values = []
        for seed in sorted(seeds):
            found = [self.metric(results[cell][seed]) for cell in self.cells()]
            if None not in found:
                numbers = [float(value) for value in found if value is not None]
                values.append(
                    sum(
                        sign * value
                        for sign, value in zip((1, -1, -1, 1)[: len(numbers)], numbers, strict=True)
                    )
                )
        return interval(values)

    def verdict(self, results: Results) -> str:
        """Decided by the 95 % interval of the paired difference."""
        found = self.difference(results)
        if found is None:
            return "not run"
        if found.half is None:
            return "one seed: open"
        if found.mean - found.half > -self.margin:
            return "**holds**"
        if found.mean + found.half < -self.margin:
            return "**does not hold**"
        return "open"
