"""The hooks that decide when to save and when to stop."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist

from lopd_megatron import plugins
from lopd_megatron.config import RunConfig
from lopd_megatron.errors import EXIT_INTERRUPTED, EXIT_REQUEUE
from lopd_megatron.progress import log_line
from lopd_megatron.train.launch_env import under_plain_torchrun
from lopd_megatron.train.state import Hook, StepResult, Trainer

ONE_KEY_PRESS_S = 2.0
"""A Ctrl-C reaches a rank from the terminal and once more from torchrun."""


def own_hooks(config: RunConfig) -> list[Hook]:
    """The hooks that `train.hooks` names, each made with the configuration of the run."""
    classes: list[Any] = [plugins.load_class(name, Hook, "train.hooks") for name in config.train.hooks]
    return [own(config) for own in classes]


class StopHook(Hook):
    """Stop after the step in which SIGINT, SIGTERM or SIGUSR1 came, or the time limit passed.

    Stops all ranks after the same step, through one all-reduce of one number a step. A second Ctrl-C ends the
    process at once.
    """

    REASONS = ("", "SIGUSR1", "SIGTERM", "SIGINT", "train.exit_duration_in_mins")

    def __init__(self, exit_duration_in_mins: float | None) -> None:
        self.limit_s = float("inf") if exit_duration_in_mins is None else 60 * exit_duration_in_mins
        self.start = time.monotonic()
        self.reason = 0
        self.interrupted = float("inf")
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        # The same signal again changes nothing: the terminal, launchers and Slurm may each send one.
        self.reason = max(self.reason, self.REASONS.index(signal.Signals(number).name))
        if number == signal.SIGINT:
            if time.monotonic() - self.interrupted > ONE_KEY_PRESS_S:
                os._exit(EXIT_INTERRUPTED)
            self.interrupted = min(self.interrupted, time.monotonic())

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if time.monotonic() - self.start > self.limit_s:
            self.reason = max(self.reason, len(self.REASONS) - 1)
        flag = torch.tensor([self.reason], dtype=torch.int32, device=trainer.topology.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MAX)
        trainer.stop_reason = self.REASONS[int(flag)]
        if trainer.stop_reason and trainer.topology.rank == 0 and not trainer.is_done:
            log_line(f"stopping after iteration {trainer.iteration}: {trainer.stop_reason}")
            if trainer.stop_reason in ("SIGTERM", "SIGINT") and under_plain_torchrun():
                log_line(
                    "torchrun kills the ranks 30 s after the signal and reports exit code 1; `python -m "
                    "lopd_megatron.launch.torchrun` takes the same options, waits, and reports "
                    f"{EXIT_REQUEUE}"
                )


class SaveHook(Hook):
    """Save every `save_interval` iterations, and whenever the run ends."""

    may_take_long = True

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        trainer.checkpoints.poll()
        interval = trainer.config.checkpoint.save_interval
        if trainer.iteration % interval == 0 or trainer.is_done or trainer.stop_reason:
            trainer.checkpoints.save(trainer)

    def on_end(self, trainer: Trainer) -> None:
        trainer.checkpoints.finish()
