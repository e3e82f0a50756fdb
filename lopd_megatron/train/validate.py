"""The validation hook: the metrics on held-out documents, without an update."""

from __future__ import annotations

import dataclasses

import torch

from lopd_megatron.config import RunConfig
from lopd_megatron.data.held_out import held_out_prefixes
from lopd_megatron.data.loader import StepBatch
from lopd_megatron.data.store import open_dataset
from lopd_megatron.progress import log_line
from lopd_megatron.records import LossOutput
from lopd_megatron.train.held_out import (
    DocumentSums,
    Validation,
    change,
    choose_metric,
    read_validations,
)
from lopd_megatron.train.metrics import JsonLines
from lopd_megatron.train.setup import build_loader, loss_of_run
from lopd_megatron.train.state import Hook, StepResult, Trainer
from lopd_megatron.train.step import check_finite, pool_metric_sums, run_microbatches
from lopd_megatron.train.warning_log import WarningLog


class ValidateHook(Hook):
    """One forward pass over at most `train.eval_documents` held-out documents, the same ones every time.

    Before the first step, every `train.eval_interval` iterations and after the last one. The pairs join those
    of the step as `valid_*`; what decides, document by document, goes to `validation.jsonl`. Place it before
    the hook that logs. Cost of one pass: a third of a step with that many documents; memory: this rank's part
    of the documents in host memory.
    """

    may_take_long = True

    def __init__(self, config: RunConfig, warnings: WarningLog) -> None:
        self.interval = config.train.eval_interval
        self.dataset = open_dataset(held_out_prefixes(config))
        self.metric = choose_metric(config.loss, self.dataset.columns)
        self.config = config.model_copy(deep=True)
        self.config.train.global_batch_size = min(config.train.eval_documents, len(self.dataset))
        self.warnings = warnings
        self.batch: StepBatch | None = None
        self.log: JsonLines | None = None
        self.seen: list[Validation] = []

    def on_start(self, trainer: Trainer) -> None:
        path = self.config.paths.validation
        if trainer.topology.rank == 0:
            self.log = JsonLines(path, trainer.iteration or -1)
            self.seen = read_validations(path)
        if trainer.iteration == 0:
            self._validate(trainer)
            if self.seen:
                count = len(self.seen[0].sums)
                # A step with as many documents costs three forward passes: one forward, two backward.
                cost = count / (3 * self.interval * trainer.config.train.global_batch_size)
                log_line(
                    f"iteration 0: held-out {self.metric} {self.seen[0].text()} on {count} documents; "
                    f"validating them every {self.interval} iterations adds about {cost:.1%} to the training"
                )

    def after_step(self, trainer: Trainer, result: StepResult) -> None:
        if trainer.iteration % self.interval and not trainer.is_done:
            return
        sums = self._validate(trainer)
        result.metric_sums |= {f"valid_{name}": pair for name, pair in sums.items()}
        found = change(self.seen)
        if found is not None and found.verdict == "worse":
            self.warnings.tell(
                trainer,
                "held_out_worse",
                f"{found.text()} than at the start; lower optimizer.lr (best so far: iteration "
                f"{found.best.iteration})",
            )

    def on_end(self, trainer: Trainer) -> None:
        if self.log is None:
            return
        self.log.close()
        found = change(self.seen)
        if found is not None:
            log_line(f"{found.text()}; best at iteration {found.best.iteration}: {found.best.text()}")

    def _validate(self, trainer: Trainer) -> dict[str, torch.Tensor]:
        """Pooled pairs, on every rank; rank 0 keeps the sums by document."""
        topology = trainer.topology
        if self.batch is None:
            loader = build_loader(self.config, trainer.spec, topology, self.dataset, measured=True)
            self.batch = loader.step(0)
        by_document = DocumentSums(self.metric, len(self.dataset), topology.device)
        validated, outputs = held_out_pass(trainer, self.config, self.batch, by_document)
        sums = pool_metric_sums([output.metric_sums for output in outputs], validated)
        check_finite(validated, sums, self.batch)
        groups = [topology.dp_cp_group, topology.pp_group]
        values, tokens, estimates = by_document.pooled(groups)
        has_estimate = {"teacher_logprobs", "rollout_logprobs"} <= self.dataset.columns
        kept = estimates if has_estimate and self.metric != "loss" else None
        validation = Validation(trainer.iteration, self.metric, values, tokens, kept)
        if self.log is not None:
            self.seen.append(validation)
            self.log.write(trainer.iteration, validation.line())
        return sums


def held_out_pass(
    trainer: Trainer, config: RunConfig, batch: StepBatch, by_document: DocumentSums
) -> tuple[Trainer, list[LossOutput]]:
    """One forward pass with the loss of `config`: the trainer that made it, and its outputs.

    `by_document` gets the tokens of every document. Collective over the model-parallel ranks.
    """
    loss = loss_of_run(config, trainer.spec, trainer.topology)
    loss.observe = by_document.add
    measuring = dataclasses.replace(trainer, loss=loss)
    with torch.no_grad():
        return measuring, run_microbatches(measuring, batch, forward_only=True)
