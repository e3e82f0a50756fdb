"""Fit of the constants to published runs, and its cross-validation."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from lopd_megatron.performance.constants import Constants
from lopd_megatron.performance.published import Row
from lopd_megatron.performance.step_time import StepModel

PRIOR_WIDTH = 0.35
"""Standard deviation of the logarithm of a constant around its prior."""
NOISE = 0.06
"""Standard deviation of log(predicted / published) that counts as agreement."""
ROBUST = 2.0
"""Errors beyond this many times the noise count linearly (Huber)."""


def log_ratios(rows: Sequence[Row], constants: Constants) -> NDArray[np.float64]:
    """log(predicted / published) of every row."""
    model = StepModel(constants)
    return np.array([math.log(row.predicted(model) / row.tokens_per_second) for row in rows])


def weights(rows: Sequence[Row]) -> NDArray[np.float64]:
    """1/√n for a run that n releases repeat: releases of one run are not independent."""
    keys = [row.label.split(" ", 1)[1] for row in rows]
    return np.array([1 / math.sqrt(keys.count(key)) for key in keys])


def fit(rows: Sequence[Row], *, start: Constants | None = None, iterations: int = 12) -> Constants:
    """Constants that minimise Huber errors of the rows and squared distance from the priors.

    Gauss-Newton with Levenberg damping on the logarithms of the constants; differences are numeric.
    """
    prior = np.array(Constants().logs())
    x = np.array((start or Constants()).logs())
    scale = weights(rows) / NOISE
    damping = 1e-2

    def residuals(point: NDArray[np.float64]) -> NDArray[np.float64]:
        return log_ratios(rows, Constants.from_logs(list(point)))

    def cost(values: NDArray[np.float64], point: NDArray[np.float64]) -> float:
        size = np.abs(values) / NOISE
        huber = np.where(size < ROBUST, size**2, 2 * ROBUST * size - ROBUST**2)
        return float(huber @ (weights(rows)) ** 2 + (((point - prior) / PRIOR_WIDTH) ** 2).sum())

    errors = residuals(x)
    best = cost(errors, x)
    for _ in range(iterations):
        step = 1e-4
        jacobian = np.column_stack([(residuals(x + step * unit) - errors) / step for unit in np.eye(x.size)])
        size = np.abs(errors) / NOISE
        robust = np.sqrt(np.where(size < ROBUST, 1.0, ROBUST / np.maximum(size, 1e-9)))
        a = np.vstack([jacobian * (scale * robust)[:, None], np.eye(x.size) / PRIOR_WIDTH])
        b = np.concatenate([errors * scale * robust, (x - prior) / PRIOR_WIDTH])
        for _ in range(8):
            damped = np.vstack([a, math.sqrt(damping) * np.eye(x.size)])
            move = -np.linalg.lstsq(damped, np.concatenate([b, np.zeros(x.size)]), rcond=None)[0]
            tried = residuals(x + move)
            value = cost(tried, x + move)
            if value < best:
                damping /= 3
                break
            damping *= 4
        else:
            break
        done = best - value < 1e-4 * best
        x, errors, best = x + move, tried, value
        if done:
            break
    return Constants.from_logs(list(x))


def leave_one_out(rows: Sequence[Row], group: Sequence[str], start: Constants) -> NDArray[np.float64]:
    """log(predicted / published) of every row by constants fitted without the rows of its group."""
    found = np.zeros(len(rows))
    for name in sorted(set(group)):
        inside = [n for n, key in enumerate(group) if key == name]
        others = [row for row, key in zip(rows, group, strict=True) if key != name]
        found[inside] = log_ratios([rows[n] for n in inside], fit(others, start=start))
    return found


def summary(ratios: NDArray[np.float64]) -> dict[str, float]:
    """Median and 90th percentile of |predicted / published − 1|."""
    errors = np.abs(np.exp(ratios) - 1)
    return {
        "median_abs_rel_error": round(float(np.median(errors)), 4),
        "p90_abs_rel_error": round(float(np.quantile(errors, 0.9)), 4),
    }
