"""What a training run holds, and the two seams at which behaviour is plugged in: batches and hooks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

import torch

from lopd_megatron.config import RunConfig
from lopd_megatron.loss import Loss
from lopd_megatron.parallel.topology import Topology

if TYPE_CHECKING:
    from lopd_megatron.data.loader import StepBatch
    from lopd_megatron.model.student_spec import StudentSpec
    from lopd_megatron.train.checkpoint import Checkpoints


class BatchSource(Protocol):
    """Where steps come from: a dataset on disk, or rollouts made on the spot."""

    def step(self, consumed: int) -> StepBatch:
        """The micro-batches of the step that follows `consumed` sequences, the same at every call.

        Called on every rank in step; all ranks get the same number of micro-batches.
        """
        ...


class Hook:
    """Optional behaviour around the loop. The loop calls hooks, in order; hooks never call the loop.

    `train.hooks` names your own classes, which are made with the `RunConfig` of the run.

    Methods are called on every rank, so they may use collectives; each does nothing unless overridden.
    """

    name = ""
    """Set it on a hook with state: the key of that state in a checkpoint."""

    def on_build(self, trainer: Trainer) -> None:
        """With the initial weights in the model, before a checkpoint is loaded."""

    def on_start(self, trainer: Trainer) -> None:
        """Before the first step of this process, after a checkpoint was loaded."""

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        """After the optimizer step; `trainer.iteration` already counts it. May change the weights."""

    def on_end(self, trainer: Trainer) -> None:
        """After the last step of this process; not called when a step raised."""

    def state_dict(self, model_state: dict[str, Any], *, is_loading: bool) -> dict[str, Any]:
        """What a checkpoint keeps of a named hook: plain values, equal on all ranks, and sharded tensors.

        `model_state` is the `sharded_state_dict` of the model chunks. When loading, the sharded tensors are
        the places that the checkpoint fills.
        """
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take back what `state_dict` gave."""


@dataclass
class StepResult:
    """One optimizer step, the same on every rank."""

    metric_sums: dict[str, torch.Tensor]  # name → float64 [2]: numerator, denominator over the whole batch
    num_tokens: int  # prompt and response tokens of the whole batch, without padding
    grad_norm: float  # before clipping
    learning_rate: float  # that this step used
    flops: float  # of the whole batch, forward and backward, without recomputation
    seconds: float


@dataclass
class Trainer:
    """The state of a run between two steps. `setup.build_trainer` makes it, `loop.train` moves it."""

    config: RunConfig
    topology: Topology
    spec: StudentSpec
    model: list[Any]  # DistributedDataParallel around a StudentModel, one per virtual stage
    optimizer: Any
    scheduler: Any
    batches: BatchSource
    loss: Loss
    checkpoints: Checkpoints
    hooks: list[Hook] = field(default_factory=list)
    iteration: int = 0
    consumed_train_samples: int = 0
    stop_reason: str = ""
    """Why to stop before train_iters; set by a hook, on all ranks alike."""

    @property
    def is_done(self) -> bool:
        return self.iteration >= self.config.train.train_iters
