"""The score of weights on held-out documents from sums, with its standard error; larger is better.

A ratio of sums Σl/Σn over documents has the standard error √(Σ(l − value·n)²·d/(d−1)) / Σn, d documents
(linearised ratio estimator): tokens of a document are not independent, documents are.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
import torch.distributed as dist

from lopd_megatron.effopd.search import Score


class HeldOutSums:
    """Sums and token counts of a per-token loss by held-out document, over micro-batches and ranks."""

    def __init__(self, num_documents: int, device: torch.device | str = "cpu") -> None:
        self._sums = torch.zeros(num_documents, 2, dtype=torch.float64, device=device)

    def add(self, losses: torch.Tensor, documents: torch.Tensor) -> None:
        """Add n trained tokens: `losses` [n] in nats and, int64 [n], the held-out document each is of."""
        pairs = torch.stack((losses.detach().double(), torch.ones_like(losses, dtype=torch.float64)), dim=1)
        self._sums.index_add_(0, documents, pairs)

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
        mean, documents = losses.sum() / counts.sum(), int(seen.sum())
        spread = (losses - mean * counts).norm() * (documents / max(1, documents - 1)) ** 0.5
        return Score(-float(mean), float(spread / counts.sum()), documents)


def agree(score: Score | None) -> Score:
    """The score of rank 0 on every rank of the world, so that all decide alike; other ranks may pass None."""
    mine = [math.nan] * 3 if score is None else [score.value, score.standard_error, float(score.count)]
    value, standard_error, count = from_first_rank(mine)
    if math.isnan(count):
        raise ValueError("rank 0 has to compute the score")
    return Score(value, standard_error, int(count))


def from_first_rank(numbers: list[float]) -> list[float]:
    """The numbers of rank 0, as many on every rank. One broadcast of float64 over the world."""
    if not dist.is_initialized():
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    box = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.broadcast(box, src=0)
    return box.tolist()
