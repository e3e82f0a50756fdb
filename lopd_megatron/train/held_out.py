"""One number on held-out documents over a run: its value, its error, and whether the run made it better.

    reverse_kl   KL(π_θ ‖ π_T) over the token classes, where the teacher's top-k is cached
    k2           ½ (log π_θ − log π_T)² of the sampled token, where only that one was scored
    loss         −log π_θ of the sampled token: SFT

Smaller is better for each. They are exact on the documents at hand, so a change is seen early. The class KL
is a lower bound of the KL over the vocabulary; on a language model with k = 8 it was 0.4 of it. `kl_estimate`
(`loss.metrics`) has the right size and a larger error, which grows with the distance from the rollouts, so
it is shown beside and does not decide. Without top-k there is no class to compute a KL over, and
log π_θ − log π_T on stored tokens may fall while the student gets worse; k2 is what the sampled-token
objectives minimise, is 0 at the teacher alone, and rises on documents that were not trained when only
replayed tokens are fitted.

A ratio of sums Σs/Σn over d documents has the standard error √(Σ(s − value·n)²·d/(d−1)) / Σn: tokens of a
document depend on each other, documents do not. Before and after are compared document by document.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist

from lopd_megatron.config import LossConfig
from lopd_megatron.config.objectives import objective_spec
from lopd_megatron.loss.loss import TokenSignals
from lopd_megatron.train.metrics import read_metrics

HeldOutMetric = Literal["reverse_kl", "k2", "loss", "kl_estimate"]
Verdict = Literal["better", "no change", "worse"]
ERRORS = 2.0
"""Standard errors of a difference below which there is no change."""


def choose_metric(loss: LossConfig, columns: frozenset[str]) -> HeldOutMetric:
    """What a run is judged by, from its objective and the columns of the held-out data."""
    if not objective_spec(loss.objective).needs_teacher or "teacher_logprobs" not in columns:
        return "loss"
    return "reverse_kl" if "teacher_topk_ids" in columns else "k2"


class DocumentSums:
    """Sums of one metric, token counts and sums of the KL estimate by held-out document, over all ranks."""

    def __init__(self, metric: HeldOutMetric, num_documents: int, device: torch.device | str = "cpu") -> None:
        self.metric = metric
        self._sums = torch.zeros(num_documents, 3, dtype=torch.float64, device=device)

    def add(self, signals: TokenSignals, documents: torch.Tensor) -> None:
        """What `Loss.observe` is called with."""
        values = self._values(signals).double()
        estimate = signals.kl_estimate
        rows = [values, torch.ones_like(values), torch.zeros_like(values) if estimate is None else estimate]
        self._sums.index_add_(0, documents, torch.stack(rows, dim=1))

    def pooled(self, groups: Iterable[dist.ProcessGroup]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums, token counts and estimates, [d] each, of the documents seen. One all-reduce a group.

        `groups`: data × context parallel, and the pipeline group, whose earlier stages add nothing.
        """
        for group in groups:
            dist.all_reduce(self._sums, group=group)
        sums, tokens, estimates = self._sums.cpu().numpy().T
        seen = tokens > 0
        return sums[seen], tokens[seen], estimates[seen]

    def _values(self, signals: TokenSignals) -> torch.Tensor:
        if self.metric == "loss":
            return signals.values.loss
        if self.metric == "reverse_kl":
            assert signals.reverse_kl is not None, "the loader reads the top-k of held-out data"
            return signals.reverse_kl
        assert signals.tokens.teacher_logprobs is not None
        return 0.5 * (signals.values.student_logprobs - signals.tokens.teacher_logprobs).square()


@dataclass(frozen=True)
class Validation:
    """The held-out metric after `iteration` updates; iteration 0 is the student at the start."""

    iteration: int
    metric: HeldOutMetric
    sums: np.ndarray  # float64 [d]
    tokens: np.ndarray  # [d]
    estimates: np.ndarray | None = None
    """float64 [d]: sums of `loss.metrics.kl_estimate`; None where it cannot be made."""

    @property
    def kl_estimate(self) -> Validation | None:
        """The same documents judged by the KL over the whole vocabulary."""
        if self.estimates is None:
            return None
        return Validation(self.iteration, "kl_estimate", self.estimates, self.tokens)

    @property
    def value(self) -> float:
        return float(self.sums.sum() / self.tokens.sum())

    @property
    def standard_error(self) -> float:
        return ratio_error(self.sums - self.value * self.tokens, self.tokens)

    def line(self) -> dict[str, Any]:
        """Of `validation.jsonl`."""
        return {
            "metric": self.metric,
            "value": self.value,
            "standard_error": self.standard_error,
            "documents": len(self.sums),
            "sums": self.sums.tolist(),
            "tokens": self.tokens.tolist(),
            "kl_estimates": None if self.estimates is None else self.estimates.tolist(),
        }

    def text(self) -> str:
        return f"{self.value:.4g} ± {self.standard_error:.2g}"


def ratio_error(residuals: np.ndarray, tokens: np.ndarray) -> float:
    """Standard error of Σs/Σn from the residuals s − value·n of d documents; infinite for one document."""
    d = len(residuals)
    if d < 2:
        return float("inf")
    return float(np.sqrt((residuals**2).sum() * d / (d - 1)) / tokens.sum())


@dataclass(frozen=True)
class Change:
    """From the first validation to the last one, on the same documents."""

    before: Validation
    after: Validation
    best: Validation
    difference: float
    standard_error: float

    @property
    def verdict(self) -> Verdict:
        if abs(self.difference) <= ERRORS * self.standard_error:
            return "no change"
        return "better" if self.difference < 0 else "worse"

    def text(self) -> str:
        return (
            f"held-out {self.before.metric} {self.before.value:.4g} → {self.after.value:.4g} "
            f"(difference {self.difference:+.4g} ± {self.standard_error:.2g}, {len(self.before.sums)} "
            f"documents): {self.verdict}"
        )


def change(validations: Sequence[Validation]) -> Change | None:
    """Before → after and the best of all; None before a second validation of the same documents."""
    if len(validations) < 2:
        return None
    before, after = validations[0], validations[-1]
    same = [v for v in validations if v.metric == after.metric and np.array_equal(v.tokens, after.tokens)]
    if same[0] is not before:
        return None
    difference = after.value - before.value
    residuals = after.sums - before.sums - difference * after.tokens
    best = min(same, key=lambda validation: validation.value)
    return Change(before, after, best, difference, ratio_error(residuals, after.tokens))


def read_validations(path: Path) -> list[Validation]:
    """All lines of a `validation.jsonl`, in order."""
    return [
        Validation(
            line["iteration"],
            line["metric"],
            np.array(line["sums"], float),
            np.array(line["tokens"], float),
            None if line["kl_estimates"] is None else np.array(line["kl_estimates"], float),
        )
        for line in read_metrics(path)
    ]
