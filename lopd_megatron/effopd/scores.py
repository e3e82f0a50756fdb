"""Scores of weights: what the search compares. Larger is better; each has a standard error.

Two are free of generation and work offline, on a held-out dataset: minus the top-k reverse KL and minus
½·(student − teacher log-prob)² of the sampled token. The latter is the loss of Lightning OPD itself
and may improve while accuracy falls. Accuracy needs sampled answers.

A ratio of sums Σl/Σn over documents has the standard error √(Σ(l − value·n)²·d/(d−1)) / Σn, d documents
(linearised ratio estimator): tokens of a document are not independent, documents are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
import torch.distributed as dist

from lopd_megatron.effopd.search import Score


class HeldOutSums:
    """Sums and token counts of a per-token loss by held-out document, over micro-batches and ranks."""

    def __init__(self, num_documents: int, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(num_documents, 2, dtype=torch.float64, device=device)

    def add(self, losses: torch.Tensor, loss_mask: torch.Tensor, documents: torch.Tensor) -> None:
        """Add a micro-batch: `losses` in nats, `loss_mask` and `documents`, all [1, t] or [t], label-aligned.

        `documents` is the held-out document of each token (`token_documents`); padding has −1 and mask 0.
        """
        mask = loss_mask.flatten().double()
        pairs = torch.stack((losses.detach().flatten().double() * mask, mask), dim=1)
        trained = mask > 0
        self._sums.index_add_(0, documents.flatten()[trained], pairs[trained])

    def score(self, groups: Iterable[dist.ProcessGroup] = ()) -> Score:
        """Minus the mean loss per token. One all-reduce of 16 bytes a document in each group.

        `groups`: over which documents or tokens are divided (data × context parallel) and the pipeline
        group, whose earlier stages add nothing. Tensor-parallel ranks hold the same sums and take no part.
        """
        sums = self._sums.clone()
        for group in groups:
            dist.all_reduce(sums, group=group)
        seen = sums[:, 1] > 0
        if not seen.any():
            raise ValueError("no held-out token was scored")
        losses, counts = sums[seen].unbind(1)
        mean = losses.sum() / counts.sum()
        error = _standard_error(losses - mean * counts) / counts.mean()
        return Score(-float(mean), float(error), int(seen.sum()))


def token_documents(cu_seqlens: torch.Tensor, document_indices: Sequence[int]) -> torch.Tensor:
    """int64 [t]: for each token of a packed row the document it is of, from the fields of a `MicroBatch`.

    Under context parallelism it covers the whole row; select this rank's tokens as for every column.
    """
    indices = torch.tensor(document_indices, dtype=torch.int64, device=cu_seqlens.device)
    return indices.repeat_interleave(torch.diff(cu_seqlens).to(torch.int64))


def accuracy_score(correct: Sequence[Sequence[bool]]) -> Score:
    """Mean over problems of the share of correct samples; `correct[i]` are the samples of problem i."""
    if not correct or not all(correct):
        raise ValueError("every problem needs at least one sampled answer")
    shares = torch.tensor([sum(samples) / len(samples) for samples in correct], dtype=torch.float64)
    mean = shares.mean()
    return Score(float(mean), float(_standard_error(shares - mean)), len(correct))


def agree(score: Score | None, group: dist.ProcessGroup | None) -> Score:
    """The score of the first rank of `group` on all of its ranks, so that all decide alike.

    Other ranks may pass None; `group` None is a single process.
    """
    mine = None if score is None else [score.value, score.standard_error, float(score.count)]
    value, standard_error, count = from_first_rank(mine or [math.nan] * 3, group)
    if math.isnan(count):
        raise ValueError("the first rank of the group has to compute the score")
    return Score(value, standard_error, int(count))


def from_first_rank(numbers: list[float], group: dist.ProcessGroup | None) -> list[float]:
    """The numbers of the first rank of `group`, as many on every rank. One broadcast of float64."""
    if group is None:
        return numbers
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend(group) == "nccl" else "cpu"
    box = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.broadcast(box, group=group, group_src=0)
    return box.tolist()


def _standard_error(residuals: torch.Tensor) -> torch.Tensor:
    """Of the mean of n independent values, from their residuals; 0 where n < 2."""
    n = residuals.numel()
    if n < 2:
        return residuals.new_zeros(())
    return (residuals.square().sum() / (n - 1) / n).sqrt()
