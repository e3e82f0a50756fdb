"""A run from its configuration to its exit code, and the loop inside."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import EXIT_REQUEUE
from lopd_megatron.parallel import topology as grid
from lopd_megatron.progress import say
from lopd_megatron.train.inputs import Inputs, check_inputs
from lopd_megatron.train.launch_env import launch_rank, launch_world_size
from lopd_megatron.train.state import BatchSource, Hook, Trainer


def run(
    config: RunConfig,
    *,
    hooks: Sequence[Hook] = (),
    batches: BatchSource | None = None,
    check: Callable[[RunConfig], Inputs] = check_inputs,
) -> int:
    """Train, from the newest checkpoint of `run_dir` where there is one. Returns the exit code.

    0 when `train_iters` is reached, `EXIT_REQUEUE` when the run stopped before and can go on. `hooks` come
    before the standard ones, so what they do to the weights is logged, validated and saved; `batches`
    replaces the dataset, and then `check` says what is trained on instead.
    """
    from lopd_megatron.train.setup import build_trainer
    from lopd_megatron.train.standard_hooks import standard_hooks

    grid.check_world_size(config.parallel, launch_world_size())
    inputs = [check(config).describe() if launch_rank() == 0 else {}]
    trainer = build_trainer(config, hooks=hooks, batches=batches)
    trainer.hooks += standard_hooks(config)
    dist.broadcast_object_list(inputs, src=0)
    trainer.checkpoints.inputs = inputs[0]
    trainer.checkpoints.load_latest(trainer)
    if trainer.topology.rank == 0:
        config.dump(config.paths.config)
        if trainer.is_done:
            say(f"already done: {trainer.iteration} of {config.train.train_iters} iterations")
    if not trainer.is_done:
        train(trainer)
    dist.barrier()  # nobody leaves, and so ends the job, while another rank is still writing
    return 0 if trainer.is_done else EXIT_REQUEUE


def train(trainer: Trainer) -> None:
    """Step until `train_iters`, or until a hook gives a reason to stop."""
    from lopd_megatron.train.step import train_step

    for hook in trainer.hooks:
        hook.on_start(trainer)
    while not trainer.is_done and not trainer.stop_reason:
        start = time.perf_counter()
        batch = trainer.batches.step(trainer.consumed_train_samples)
        result = train_step(trainer, batch)
        result.seconds = time.perf_counter() - start  # what a user waits for: reading the batch included
        trainer.iteration += 1
        trainer.consumed_train_samples += trainer.config.train.global_batch_size
        for hook in trainer.hooks:
            hook.after_step(trainer, result)
    for hook in trainer.hooks:
        hook.on_end(trainer)
