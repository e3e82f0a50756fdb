"""Which rollouts become documents. Each rule has a name, each rollout left out is counted under one name."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from lopd_megatron.data.shard_reader import RolloutBatch
from lopd_megatron.data.writer import are_logprobs

# A response that ends in a loop: its last tokens have a period that short.
REPEATED_TAIL = 256
LONGEST_PERIOD = 64


@dataclass(frozen=True)
class Filters:
    """`seq_length` bounds prompt + response; the two switches are those of `config.DataConfig`."""

    seq_length: int
    drop_truncated: bool = False
    drop_repeated: bool = False

    reasons = ("empty", "too_long", "non_finite", "truncated", "repeated")
    """In the order in which they are asked. The last two are only counted unless switched on."""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def select(batch: RolloutBatch, filters: Filters, dropped: Counter[str], kept: Counter[str]) -> RolloutBatch:
    """The rows to keep; adds to both counters."""
    verdicts = {
        "empty": (batch.prompt_lengths == 0) | ~_any(batch, batch.response_mask),
        "too_long": batch.prompt_lengths + batch.response_lengths > filters.seq_length,
        "non_finite": _has_bad_logprob(batch),
        "truncated": batch.is_truncated,
        "repeated": _ends_in_a_loop(batch),
    }
    keep = np.ones(len(batch.prompt_lengths), bool)
    for reason in filters.reasons:
        hit = verdicts[reason] & keep
        if getattr(filters, f"drop_{reason}", True):
            keep &= ~hit
            dropped[reason] += int(hit.sum())
    for reason in ("truncated", "repeated"):
        kept[reason] += int((verdicts[reason] & keep).sum())
    return rows_of(batch, keep)


def rows_of(batch: RolloutBatch, keep: np.ndarray) -> RolloutBatch:
    """The rows that `keep`, bool [n], marks."""
    if keep.all():
        return batch
    in_prompt = np.repeat(keep, batch.prompt_lengths)
    in_response = np.repeat(keep, batch.response_lengths)
    in_topk = np.repeat(keep, batch.response_lengths * batch.topk)
    return replace(
        batch,
        prompt_ids=batch.prompt_ids[keep],
        prompt_lengths=batch.prompt_lengths[keep],
        response_lengths=batch.response_lengths[keep],
        is_truncated=batch.is_truncated[keep],
        prompt_tokens=batch.prompt_tokens[in_prompt],
        response_tokens=batch.response_tokens[in_response],
        response_mask=batch.response_mask[in_response],
        logprobs={name: values[in_response] for name, values in batch.logprobs.items()},
        topk_ids=batch.topk_ids[in_topk],
        topk_logprobs=batch.topk_logprobs[in_topk],
    )


def _has_bad_logprob(batch: RolloutBatch) -> np.ndarray:
    """bool [n]: a log-prob that is not finite, or above 0, anywhere in the row."""
    bad = np.zeros(len(batch.response_tokens), bool)
    for values in batch.logprobs.values():
        bad |= ~are_logprobs(values)
    if batch.topk:
        bad |= ~are_logprobs(batch.topk_logprobs).reshape(-1, batch.topk).all(axis=1)
    return _any(batch, bad)


def _any(batch: RolloutBatch, values: np.ndarray) -> np.ndarray:
    """bool [n]: is one of the response tokens of the row marked?"""
    total = np.concatenate([[0], np.cumsum(values, dtype=np.int64)])
    ends = np.cumsum(batch.response_lengths)
    return total[ends] > total[ends - batch.response_lengths]


def _ends_in_a_loop(batch: RolloutBatch) -> np.ndarray:
    """bool [n]: the last REPEATED_TAIL tokens repeat with a period of at most LONGEST_PERIOD."""
    found = np.zeros(len(batch.response_lengths), bool)
    ends = np.cumsum(batch.response_lengths)
    for row in np.flatnonzero(batch.response_lengths >= REPEATED_TAIL + LONGEST_PERIOD):
        span = batch.response_tokens[ends[row] - REPEATED_TAIL - LONGEST_PERIOD : ends[row]]
        windows = np.lib.stride_tricks.sliding_window_view(span[:-1], REPEATED_TAIL)
        # windows[i] is the tail shifted back by LONGEST_PERIOD − i tokens
        found[row] = bool((windows == span[-REPEATED_TAIL:]).all(axis=1).any())
    return found
