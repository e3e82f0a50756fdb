"""From the configuration and the trained tokens to the named ids and the objective of the head."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import torch

from lopd_megatron.config import LossConfig
from lopd_megatron.config.objectives import objective_spec
from lopd_megatron.errors import UserError
from lopd_megatron.loss import classes, objectives
from lopd_megatron.loss.fused_head import Objective
from lopd_megatron.loss.objectives import TokenLoss
from lopd_megatron.loss.trained_tokens import TrainedTokens

BoundObjective = Callable[[TrainedTokens], tuple[torch.Tensor, Objective]]
"""The tokens of a micro-batch → ids [n, J] whose log-probs the objective takes, the label first, and it."""


def make_objective(config: LossConfig) -> BoundObjective:
    """The objective of a run, made once; it is then bound to the trained tokens of every micro-batch.

    A column that the objective reads and the dataset lacks is a UserError.
    """
    spec = objective_spec(config.objective)
    function = _import(spec.function) if isinstance(spec.function, str) else spec.function

    def bind(tokens: TrainedTokens) -> tuple[torch.Tensor, Objective]:
        for name in sorted(spec.needed_columns):
            _column(config, tokens, name)
        ids = tokens.labels[:, None]
        if spec.classes:
            ids, teacher = _token_classes(config, tokens)
            tokens = replace(tokens, teacher_class_logprobs=teacher)

        def objective(student: torch.Tensor, part: slice) -> TokenLoss:
            if spec.classes:
                return function(student, tokens.part(part), config)
            loss, weights = function(student[:, 0], tokens.part(part), config)
            return TokenLoss(loss, torch.stack([weights, torch.zeros_like(weights)], dim=1))

        return ids, objective

    return bind


def _import(place: str) -> Callable[..., TokenLoss]:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


class ClassDivergence(NamedTuple):
    """KL(π_θ ‖ π_T) of n tokens over token classes, and what the teacher's k tokens add to the whole KL."""

    reverse_kl: torch.Tensor  # [n]
    named: torch.Tensor  # [n], Σ p (log p − log q) over the k tokens
    is_outside: torch.Tensor  # bool [n], the sampled token is none of the k


def with_divergence(
    config: LossConfig, tokens: TrainedTokens, objective: Objective
) -> tuple[torch.Tensor, Objective, ClassDivergence]:
    """Ids [n, 1 + k], the same objective on them, and what it fills in when the head calls it.

    The classes are those of the objective; a sampled-token objective is measured on all k tokens of the
    dataset, and its loss and gradient stay what they are.
    """
    ids, teacher = _token_classes(config, tokens)
    is_outside = (ids != classes.ABSENT).all(1)
    found = ClassDivergence(torch.zeros_like(teacher[:, 0]), torch.zeros_like(teacher[:, 0]), is_outside)

    def measured(student: torch.Tensor, part: slice) -> TokenLoss:
        reverse_kl, terms = objectives.topk_reverse_kl(student, teacher[part])
        found.reverse_kl[part] = reverse_kl
        label = torch.where(is_outside[part], 0.0, terms[:, 0])
        found.named[part] = label + terms[:, 1:-1].sum(1)
        loss, weights = objective(student, part)
        if weights.size(1) < student.size(1):
            weights = torch.cat([weights[:, :1], torch.zeros_like(student[:, 1:])], dim=1)
        return TokenLoss(loss, weights)

    return ids, measured, found


def _token_classes(config: LossConfig, tokens: TrainedTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids of the named classes [n, 1 + k] and the teacher's log-probs [n, 1 + k + 1]."""
    topk_ids = _column(config, tokens, "teacher_topk_ids")
    topk_logprobs = _column(config, tokens, "teacher_topk_logprobs")
    k = config.topk if objective_spec(config.objective).classes else topk_ids.size(1)
    if topk_ids.size(1) < k:
        raise UserError(
            f"loss.topk={config.topk} is more than the {topk_ids.size(1)} teacher tokens per position of the "
            "dataset; lower loss.topk or score again with a larger scores.topk"
        )
    ids = classes.class_ids(tokens.labels, topk_ids[:, :k])
    label = _column(config, tokens, "teacher_logprobs")
    return ids, classes.teacher_class_logprobs(ids, label, topk_logprobs[:, :k])


def _column(config: LossConfig, tokens: TrainedTokens, name: str) -> torch.Tensor:
    column = getattr(tokens, name)
    if column is None:
        raise UserError(
            f"loss.objective={config.objective} needs the column {name}, which this dataset does not have; "
            "score the rollouts with lopd scores, or choose another objective"
        )
    return column
