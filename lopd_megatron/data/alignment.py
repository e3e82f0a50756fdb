"""The alignment proof: the generating model scores a sample again, and must find the stored log-probs.

    difference[t] = rollout_logprobs[t] − log p_generator(tokens[t] | tokens[:t])        trained tokens only

A model scored against itself gives 0; another engine or precision gives noise far below 0.1 nats. A shift by
one, another temperature, another model or a swapped document gives tenths of nats and more.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from lopd_megatron.data.document_ids import document_label
from lopd_megatron.data.teacher_proof import check_shift
from lopd_megatron.errors import UserError

Scorer = Callable[[Sequence[tuple[Sequence[int], Sequence[int]]]], list[np.ndarray]]
"""[(prompt_tokens, response_tokens)] → float32 [r] each: log-probs of the response tokens, temperature 1."""

# One document whose own mean is this many tolerances off is wrong, however good the others are.
_DOCUMENT_FACTOR = 10.0


@dataclass(frozen=True)
class Sample:
    """One document of the proof."""

    index: int
    tokens: np.ndarray  # int [s]
    loss_mask: np.ndarray  # [s]
    rollout_logprobs: np.ndarray  # float32 [s]
    teacher_logprobs: np.ndarray | None = None  # float32 [s]
    document_id: str = ""

    @classmethod
    def of(cls, index: int, columns: Mapping[str, np.ndarray], document_id: str) -> Sample:
        """The sample of a document of a dataset, from its columns."""
        tokens, mask, rollout = (columns[name] for name in ("tokens", "loss_mask", "rollout_logprobs"))
        return cls(index, tokens, mask, rollout, columns.get("teacher_logprobs"), document_id)

    @property
    def label(self) -> str:
        """Index and id, as messages name a document."""
        return document_label(self.index, self.document_id)

    @property
    def prompt_length(self) -> int:
        """Tokens before the first trained one."""
        return int(np.argmax(self.loss_mask != 0))


@dataclass(frozen=True)
class AlignmentReport:
    """Differences in nats over the trained tokens of the sample."""

    documents: int
    tokens: int
    mean_abs_difference: float
    max_abs_difference: float
    mean_difference: float
    """With its sign: how much more probable the stored values are, an estimate of KL(stored ‖ new)."""
    root_mean_square: float
    worst_document: int
    """Index in the dataset of the document with the largest single difference."""
    worst_position: int
    """Its token."""
    worst_document_mean: float
    """Largest mean |difference| of one document."""
    tolerance: float
    diagnosis: str
    """Empty where the proof holds."""
    worst_document_id: str = ""
    """The id of `worst_document`; empty where the dataset has none."""

    @property
    def holds(self) -> bool:
        return not self.diagnosis

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    @property
    def worst_label(self) -> str:
        return document_label(self.worst_document, self.worst_document_id)

    def line(self) -> str:
        return (
            f"{self.documents} documents, {self.tokens} tokens: mean |difference| "
            f"{self.mean_abs_difference:.2e} nats (limit {self.tolerance:g}), max "
            f"{self.max_abs_difference:.2e} at document {self.worst_label}, token {self.worst_position}"
        )


def sample_indices(size: int, count: int) -> list[int]:
    """`count` documents spread evenly over the dataset, the first and the last among them."""
    return sorted({round(i) for i in np.linspace(0, size - 1, min(count, size))})


def compare(samples: Sequence[Sample], scorer: Scorer, tolerance: float) -> AlignmentReport:
    """Score the samples again and compare. `holds` says whether the mean stays within `tolerance`."""
    pairs = [
        (sample.tokens[: sample.prompt_length].tolist(), sample.tokens[sample.prompt_length :].tolist())
        for sample in samples
    ]
    rescored = scorer(pairs)
    stored = [sample.rollout_logprobs[sample.prompt_length :] for sample in samples]
    masks = [sample.loss_mask[sample.prompt_length :] != 0 for sample in samples]
    for sample, new, old in zip(samples, rescored, stored, strict=True):
        if len(new) != len(old) or not np.isfinite(new).all():
            raise UserError(
                f"document {sample.label}: {len(new)} log-probs came back for {len(old)} tokens, or one is "
                "not finite; check the model and its precision"
            )
    differences = [
        np.where(mask, old.astype(np.float64) - new, 0.0)
        for mask, old, new in zip(masks, stored, rescored, strict=True)
    ]
    counts = [int(mask.sum()) for mask in masks]
    means = [float(np.abs(d).sum() / n) for d, n in zip(differences, counts, strict=True)]
    worst = int(np.argmax([np.abs(d).max() for d in differences]))
    place = int(np.abs(differences[worst]).argmax())
    total = sum(counts)
    mean = float(sum(np.abs(d).sum() for d in differences) / total)
    return AlignmentReport(
        documents=len(samples),
        tokens=total,
        mean_abs_difference=mean,
        max_abs_difference=float(abs(differences[worst][place])),
        mean_difference=float(sum(d.sum() for d in differences) / total),
        root_mean_square=float(np.sqrt(sum(np.square(d).sum() for d in differences) / total)),
        worst_document=samples[worst].index,
        worst_document_id=samples[worst].document_id,
        worst_position=samples[worst].prompt_length + place,
        worst_document_mean=max(means),
        tolerance=tolerance,
        diagnosis=_diagnosis(stored, rescored, masks, means, mean, tolerance),
    )


def check_teacher_shift(samples: Sequence[Sample], where: str | Path) -> None:
    """UserError where the teacher's column lies a token later or earlier than that of the rollouts."""
    teacher, rollout = [], []
    for sample in samples:
        if sample.teacher_logprobs is not None:
            teacher.append(sample.teacher_logprobs[sample.prompt_length :])
            rollout.append(sample.rollout_logprobs[sample.prompt_length :])
    check_shift(teacher, rollout, where)


