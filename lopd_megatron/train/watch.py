"""Signs that a run goes wrong, seen on what it trains on, within the first steps.

    k2 rises                 log π_θ leaves log π_T on the tokens that are trained: the steps are too long
    log_ratio_mean below 0   on stored tokens it is KL(π_rollout ‖ π_T) − KL(π_rollout ‖ π_θ): the student is
                             farther from the policy of the rollouts than its teacher is

Both are pooled over `WINDOW` steps and compared with their own error, so that noise does not warn.
"""

from __future__ import annotations

import math
from collections import deque

import torch

from lopd_megatron.train.state import Hook, StepResult, Trainer
from lopd_megatron.train.warning_log import WarningLog

WINDOW = 5
"""Steps that are pooled."""
FIRST = 2
"""Steps that are pooled for the first value of k2: a run that goes wrong does so at once."""
ERRORS = 5.0
"""Standard errors over tokens. Tokens of a document depend on each other, which may double the true error."""
RISE = 1.25
"""Smallest ratio of k2 to its lowest value."""
BELOW = -0.01
"""Largest log_ratio_mean in nats that counts as negative."""


class WatchHook(Hook):
    """Warns once of each sign; training goes on. No collective: the sums are the same on every rank."""

    def __init__(self, warnings: WarningLog) -> None:
        self.warnings = warnings
        self._sums: deque[torch.Tensor] = deque(maxlen=WINDOW)
        self._lowest = (math.inf, 0.0)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        sums = result.metric_sums
        if "k2" not in sums:
            return
        self._sums.append(torch.stack([sums["log_ratio_mean"][0], sums["k2_squared"][0], *sums["k2"]]))
        if len(self._sums) < FIRST:
            return
        log_ratio, k2_squared, k2, count = torch.stack(list(self._sums)).sum(0).tolist()
        log_ratio, k2_squared, k2 = log_ratio / count, k2_squared / count, k2 / count
        self._look_at_k2(trainer, k2, math.sqrt(max(0.0, k2_squared - k2**2) / count))
        error = math.sqrt(max(0.0, 2 * k2 - log_ratio**2) / count)
        if len(self._sums) == WINDOW and log_ratio < min(BELOW, -ERRORS * error):
            self.warnings.tell(
                trainer,
                "log_ratio_negative",
                f"log_ratio_mean is {log_ratio:.4f} nats over {WINDOW} iterations, below 0: the student is "
                "farther from the policy that wrote the rollouts than its teacher is; watch the held-out "
                "value, lower optimizer.lr, or sample new rollouts",
            )

    def _look_at_k2(self, trainer: Trainer, value: float, error: float) -> None:
        lowest, lowest_error = self._lowest
        if value < lowest:
            self._lowest = (value, error)
        elif (
            len(self._sums) == WINDOW
            and value > RISE * lowest
            and value - lowest > ERRORS * math.hypot(error, lowest_error)
        ):
            self.warnings.tell(
                trainer,
                "k2_rises",
                f"k2 rose from {lowest:.4g} to {value:.4g} over {WINDOW} iterations: on the tokens that are "
                "trained the student moves away from the teacher; lower optimizer.lr",
            )
