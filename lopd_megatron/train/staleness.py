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
from lopd_megatron.train.state import Hook, StepResult, Trainer
from lopd_megatron.train.warning_log import WarningLog


class StalenessHook(Hook):
    """Adds `refresh_advised` (0 or 1) to the metrics and warns once why; training goes on.

    The first two signs are pooled over the last `window` steps. The held-out one is the rise of `valid_k2`
    over its smallest value, where the run validates. No collective: the sums are the same on every rank.
    Place it behind the hook that validates and before the one that logs.
    """

    def __init__(self, config: StalenessConfig, warnings: WarningLog) -> None:
        self.config = config
        self.warnings = warnings
        self._sums: deque[torch.Tensor] = deque(maxlen=config.window)
        self._best_held_out = float("inf")

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        sums = result.metric_sums
        if "drift_kl" not in sums:
            return  # no rollout log-probs in this dataset
        self._sums.append(
            torch.stack([sums["importance_ratio"][0], sums["importance_ratio_squared"][0], *sums["drift_kl"]])
        )
        reason = self._reason(sums)
        sums["refresh_advised"] = torch.tensor([float(bool(reason)), 1.0], dtype=torch.float64)
        if reason:
            self.warnings.tell(
                trainer,
                "stale",
                f"the rollouts are stale, {reason}; sample new ones from the exported student "
                "(launch.refresh), or go on and watch the held-out value",
            )

    def _reason(self, sums: dict[str, torch.Tensor]) -> str:
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
        return self._held_out(sums)

    def _held_out(self, sums: dict[str, torch.Tensor]) -> str:
        if "valid_k2" not in sums:
            return ""
        total, count = sums["valid_k2"].tolist()
        value = total / count
        self._best_held_out = min(self._best_held_out, value)
        if value <= (1 + self.config.max_held_out_rise) * self._best_held_out:
            return ""
        return (
            f"valid_k2 rose to {value:.4g} from {self._best_held_out:.4g}, more than "
            f"staleness.max_held_out_rise={self.config.max_held_out_rise}"
        )
