"""Token classes of the top-k objectives: the teacher's k tokens, the sampled token, and all the rest as one.

The sampled token is a class of its own only where it is not among the k; its column then holds `ABSENT`,
a token that no shard owns, with probability 0 on both sides. The rest has the teacher's mass 1 − Σ.
"""

from __future__ import annotations

import torch

ABSENT = -1

TAIL_FLOOR = 2.0**-24
"""Smallest teacher mass of the rest: a stored log-prob of 0.0 says no more than that 1 − p < 2⁻²⁴."""


def class_ids(labels: torch.Tensor, topk_ids: torch.Tensor) -> torch.Tensor:
    """Ids of the named classes, [n, 1 + k]: the label first, then the teacher's tokens.

    Where the label is among the k it keeps column 0 and its other column is `ABSENT`.
    """
    labels = labels[:, None]
    return torch.cat([labels, topk_ids.masked_fill(topk_ids == labels, ABSENT)], dim=1)


def teacher_class_logprobs(
    ids: torch.Tensor, label_logprobs: torch.Tensor, topk_logprobs: torch.Tensor
) -> torch.Tensor:
    """Teacher's log-probs [n, 1 + k + 1] of the named classes of `ids` and, last, of the rest; float64.

    The k log-probs come from a float16 column, so their sum may pass 1: the rest keeps `TAIL_FLOOR`.
    """
    named = torch.cat([label_logprobs[:, None], topk_logprobs], dim=1).double()
    named = named.masked_fill(ids == ABSENT, -torch.inf)
    rest = (1.0 - named.exp().sum(-1, keepdim=True)).clamp(min=TAIL_FLOOR)
    return torch.cat([named, rest.log()], dim=1)
