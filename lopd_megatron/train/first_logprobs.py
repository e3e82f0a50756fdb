"""The trainer's first log-probs against those that the rollouts were sampled with.

    difference[t] = rollout_logprobs[t] − log π_trainer(tokens[t] | tokens[:t])        before the first step

Training starts from the weights that wrote the rollouts, so only rounding is left, under any layout. Another
head, rope, order of layers, token id or a shifted column gives more, and the run is refused.

The limit of the root mean square, in nats:

    float32 on both sides     0.01   SmolLM2-135M, 30 layers, 2,427 tokens of GSM8K: 1e-5 to transformers
    bfloat16 on either side   0.15   the same model: 0.057, and 0.050 between two attention kernels of
                                     transformers
    the same, a mixture       0.30   rounding may send a token to another expert

On that model a llama3 rope scaling left out gives 0.20, YaRN left out 0.48, two neighbour layers exchanged
1.1. Rounding is as likely up as down and moves the mean by half its square, so the mean may be limit² and
four standard errors.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.distributed as dist

from lopd_megatron.config import RunConfig
from lopd_megatron.data.alignment import AlignmentReport, Sample, compare, sample_indices
from lopd_megatron.data.documents import Document
from lopd_megatron.data.in_memory import memory_dataset
from lopd_megatron.data.loader import StepLoader
from lopd_megatron.data.store import ConcatDataset, MappedDataset
from lopd_megatron.data.teacher_proof import check_shift
from lopd_megatron.errors import UserError
from lopd_megatron.files import write_json
from lopd_megatron.loss.loss import TokenSignals
from lopd_megatron.progress import log_line
from lopd_megatron.train.setup import build_loader, loss_of_run
from lopd_megatron.train.state import BatchSource, Hook, Trainer
from lopd_megatron.train.step import run_microbatches

if TYPE_CHECKING:
    from lopd_megatron.model.student_spec import StudentSpec


def own_logprobs(
    trainer: Trainer, documents: Sequence[tuple[Sequence[int], Sequence[int]]]
) -> list[np.ndarray]:
    """Log-probs of each response given its prompt by the model in training: float32 [r], on every rank.

    An `alignment.Scorer` under the run's layout, packing and precision: one forward pass without gradients.
    Collective over the world: the pass, and one all-reduce of all tokens over data × context parallel ranks
    and over the pipeline.
    """
    texts = [np.array([*prompt, *response], np.int32) for prompt, response in documents]
    masks = [np.arange(len(text)) >= len(prompt) for text, (prompt, _) in zip(texts, documents, strict=True)]
    dataset = memory_dataset(
        [Document(text, mask.astype(np.uint8)) for text, mask in zip(texts, masks, strict=True)]
    )
    topology = trainer.topology
    config = trainer.config.model_copy(
        update={"loss": trainer.config.loss.model_copy(update={"objective": "sft"})}
    )
    batch = build_loader(config, trainer.spec, topology, dataset).pack(np.arange(len(texts)))
    starts = torch.tensor(np.cumsum([0, *map(len, texts)])[:-1], device=topology.device)
    found = torch.zeros(sum(map(len, texts)), dtype=torch.float64, device=topology.device)

    def keep(signals: TokenSignals, document: torch.Tensor) -> None:
        found[starts[document] + signals.tokens.position] = signals.values.student_logprobs

    loss = loss_of_run(config, trainer.spec, topology)
    loss.observe = keep
    with torch.no_grad():
        run_microbatches(replace(trainer, loss=loss), batch, forward_only=True)
    for group in (topology.dp_cp_group, topology.pp_group):
        dist.all_reduce(found, group=group)
    values = np.split(found.float().cpu().numpy(), np.cumsum([len(text) for text in texts])[:-1])
    return [value[mask] for value, mask in zip(values, masks, strict=True)]


LIMIT_FLOAT32, LIMIT_BFLOAT16, LIMIT_MIXTURE = 0.01, 0.15, 0.30
DOCUMENTS = 8
"""Enough for thousands of tokens, and seconds of work."""


class FirstLogprobs(Hook):
    """Refuses a run whose student is not the one that wrote its rollouts.

    Before the first step only, so place it before the other hooks. `first_logprobs.json` in the run folder
    and each checkpoint hold what was found. Where the lineage names another generator, or none, a difference
    is told and not refused. Cost: one forward pass over `DOCUMENTS` documents.
    """

    def __init__(self, config: RunConfig) -> None:
        self.config = config

    def on_start(self, trainer: Trainer) -> None:
        path, found = self.config.paths.first_logprobs, {}
        if trainer.iteration == 0:
            found = self._compare(trainer)
        elif trainer.topology.rank == 0 and path.is_file():
            with contextlib.suppress(ValueError, OSError):  # a record of the past, not needed to go on
                found = json.loads(path.read_text())
        box = [found]
        dist.broadcast_object_list(box, src=0)
        if box[0]:
            trainer.checkpoints.inputs["first_logprobs"] = box[0]

    def _compare(self, trainer: Trainer) -> dict[str, Any]:
        """The report on every rank; {} where there is nothing to compare."""
        start, is_rank0 = time.perf_counter(), trainer.topology.rank == 0
        reason = self._nothing_to_compare(trainer.batches)
        if reason:
            if is_rank0:
                self.config.paths.first_logprobs.unlink(missing_ok=True)  # of an earlier run in this folder
                log_line(f"the trainer's first log-probs are not compared: {reason}")
            return {}
        parts, is_start = _rollouts_of(trainer)
        samples, where = _samples(parts), ", ".join(part.prefix for part in parts)
        own: list[np.ndarray] = []

        def score(documents: Sequence[tuple[Sequence[int], Sequence[int]]]) -> list[np.ndarray]:
            own.extend(own_logprobs(trainer, documents))
            return own

        limit = self.config.train.start_tolerance or derived_limit(parts, trainer.spec)
        report = compare(samples, score, limit)
        diagnosis = _diagnosis(report)
        found = {
            **report.as_dict(),
            "diagnosis": diagnosis,
            "precision": self.config.train.precision,
            "generator_is_start": is_start,
            "seconds": round(time.perf_counter() - start, 3),
        }
        if is_rank0:
            write_json(self.config.paths.first_logprobs, found)
        if diagnosis and is_start:
            raise UserError(
                f"{where}: the trainer does not find rollout_logprobs again: {_line(report)}; {diagnosis}; "
                "nothing was trained; compare model.student with the model that wrote the rollouts, or raise "
                "train.start_tolerance"
            )
        _check_teacher(samples, own, where)
        if is_rank0:
            note = f"; {diagnosis}; not refused: the start did not write these rollouts" if diagnosis else ""
            log_line(f"the trainer's first log-probs against rollout_logprobs: {_line(report)}{note}")
        return found

    def _nothing_to_compare(self, batches: BatchSource) -> str:
        if not self.config.needs_teacher:
            return "the student of an SFT run did not write the responses"
        if self.config.train.start_tolerance == 0:
            return "train.start_tolerance=0"
        if not isinstance(batches, StepLoader):
            return "the batches are not those of a dataset"
        if "rollout_logprobs" not in batches.dataset.columns:
            return "the dataset has no rollout_logprobs"
        return ""


def derived_limit(parts: Sequence[MappedDataset], spec: StudentSpec) -> float:
    """The largest root mean square that rounding explains, from what sampled the rollouts and what trains."""
    transformer = spec.transformer_config
    samplers = {part.manifest.lineage.engine.get("rollouts", {}).get("dtype") for part in parts}
    if transformer.params_dtype == torch.float32 and samplers == {"float32"}:
        return LIMIT_FLOAT32
    return LIMIT_MIXTURE if transformer.num_moe_experts else LIMIT_BFLOAT16


def _rollouts_of(trainer: Trainer) -> tuple[list[MappedDataset], bool]:
    """The datasets that the start of this run wrote and True, or all of them and False."""
    start = trainer.checkpoints.inputs.get("model")
    assert isinstance(trainer.batches, StepLoader)
    parts = [part for part in trainer.batches.dataset.prefixes if isinstance(part, MappedDataset)]
    generators = [part.manifest.lineage.generator for part in parts]
    own = [
        part
        for part, generator in zip(parts, generators, strict=True)
        if start and generator and generator["fingerprint"] == start["fingerprint"]
    ]
    return (own, True) if own else (parts, False)


def _samples(parts: Sequence[MappedDataset]) -> list[Sample]:
    """Documents spread evenly over each dataset; `index` is the place in the dataset they are from."""
    found = []
    for part in parts:
        dataset = ConcatDataset([part])
        for index in sample_indices(len(dataset), max(1, DOCUMENTS // len(parts))):
            found.append(Sample.of(index, dataset.document(index), part.document_id(index)))
    return found


def _check_teacher(samples: list[Sample], own: list[np.ndarray], where: str) -> None:
    """UserError where the teacher's column lies a token off, whoever wrote the rollouts."""
    teacher, student = [], []
    for sample, values in zip(samples, own, strict=True):
        if sample.teacher_logprobs is not None:
            teacher.append(sample.teacher_logprobs[sample.prompt_length :])
            student.append(values)
    check_shift(teacher, student, where)


def _diagnosis(report: AlignmentReport) -> str:
    """What is wrong, or nothing."""
    if report.diagnosis:
        return report.diagnosis
    mean_limit = report.tolerance**2 + 4 * report.root_mean_square / math.sqrt(report.tokens)
    if report.root_mean_square > report.tolerance or abs(report.mean_difference) > mean_limit:
        return "part of the model is computed otherwise: a rope scaling, a norm, a layer, a lower precision"
    return ""


def _line(report: AlignmentReport) -> str:
    return (
        f"{report.documents} documents, {report.tokens} tokens: root mean square of the difference "
        f"{report.root_mean_square:.2e} nats (limit {report.tolerance:g}), mean "
        f"{report.mean_difference:+.1e}, max {report.max_abs_difference:.1e} at document "
        f"{report.worst_document}, token {report.worst_position}"
    )
