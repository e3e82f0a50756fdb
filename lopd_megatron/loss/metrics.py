"""What is reported beside the loss: pairs (numerator, denominator) that pool over everything by addition.

A pair sums over micro-batches, data- and context-parallel ranks and is divided once, in `finalize_metrics`;
means of means, which would weigh a short micro-batch like a long one, cannot arise. Keys depend on the
configuration and the columns of the dataset alone, so every rank has the same ones in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from lopd_megatron.loss.objectives import clipped_advantages
from lopd_megatron.loss.trained_tokens import TrainedTokens

if TYPE_CHECKING:
    from lopd_megatron.loss.make_objective import ClassDivergence

NUM_DECILES = 10
NONFINITE = "nonfinite_tokens"
_RATIO, _RATIO_SQUARED = "importance_ratio", "importance_ratio_squared"
_ONLY_SUMS = (NONFINITE, _RATIO, _RATIO_SQUARED, "k2_squared")
"""Pairs whose quotient is no metric."""


def token_metric_sums(
    tokens: TrainedTokens,
    *,
    student_logprobs: torch.Tensor,
    entropy: torch.Tensor,
    reverse_kl: torch.Tensor | None,
    estimate: torch.Tensor | None,
    relative_position: torch.Tensor,
    advantage_clip: float | None,
) -> dict[str, torch.Tensor]:
    """Sums over the n trained tokens; every value is float64 [2]. All inputs are [n], log-probs in nats.

    `reverse_kl`: KL(π_θ ‖ π_T) over the token classes of `classes`, at least 0, where top-k was given;
    `kl_estimate`: see the function of that name;
    `log_ratio_mean`: Σ (log π_θ − log π_T) on the rollouts' tokens. It is no KL once the student has moved:
    the tokens are those of the policy that wrote them, and it turns negative when the student is farther from
    that policy than the teacher is. `k2`: Σ ½ (log π_θ − log π_T)², and `k2_squared` for its error;
    `clip_fraction`: tokens whose advantage is outside ±τ; `importance_ratio(_squared)`: π_θ/π_rollout;
    `drift_kl`: Σ (log π_rollout − log π_θ), an estimate of KL(π_rollout ‖ π_θ);
    `teacher_student_gap_decile_i`: Σ (log π_T − log π_θ) over tokens with ⌊10 · relative_position⌋ = i;
    `drift_kl_decile_i` likewise.
    Values of the teacher and of the rollout policy are there where the dataset has the column.
    """
    # Filled on the device: copying a number there would wait for it.
    count = torch.full((), tokens.count, dtype=torch.float64, device=tokens.rows.device)

    def mean_of(values: torch.Tensor) -> torch.Tensor:
        return torch.stack([values.double().sum(), count])

    metric_sums = {"student_logprobs": mean_of(student_logprobs), "entropy": mean_of(entropy)}
    if reverse_kl is not None:
        metric_sums["reverse_kl"] = mean_of(reverse_kl)
    if estimate is not None:
        metric_sums["kl_estimate"] = mean_of(estimate)
    if tokens.teacher_logprobs is not None:
        gap = tokens.teacher_logprobs - student_logprobs
        clipped = clipped_advantages(student_logprobs, tokens.teacher_logprobs, advantage_clip) != gap
        k2 = 0.5 * gap.square()
        metric_sums |= {
            "teacher_logprobs": mean_of(tokens.teacher_logprobs),
            "log_ratio_mean": mean_of(-gap),
            "k2": mean_of(k2),
            "k2_squared": mean_of(k2.square()),
            "clip_fraction": mean_of(clipped),
        } | _by_decile("teacher_student_gap_decile", gap, relative_position)
    if tokens.rollout_logprobs is not None:
        drift = tokens.rollout_logprobs - student_logprobs
        ratio = (-drift).exp()
        metric_sums |= {
            _RATIO: mean_of(ratio),
            _RATIO_SQUARED: mean_of(ratio.square()),
            "drift_kl": mean_of(drift),
        } | _by_decile("drift_kl_decile", drift, relative_position)
    return metric_sums


def kl_estimate(
    tokens: TrainedTokens, student_logprobs: torch.Tensor, divergence: ClassDivergence | None
) -> torch.Tensor | None:
    """Unbiased estimate [n] of KL(π_θ ‖ π_T) over the whole vocabulary at the states of stored rollouts.

        Σ_{v in the teacher's k} p_v (log p_v − log q_v)  +  [y is none of them] · w · (log p_y − log q_y)

    w = π_θ/π_rollout of the sampled token y: what the teacher did not name is weighed as if the student had
    sampled it. One value may be negative; the mean is unbiased for rollouts sampled at temperature 1 and
    top-p 1 that were not trained on, and its error grows as the student leaves the policy of the rollouts.
    None without log-probs of teacher and rollout policy.
    """
    if tokens.teacher_logprobs is None or tokens.rollout_logprobs is None:
        return None
    sampled = (student_logprobs - tokens.rollout_logprobs).exp() * (
        student_logprobs - tokens.teacher_logprobs
    )
    if divergence is None:
        return sampled
    return divergence.named + torch.where(divergence.is_outside, sampled, 0.0)


def _by_decile(name: str, values: torch.Tensor, relative_position: torch.Tensor) -> dict[str, torch.Tensor]:
    decile = (relative_position * NUM_DECILES).long().clamp(0, NUM_DECILES - 1)
    table = values.new_zeros(NUM_DECILES, 2, dtype=torch.float64)
    table.index_add_(0, decile, torch.stack([values.double(), torch.ones_like(values).double()], dim=1))
    return {f"{name}_{i}": table[i] for i in range(NUM_DECILES)}


def finalize_metrics(pooled: Mapping[str, torch.Tensor]) -> dict[str, float]:
    """Metrics from pairs that were summed over the whole step; a metric nobody counted is left out.

    Every pair gives its quotient under its own name. `importance_ratio` gives instead the mean and the
    standard deviation of the ratio and `effective_sample_fraction` = (Σ w)²/(n Σ w²), 1 on fresh rollouts.
    `num_tokens` is the number of trained tokens. `teacher_kl` = E[log π_rollout − log π_T] estimates
    KL(π_rollout ‖ π_T) of the policy that wrote the rollouts, whatever the student has become.
    """
    pairs = {name: (float(pair[0]), float(pair[1])) for name, pair in pooled.items()}
    metrics = {
        name: total / count
        for name, (total, count) in pairs.items()
        if count and not name.endswith(_ONLY_SUMS)
    }
    metrics["num_tokens"] = pairs["student_logprobs"][1]
    ratio_sum, count = pairs.get(_RATIO, (0.0, 0.0))
    if count:
        square_sum = pairs[_RATIO_SQUARED][0]
        mean = ratio_sum / count
        metrics["importance_ratio_mean"] = mean
        metrics["importance_ratio_std"] = max(0.0, square_sum / count - mean**2) ** 0.5
        metrics["effective_sample_fraction"] = ratio_sum**2 / (count * square_sum)
    if "log_ratio_mean" in metrics and "drift_kl" in metrics:  # over the same tokens
        metrics["teacher_kl"] = metrics["log_ratio_mean"] + metrics["drift_kl"]
    return metrics
