"""The hooks that decide when to save and when to stop."""

from __future__ import annotations

import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from lopd_megatron import plugins
from lopd_megatron.config import RunConfig
from lopd_megatron.progress import say
from lopd_megatron.train.state import Hook, StepResult, Trainer


def own_hooks(config: RunConfig) -> list[Hook]:
    """The hooks that `train.hooks` names, each made with the configuration of the run."""
    classes: list[Any] = [plugins.load_class(name, Hook, "train.hooks") for name in config.train.hooks]
    return [own(config) for own in classes]


class StopHook(Hook):
    """Stop after the step in which SIGTERM or SIGUSR1 came, or the time limit passed.

    Stops all ranks after the same step, through one all-reduce of one number a step.
    """

    REASONS = ("", "SIGUSR1", "SIGTERM", "train.exit_duration_in_mins")

    def __init__(self, exit_duration_in_mins: float | None) -> None:
        self.limit_s = float("inf") if exit_duration_in_mins is None else 60 * exit_duration_in_mins
        self.start = time.monotonic()
        self.reason = 0
        # A second signal of the same kind changes nothing: launchers and Slurm may both send one.
        signal.signal(signal.SIGTERM, self._on_signal)
        signal.signal(signal.SIGUSR1, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        self.reason = max(self.reason, self.REASONS.index(signal.Signals(number).name))

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if time.monotonic() - self.start > self.limit_s:
            self.reason = max(self.reason, len(self.REASONS) - 1)
        flag = torch.tensor([self.reason], dtype=torch.int32, device=trainer.topology.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        trainer.stop_reason = self.REASONS[int(flag)]
        if trainer.stop_reason and trainer.topology.rank == 0 and not trainer.is_done:
            say(f"stopping after iteration {trainer.iteration}: {trainer.stop_reason}")


class SaveHook(Hook):
    """Save every `save_interval` iterations, and whenever the run ends."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        trainer.checkpoints.poll()
        interval = trainer.config.checkpoint.save_interval
        if trainer.iteration % interval == 0 or trainer.is_done or trainer.stop_reason:
            trainer.checkpoints.save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        trainer.checkpoints.finish()