def refuse_misaligned(report: AlignmentReport, where: str | Path) -> None:
    """UserError unless the proof holds."""
    if not report.holds:
        raise UserError(
            f"{where}: the generating model does not find the stored rollout_logprobs again: "
            f"{report.line()}; {report.diagnosis}; do not train on it"
        )


def _diagnosis(
    stored: list[np.ndarray],
    rescored: list[np.ndarray],
    masks: list[np.ndarray],
    means: list[float],
    mean: float,
    tolerance: float,
) -> str:
    limit = _DOCUMENT_FACTOR * tolerance
    bad = sum(value > limit for value in means)
    if mean <= tolerance and not bad:
        return ""
    for shift, direction in ((1, "late"), (-1, "early")):
        if _mean_shifted(stored, rescored, masks, shift) <= max(tolerance, mean / 10):
            return f"the stored values stand one token too {direction}"
    if bad and bad <= len(means) / 2 and float(np.median(means)) <= tolerance:
        return f"{bad} of {len(means)} documents are wrong and the others right: swapped or damaged documents"
    old, new = (np.concatenate([v[m] for v, m in zip(x, masks, strict=True)]) for x in (stored, rescored))
    if len(old) > 2 and old.std() and new.std() and np.corrcoef(old, new)[0, 1] > 0.8:
        slope = float((old * new).sum() / (new * new).sum())
        return (
            f"stored values are about {slope:.2f} times the new ones: another temperature, precision or step"
        )
    return "another model, tokenizer or another text"


def _mean_shifted(
    stored: list[np.ndarray], rescored: list[np.ndarray], masks: list[np.ndarray], shift: int
) -> float:
    """Mean |difference| if the stored values stood `shift` tokens too late."""
    total, count = 0.0, 0
    for old, new, mask in zip(stored, rescored, masks, strict=True):
        pairs = (old[1:], new[:-1], mask[1:]) if shift > 0 else (old[:-1], new[1:], mask[:-1])
        total += float(np.abs(pairs[0] - pairs[1])[pairs[2]].sum())
        count += int(pairs[2].sum())
    return total / count if count else float("inf")
