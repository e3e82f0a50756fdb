"""The functions of the table `config.objectives.OBJECTIVES`: each hands its columns to a pure objective."""

from __future__ import annotations

import torch

from lopd_megatron.config import LossConfig
from lopd_megatron.loss import objectives
from lopd_megatron.loss.objectives import TokenLoss
from lopd_megatron.loss.trained_tokens import TrainedTokens


def sft(student: torch.Tensor, tokens: TrainedTokens, config: LossConfig) -> TokenLoss:
    return objectives.sft(student)


def lightning_opd(student: torch.Tensor, tokens: TrainedTokens, config: LossConfig) -> TokenLoss:
    return objectives.lightning_opd(student, tokens.column("teacher_logprobs"), config.advantage_clip)


def opd_importance(student: torch.Tensor, tokens: TrainedTokens, config: LossConfig) -> TokenLoss:
    return objectives.opd_importance(
        student,
        tokens.column("teacher_logprobs"),
        tokens.column("rollout_logprobs"),
        advantage_clip=config.advantage_clip,
        importance_clip=config.importance_clip,
        ppo_clip=config.ppo_clip,
    )


def topk_forward_kl(student: torch.Tensor, tokens: TrainedTokens, config: LossConfig) -> TokenLoss:
    return objectives.topk_forward_kl(student, tokens.column("teacher_class_logprobs"))


def topk_reverse_kl(student: torch.Tensor, tokens: TrainedTokens, config: LossConfig) -> TokenLoss:
    return objectives.topk_reverse_kl(student, tokens.column("teacher_class_logprobs"))


def topk_jsd(student: torch.Tensor, tokens: TrainedTokens, config: LossConfig) -> TokenLoss:
    return objectives.topk_jsd(student, tokens.column("teacher_class_logprobs"), config.jsd_beta)
