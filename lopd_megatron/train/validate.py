"""The validation hook: the loss and its report on held-out documents, without an update."""

from __future__ import annotations

import torch

from lopd_megatron.config import RunConfig
from lopd_megatron.data.loader import StepBatch
from lopd_megatron.data.store import open_dataset
from lopd_megatron.errors import UserError
from lopd_megatron.train.setup import build_loader
from lopd_megatron.train.state import Hook, StepResult, Trainer
from lopd_megatron.train.step import check_finite, pool_reports, run_microbatches


class ValidateHook(Hook):
    """One forward pass over `train.eval_documents` of `data.valid_prefixes`, the same ones every time.

    Its pairs join the report of the step as `valid_*`; place it before the hook that logs.
    """

    may_take_long = True

    def __init__(self, config: RunConfig) -> None:
        if not config.data.valid_prefixes:
            raise UserError(
                f"train.eval_interval={config.train.eval_interval} needs data.valid_prefixes; name a "
                "held-out dataset, or set train.eval_interval=0"
            )
        self.interval = config.train.eval_interval
        self.dataset = open_dataset(config.data.valid_prefixes)
        self.config = config.model_copy(deep=True)
        self.config.train.global_batch_size = min(config.train.eval_documents, len(self.dataset))
        self.batch: StepBatch | None = None

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.iteration % self.interval and not trainer.is_done:
            return
        if self.batch is None:
            loader = build_loader(self.config, trainer.spec, trainer.topology, self.dataset)
            self.batch = loader.step(0)
        with torch.no_grad():
            outputs = run_microbatches(trainer, self.batch, forward_only=True)
        report = pool_reports([output.report for output in outputs], trainer)
        check_finite(trainer, report)
        result.report |= {f"valid_{name}": pair for name, pair in report.items()}
