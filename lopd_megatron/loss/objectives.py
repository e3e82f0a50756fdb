"""The objectives: pure functions from log-probs to a loss and its gradient weights, token by token.

Every function takes tensors of n tokens and returns `TokenLoss`. Nothing is summed or divided here, and no
function needs autograd: the weight is the derivative of the loss, written out, which is what lets the head
form the gradient of the logits in the forward pass (`fused_head`). All log-probs are natural logs in nats at
temperature 1; everything the student does not produce is a constant.

Sampled-token objectives see the log-prob [n] of the label. Top-k objectives see the log-probs [n, c] of the
token classes of `classes.py`: c − 1 named tokens and, last, everything else as one class.
"""

from __future__ import annotations

from typing import NamedTuple

import torch


class TokenLoss(NamedTuple):
    """`loss` [n] in nats; `weights` = ∂loss/∂log-prob, [n] or [n, c] like the student's log-probs."""

    loss: torch.Tensor
    weights: torch.Tensor


def sft(student_logprobs: torch.Tensor) -> TokenLoss:
    """−log π_θ(y): maximum likelihood of the sampled token."""
    return TokenLoss(-student_logprobs, -torch.ones_like(student_logprobs))


def clipped_advantages(
    student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, advantage_clip: float | None
) -> torch.Tensor:
    """A = clip(log π_T(y) − log π_θ(y), ±τ), a constant of the step. [n], nats.

    Lightning OPD, arXiv 2604.13010, Eq. 2 and Algorithm 1 (τ = 10); the released code does not clip (None).
    """
    advantages = teacher_logprobs - student_logprobs.detach()
    return advantages if advantage_clip is None else advantages.clamp(-advantage_clip, advantage_clip)


def lightning_opd(
    student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, advantage_clip: float | None
) -> TokenLoss:
    """−A·log π_θ(y), with A = `clipped_advantages` and no importance weight.

    Its gradient is that of ½ (log π_θ − log π_T)², with the clip that of the Huber function with threshold τ.
    Lightning OPD, arXiv 2604.13010, Eq. 4.
    """
    advantages = clipped_advantages(student_logprobs, teacher_logprobs, advantage_clip)
    return TokenLoss(-advantages * student_logprobs, -advantages)


def opd_importance(
    student_logprobs: torch.Tensor,
    teacher_logprobs: torch.Tensor,
    rollout_logprobs: torch.Tensor,
    *,
    advantage_clip: float | None,
    importance_clip: float,
    ppo_clip: float,
) -> TokenLoss:
    """max(−ρA, −clip(ρ, 1 − ε, 1 + ε)·A), ρ = min(π_θ/π_rollout, c): the PPO form, for comparison.

    The truncation at c is a constant factor: dρ/d log π_θ = ρ, also above c. PPO, arXiv 1707.06347, Eq. 7.
    """
    advantages = clipped_advantages(student_logprobs, teacher_logprobs, advantage_clip)
    ratio = (student_logprobs - rollout_logprobs).exp().clamp(max=importance_clip)
    open_loss = -ratio * advantages
    clipped_loss = -ratio.clamp(1 - ppo_clip, 1 + ppo_clip) * advantages
    # Where the clipped branch is the larger one, ρ lies outside the band and the clip is flat.
    weights = torch.where(open_loss >= clipped_loss, open_loss, 0.0)
    return TokenLoss(torch.maximum(open_loss, clipped_loss), weights)


def _weighted(probabilities: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """probabilities · values with 0 · ±∞ = 0: an absent class has probability 0 and log-prob −∞."""
    return torch.where(probabilities > 0, probabilities * values, 0.0)


def topk_forward_kl(student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> TokenLoss:
    """KL(π_T ‖ π_θ) = Σ_c q_c (log q_c − log p_c) over the token classes."""
    q = teacher_logprobs.exp()
    return TokenLoss(_weighted(q, teacher_logprobs - student_logprobs).sum(-1), -q)


def topk_reverse_kl(student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor) -> TokenLoss:
    """KL(π_θ ‖ π_T) = Σ_c p_c (log p_c − log q_c) over the token classes.

    The derivative of p log p has one more term, p itself; Σ p = 1, so it moves no logit and is left out,
    which makes the weights vanish exactly where student and teacher agree.
    """
    divergence = _weighted(student_logprobs.exp(), student_logprobs - teacher_logprobs)
    return TokenLoss(divergence.sum(-1), divergence)


def topk_jsd(student_logprobs: torch.Tensor, teacher_logprobs: torch.Tensor, beta: float) -> TokenLoss:
    """β·KL(π_T ‖ m) + (1 − β)·KL(π_θ ‖ m), m = β π_T + (1 − β) π_θ, over the token classes.

    Generalised Jensen-Shannon divergence, arXiv 2306.13649 (GKD), Sec. 3. As p → q it tends to
    β (1 − β)/2 · Σ (p − q)²/q: β = ½ is the symmetric form, whose largest value is log 2.
    """
    q, p = teacher_logprobs.exp(), student_logprobs.exp()
    mixture = (beta * q + (1 - beta) * p).log()
    from_teacher = beta * _weighted(q, teacher_logprobs - mixture)
    from_student = (1 - beta) * _weighted(p, student_logprobs - mixture)
    return TokenLoss((from_teacher + from_student).sum(-1), from_student)
