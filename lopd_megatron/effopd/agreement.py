"""Numbers of rank 0 on every rank, so that all ranks decide alike."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist

from lopd_megatron.effopd.search import HeldOutScore


def agree(score: HeldOutScore | None) -> HeldOutScore:
    """The score of rank 0 on every rank of the world, so that all decide alike; other ranks may pass None."""
    mine = [math.nan] * 3 if score is None else [score.value, score.standard_error, float(score.count)]
    value, standard_error, count = from_first_rank(mine)
    if math.isnan(count):
        raise ValueError("rank 0 has to compute the score")
    return HeldOutScore(value, standard_error, int(count))


def from_first_rank(numbers: list[float]) -> list[float]:
    """The numbers of rank 0, as many on every rank. One broadcast of float64 over the world."""
    if not dist.is_initialized():
        return numbers
    device = "cuda" if dist.get_backend() == "nccl" else "cpu"
    box = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.broadcast(box, src=0)
    return box.tolist()
