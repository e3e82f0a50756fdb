"""Rollouts as text, each token with gap = log π_T − log π_rollout, nats; below 0 the teacher disagrees."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from lopd_megatron.report.run_folder import ShardFolder

SHOWN_TOKENS = 400
FAR = 2.0
"""Nats at which a colour is full."""

Pieces = Callable[[Sequence[int]], list[str]]
"""Token ids → their texts, which put together are the text."""

_COLUMNS = [
    "document_id",
    "prompt_tokens",
    "response_tokens",
    "rollout_logprobs",
    "teacher_logprobs",
    "finish_reason",
]


@dataclass(frozen=True)
class Token:
    text: str
    gap: float
    teacher: float
    rollout: float

    @property
    def blank(self) -> str:
        """Blanks before a word, which stay without colour: a line may break there."""
        return self.text[: len(self.text) - len(self.word)]

    @property
    def word(self) -> str:
        return self.text.lstrip(" ") or self.text

    @property
    def strength(self) -> float:
        """0 … 1: how strongly it is coloured."""
        return min(abs(self.gap) / FAR, 1.0)


@dataclass(frozen=True)
class Rollout:
    document_id: str
    prompt: str
    tokens: list[Token]
    left_out: int
    mean_gap: float
    finish_reason: str


@dataclass(frozen=True)
class GapSample:
    """The first shard of scored rollouts: gaps of all its tokens, and a few rollouts to read."""

    documents: int
    gaps: np.ndarray
    rollouts: list[Rollout]

    @property
    def sampled_kl(self) -> float:
        """Mean of log π_rollout − log π_T: an estimate of KL(rollout policy ‖ teacher), nats per token."""
        return -float(self.gaps.mean(dtype=np.float64))

    def histogram(self, edges: np.ndarray) -> list[int]:
        counts, _ = np.histogram(np.clip(self.gaps, edges[0], edges[-1]), edges)
        return counts.tolist()


def read_gaps(scored: ShardFolder, pieces: Pieces, count: int) -> GapSample:
    """Read the first finished shard; `count` of its rollouts, evenly spread, are kept as text."""
    file = scored.folder / f"shard-{scored.shards[0]['index']:05d}.parquet"
    table = pq.read_table(file, columns=_COLUMNS)
    teacher = table["teacher_logprobs"].combine_chunks().flatten().to_numpy()
    rollout = table["rollout_logprobs"].combine_chunks().flatten().to_numpy()
    chosen = sorted({round(i) for i in np.linspace(0, table.num_rows - 1, min(count, table.num_rows))})
    rows = [table.slice(index, 1).to_pylist()[0] for index in chosen]
    return GapSample(table.num_rows, teacher - rollout, [_rollout(row, pieces) for row in rows])


def open_tokenizer(folders: Sequence[str]) -> Pieces:
    """Decoder of the first folder that holds a `tokenizer.json`; the bare ids where none does."""
    for folder in folders:
        file = Path(folder) / "tokenizer.json"
        if file.is_file():
            from tokenizers import Tokenizer

            return functools.partial(_pieces, Tokenizer.from_file(str(file)))
    return lambda ids: [f"{token} " for token in ids]


def _pieces(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Each token's text behind its predecessor's, so that spaces which only decoding adds are there."""
    decode = functools.partial(tokenizer.decode, skip_special_tokens=False)
    found = [decode([ids[0]])] if len(ids) else []
    for before, token in itertools.pairwise(ids):
        found.append(decode([before, token])[len(decode([before])) :])
    return found


def _rollout(row: dict[str, Any], pieces: Pieces) -> Rollout:
    shown = row["response_tokens"][:SHOWN_TOKENS]
    prompt = row["prompt_tokens"]
    texts = pieces([*prompt, *shown])
    values = zip(
        texts[len(prompt) :],
        row["teacher_logprobs"][: len(shown)],
        row["rollout_logprobs"][: len(shown)],
        strict=True,
    )
    gaps = np.array(row["teacher_logprobs"]) - np.array(row["rollout_logprobs"])
    return Rollout(
        row["document_id"],
        "".join(texts[: len(prompt)]),
        [Token(text, t - r, t, r) for text, t, r in values],
        len(row["response_tokens"]) - len(shown),
        float(gaps.mean()) if len(gaps) else 0.0,
        row["finish_reason"],
    )
