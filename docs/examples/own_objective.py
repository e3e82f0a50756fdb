"""An objective and a hook of your own, and the recipe that uses them. Nothing in the package is edited.

    lopd train docs/examples/own_objective.py:confident --dry-run

Copy this file anywhere. It needs the demo's SFT student and its scored rollouts: run `make demo` first.
"""

from __future__ import annotations

import torch

from lopd_megatron.config import LossConfig, RunConfig
from lopd_megatron.config.objectives import ObjectiveSpec
from lopd_megatron.loss import TokenLoss
from lopd_megatron.loss.trained_tokens import TrainedTokens
from lopd_megatron.progress import log_line
from lopd_megatron.recipes import tiny
from lopd_megatron.train.state import Hook, StepResult, Trainer

THRESHOLD = 0.1


def confident_teacher(student: torch.Tensor, tokens: TrainedTokens, config: LossConfig) -> TokenLoss:
    """½ (log π_θ − log π_T)² where the teacher gives the token at least THRESHOLD, else 0.

    Returns the loss [c] in nats and its derivative by `student`, the log-probs [c] of the sampled tokens.
    The derivative is written out, because the head needs it in the forward pass.
    """
    teacher = tokens.column("teacher_logprobs")
    gap = torch.where(teacher.exp() >= THRESHOLD, student - teacher, 0.0)
    return TokenLoss(0.5 * gap.square(), gap)


OBJECTIVE = ObjectiveSpec(confident_teacher, columns=frozenset({"teacher_logprobs"}))


class LargestGradient(Hook):
    """Keeps the largest gradient norm and prints it at the end."""

    def __init__(self, config: RunConfig) -> None:
        self.largest = 0.0

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        self.largest = max(self.largest, result.grad_norm)

    def on_end(self, trainer: Trainer) -> None:
        if trainer.topology.rank == 0:
            log_line(f"largest gradient norm: {self.largest:.3f}")


def confident(root: str = tiny.DEMO) -> RunConfig:
    """The demo's distillation with this objective, on the dataset that the demo has built."""
    config = tiny.lightning_opd(root)
    config.name = "confident"
    config.run_dir = f"{root}/confident"
    config.data.prefixes = [f"{root}/lightning_opd/dataset/train"]
    config.loss.objective = "own_objective:OBJECTIVE"
    config.train.hooks = ["own_objective:LargestGradient"]
    return config
