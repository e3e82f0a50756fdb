"""Means and ratios with their standard errors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np


class Estimate(NamedTuple):
    """A number and the standard error of it."""

    value: float
    standard_error: float


def mean(values: Sequence[float]) -> Estimate:
    """Mean of n values, with √(variance / n); the error of a single value is 0."""
    n = len(values)
    center = sum(values) / n
    if n == 1:
        return Estimate(center, 0.0)
    return Estimate(center, math.sqrt(sum((value - center) ** 2 for value in values) / (n - 1) / n))


def ratio(sums: Sequence[float] | np.ndarray, counts: Sequence[float] | np.ndarray) -> Estimate:
    """Σ sums / Σ counts over d documents, [d] each, with `ratio_error`."""
    total, count = np.asarray(sums, np.float64), np.asarray(counts, np.float64)
    value = float(total.sum() / count.sum())
    return Estimate(value, ratio_error(total - value * count, count))


def ratio_error(residuals: np.ndarray, counts: np.ndarray) -> float:
    """Standard error of r = Σs/Σn from the residuals s − r·n of d documents; infinite for one document.

    √(Σ residual² · d/(d − 1)) / Σn, the linearised ratio estimator: tokens of a document depend on each
    other, documents do not.
    """
    d = len(residuals)
    if d < 2:
        return math.inf
    return float(np.sqrt((residuals**2).sum() * d / (d - 1)) / counts.sum())
