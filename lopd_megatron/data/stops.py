"""How responses end: counts of a build that show a stop token which the teacher would not write.

Counted on the responses with finish_reason "stop", whose last token ended them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from lopd_megatron.data.shard_reader import RolloutBatch


class StopCounts:
    """Sums over rollouts; `state` is plain numbers, so that a resumed build goes on from it.

    `special` are the ids of special tokens: what ends a turn, a document or a thought.
    """

    def __init__(self, special: Iterable[int] = (), state: dict[str, Any] | None = None) -> None:
        self._special = np.array(sorted(special), np.int32)
        self.state: dict[str, Any] = state or {
            "documents": 0,
            "stopped": 0,
            "last_tokens": {},
            "teacher_logprob_sum": 0.0,
            "k2_sum": 0.0,
            "special_tokens": 0,
            "special_k2_sum": 0.0,
        }

    def add(self, batch: RolloutBatch) -> None:
        """The kept rows of one batch."""
        state = self.state
        ends = np.cumsum(batch.response_lengths) - 1
        last = ends[~batch.is_truncated]
        state["documents"] += len(ends)
        state["stopped"] += len(last)
        found = Counter(batch.response_tokens[last].tolist())
        for token, count in found.items():
            state["last_tokens"][str(token)] = state["last_tokens"].get(str(token), 0) + count
        teacher, rollout = (batch.logprobs.get(f"{name}_logprobs") for name in ("teacher", "rollout"))
        is_special = np.isin(batch.response_tokens, self._special) & (batch.response_mask != 0)
        state["special_tokens"] += int(is_special.sum())
        if teacher is None:
            return
        state["teacher_logprob_sum"] += float(teacher[last].sum(dtype=np.float64))
        if rollout is not None:
            k2 = 0.5 * (teacher - rollout).astype(np.float64) ** 2 * (batch.response_mask != 0)
            state["k2_sum"] += float(k2.sum())
            state["special_k2_sum"] += float(k2[is_special].sum())

    def summary(self, has_teacher: bool, has_k2: bool) -> dict[str, Any]:
        """What the manifest keeps.

        `stopped` of `documents` ended by a stop token; `last_tokens`: which, by count;
        `teacher_logprob`: mean log π_T of those tokens, nats; `special_tokens`: how many trained tokens are
        special, `special_k2_share`: their share of Σ ½ (log π_rollout − log π_T)², the loss at the start.
        None where the columns are missing.
        """
        state = self.state
        stopped = state["stopped"]
        return {
            "documents": state["documents"],
            "stopped": stopped,
            "last_tokens": dict(sorted(state["last_tokens"].items(), key=lambda item: -item[1])[:8]),
            "teacher_logprob": state["teacher_logprob_sum"] / stopped if has_teacher and stopped else None,
            "special_tokens": state["special_tokens"],
            "special_k2_share": state["special_k2_sum"] / state["k2_sum"]
            if has_k2 and state["k2_sum"]
            else None,
        }


def special_token_ids(folder: str | Path) -> set[int]:
    """Ids that the tokenizer of a model folder calls special; empty where it does not say."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return set()
    added = json.loads(path.read_text()).get("added_tokens") or []
    return {token["id"] for token in added if token.get("special")}
