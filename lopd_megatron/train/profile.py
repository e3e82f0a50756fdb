"""The profile hook: a torch profiler trace of a few iterations of rank 0."""

from __future__ import annotations

from typing import Any

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import UserError
from lopd_megatron.progress import log_line
from lopd_megatron.train.state import Hook, StepResult, Trainer


class ProfileHook(Hook):
    """Records iterations [first, last) of `train.profile_iters` into run_dir/logs/trace_*.json (Chrome)."""

    def __init__(self, config: RunConfig) -> None:
        window = config.train.profile_iters
        if len(window) != 2 or not 1 <= window[0] < window[1]:
            raise UserError(f"train.profile_iters={window} is not [first, last) with 1 ≤ first < last")
        self.first, self.last = window
        self.path = config.paths.logs / f"trace_{self.first}_{self.last}.json"
        self.profiler: Any = None

    def on_start(self, trainer: Trainer) -> None:
        self._start_before(trainer.iteration + 1, trainer)

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if self.profiler is not None and trainer.iteration >= self.last - 1:
            self._stop()
        self._start_before(trainer.iteration + 1, trainer)

    def on_end(self, trainer: Trainer) -> None:
        if self.profiler is not None:
            self._stop()

    def _start_before(self, iteration: int, trainer: Trainer) -> None:
        if iteration == self.first and trainer.topology.rank == 0:
            import torch

            self.profiler = torch.profiler.profile(record_shapes=True, with_stack=False)
            self.profiler.start()

    def _stop(self) -> None:
        self.profiler.stop()
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.profiler.export_chrome_trace(str(self.path))
        log_line(f"profile of iterations {self.first} to {self.last - 1}: {self.path}")
        self.profiler = None
