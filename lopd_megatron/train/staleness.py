"""Are the rollouts still those of the student? Three signs, and advice when they should be made anew.

Lightning OPD trains on rollouts of the student it started from. Its gradient differs from that of standard
OPD by the covariance with π_θ/π_rollout (arXiv 2604.13010, Theorem 3.7), which cannot be measured for whole
responses. Per token, from sums that training reports anyway:

    effective_sample_fraction   (Σ w)² / (n Σ w²), w = π_θ/π_rollout: 1 on fresh rollouts
    drift_kl                    E[log π_rollout − log π_θ], nats: 0 on fresh rollouts; also by position
    valid_k2                    ½ (log π_θ − log π_T)² held out: rises when only replayed tokens still fit
"""

from __future__ import annotations

from collections import deque

import torch

from lopd_megatron.config import StalenessConfig
from lopd_megatron.progress import say
from lopd_megatron.train.state import Hook, StepResult, Trainer


class StalenessHook(Hook):
    """Adds `refresh_advised` (0 or 1) to the report and says once why; training goes on.

    The first two signs are pooled over the last `window` steps. The held-out one is the rise of `valid_k2`
    over its smallest value, where the run validates. No collective: the report is the same on every rank.
    Place it behind the hook that validates and before the one that logs.
    """

    def __init__(self, config: StalenessConfig) -> None:
        self.config = config
        self._sums: deque[torch.Tensor] = deque(maxlen=config.window)
        self._best_held_out = float("inf")
        self._told = False

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        report = result.report
        if "drift_kl" not in report:
            return  # no rollout log-probs in this dataset
        self._sums.append(
            torch.stack(
                [report["importance_ratio"][0], report["importance_ratio_squared"][0], *report["drift_kl"]]
            )
        )
        reason = self._reason(report)
        report["refresh_advised"] = torch.tensor([float(bool(reason)), 1.0], dtype=torch.float64)
        if reason and not self._told and trainer.topology.rank == 0:
            say(
                f"iteration {trainer.iteration}: the rollouts are stale, {reason}; sample new ones from the "
                "exported student (launch.refresh), or go on and watch the held-out score"
            )
        self._told = self._told or bool(reason)

    def _reason(self, report: dict[str, torch.Tensor]) -> str:
        ratio, squared, drift, count = torch.stack(list(self._sums)).sum(0).tolist()
        limits = self.config
        if len(self._sums) == limits.window:
            fraction = ratio**2 / (count * squared)
            if fraction < limits.min_effective_sample_fraction:
                return (
                    f"effective_sample_fraction {fraction:.2f} is under "
                    f"staleness.min_effective_sample_fraction={limits.min_effective_sample_fraction}"
                )
            if drift / count > limits.max_drift_kl:
                return (
                    f"drift_kl {drift / count:.3f} nats is over staleness.max_drift_kl={limits.max_drift_kl}"
                )
        return self._held_out(report)

    def _held_out(self, report: dict[str, torch.Tensor]) -> str:
        if "valid_k2" not in report:
            return ""
        total, count = report["valid_k2"].tolist()
        value = total / count
        self._best_held_out = min(self._best_held_out, value)
        if value <= (1 + self.config.max_held_out_rise) * self._best_held_out:
            return ""
        return (
            f"valid_k2 rose to {value:.4g} from {self._best_held_out:.4g}, more than "
            f"staleness.max_held_out_rise={self.config.max_held_out_rise}"
        )
