"""A run from its configuration to its exit code, and the loop inside."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch.distributed as dist

from lopd_megatron.config import RunConfig
from lopd_megatron.errors import EXIT_REQUEUE
from lopd_megatron.parallel import topology as grid
from lopd_megatron.progress import log_line
from lopd_megatron.run_lock import run_lock
from lopd_megatron.train import watchdog
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
    grid.check_world_size(config.parallel, launch_world_size())
    rank, paths = launch_rank(), config.paths
    with contextlib.ExitStack() as held:
        if rank == 0:
            held.enter_context(run_lock(paths.run_dir / ".train.lock", "training"))
        inputs = [check(config).describe() if rank == 0 else {}]
        folder = paths.logs / "ranks"
        held.enter_context(watchdog.watch(folder, rank, launch_world_size(), config.train.hang_timeout_s))
        return _run(config, inputs, hooks, batches)


def _run(
    config: RunConfig, inputs: list[dict[str, Any]], hooks: Sequence[Hook], batches: BatchSource | None
) -> int:
    from lopd_megatron.train.setup import build_trainer
    from lopd_megatron.train.standard_hooks import standard_hooks

    trainer = build_trainer(config, hooks=hooks, batches=batches)
    trainer.hooks += standard_hooks(config)
    dist.broadcast_object_list(inputs, src=0)
    trainer.checkpoints.inputs = inputs[0]
    resumed = trainer.checkpoints.load_latest(trainer)
    watchdog.enter("starting", trainer.iteration, limited=False)
    if trainer.topology.rank == 0:
        config.dump(config.paths.config)
        if not resumed and config.paths.metrics.exists():
            log_line(
                f"no checkpoint in {config.paths.checkpoints}: starting at iteration 1, with new metrics"
            )
        if trainer.is_done:
            log_line(f"already done: {trainer.iteration} of {config.train.train_iters} iterations")
    if not trainer.is_done:
        train(trainer)
    watchdog.enter("ending", trainer.iteration, limited=False)
    dist.barrier()  # nobody leaves, and so ends the job, while another rank is still writing
    return 0 if trainer.is_done else EXIT_REQUEUE


def train(trainer: Trainer) -> None:
    """Step until `train_iters`, or until a hook gives a reason to stop."""
    from lopd_megatron.train.step import train_step

    for hook in trainer.hooks:
        hook.on_start(trainer)
    first = trainer.iteration
    while not trainer.is_done and not trainer.stop_reason:
        start = time.perf_counter()
        iteration = trainer.iteration + 1
        # The first step may compile; a live server has its own patience.
        is_first = trainer.iteration == first
        limited = not is_first and not trainer.config.online.enabled
        watchdog.enter("reading the batch", iteration, limited=limited)
        batch = trainer.batches.step(trainer.consumed_train_samples)
        watchdog.enter("in the step", iteration, limited=not is_first)
        result = train_step(trainer, batch)
        result.seconds = time.perf_counter() - start  # what a user waits for: reading the batch included
        trainer.iteration += 1
        trainer.consumed_train_samples += trainer.config.train.global_batch_size
        for hook in trainer.hooks:
            watchdog.enter(f"in {type(hook).__name__}", iteration, limited=not hook.may_take_long)
            hook.after_step(trainer, result)
    watchdog.enter("ending", trainer.iteration, limited=False)
    for hook in trainer.hooks:
        hook.on_end(trainer)
