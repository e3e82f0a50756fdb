"""Refresh rounds: Lightning OPD in R parts, each on rollouts of the student that the part before left.

Between the paper (R = 1) and standard OPD (R = train_iters). No part of the pipeline needs to know: a round
is a run of its own, and the chain of stages runs them one after another.
"""

from __future__ import annotations

import math
from itertools import pairwise

from lopd_megatron.config import OptimizerConfig, RunConfig
from lopd_megatron.errors import UserError


def refresh_rounds(config: RunConfig, count: int) -> list[RunConfig]:
    """The run split into `count` runs of train_iters / count iterations.

    Round k starts from the export of round k − 1 and samples its own rollouts from it. The learning rate goes
    on where it was (only the first round warms up); Adam's moments start anew, and so does the order of the
    data. The last round keeps the name and the folder of `config`, so what follows finds its result there.
    """
    iters = config.train.train_iters
    if not 1 <= count <= iters:
        raise UserError(f"refresh rounds: {count} is not between 1 and train.train_iters={iters}")
    edges = [round(iters * k / count) for k in range(count + 1)]
    rounds: list[RunConfig] = []
    for k, (begin, end) in enumerate(pairwise(edges), start=1):
        part = config.model_copy(deep=True)
        part.train.train_iters = end - begin
        part.rollouts.seed = config.rollouts.seed + k - 1
        if k > 1:
            part.model.student = str(rounds[-1].paths.hf)
            part.optimizer.lr_warmup_iters = 0
        if k < count:
            part.name = f"{config.name}_round_{k}"
            part.run_dir = f"{config.run_dir}_round_{k}"
        if config.optimizer.lr_decay_style != "constant":
            part.optimizer.lr = _decayed(config.optimizer, begin, iters)
            part.optimizer.min_lr = _decayed(config.optimizer, end, iters)
            part.optimizer.lr_decay_iters = None
        rounds.append(part)
    return rounds


def _decayed(optimizer: OptimizerConfig, iteration: int, train_iters: int) -> float:
    """Megatron's schedule after `iteration` iterations; in a round a like curve joins the ends."""
    warmup = optimizer.lr_warmup_iters
    decay = (optimizer.lr_decay_iters or train_iters) - warmup
    share = min(max((iteration - warmup) / decay, 0.0), 1.0)
    if optimizer.lr_decay_style == "cosine":
        share = 0.5 * (1.0 - math.cos(math.pi * share))
    elif optimizer.lr_decay_style != "linear":
        raise UserError(
            f"refresh rounds know constant, linear and cosine, not optimizer.lr_decay_style="
            f"{optimizer.lr_decay_style}"
        )
    return (1.0 - share) * optimizer.lr + share * optimizer.min_lr
