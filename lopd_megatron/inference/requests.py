"""What an inference engine is asked and what it answers, without a word of vLLM.

`Engine` is the seam: `engine.VllmEngine` is the real one. Requests are pulled from an iterator only when the
engine has room, and answers come as they finish, in any order: no barrier between batches or shards, and
memory that does not grow with the number of documents.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

Key = tuple[int, int]
"""(shard index, position in the shard): names a request and its answer."""

ScoringPath = Literal["native", "flat", "stock"]


@dataclass(frozen=True)
class Sampling:
    """How responses are drawn; one value for a whole stage."""

    temperature: float
    top_p: float
    max_response_tokens: int
    stop_token_ids: tuple[int, ...]


@dataclass(frozen=True)
class GenerationRequest:
    key: Key
    prompt_tokens: list[int]
    seed: int
    document_id: str = ""
    """Names the document that the answer becomes, where no shard does."""


@dataclass(frozen=True)
class Generation:
    key: Key
    response_tokens: list[int]  # [r], the stop token included
    logprobs: np.ndarray  # float32 [r], of the sampled tokens at temperature 1, before top-p
    finish_reason: str  # "stop" | "length"


@dataclass(frozen=True)
class ScoreRequest:
    """Score `tokens[start:]`, each given everything before it; 1 ≤ start < len(tokens)."""

    key: Key
    tokens: list[int]
    start: int


@dataclass(frozen=True)
class TokenScores:
    key: Key
    logprobs: np.ndarray  # float32 [r]
    topk_ids: np.ndarray  # int32 [r, k], most likely first
    topk_logprobs: np.ndarray  # float32 [r, k]


@dataclass(frozen=True)
class Failure:
    """The engine refuses this one request; the others are not harmed."""

    key: Key
    error: str


class EngineLost(Exception):
    """The engine ran out of memory or died: everything in flight must be sent again to a new one."""


class Engine(Protocol):
    on_step: Callable[[], None]
    """Called at every step of the engine, so that a caller can tell a slow engine from a dead one."""

    def generate(
        self, requests: Iterable[GenerationRequest], sampling: Sampling
    ) -> Iterator[Generation | Failure]: ...

    def score(
        self, requests: Iterable[ScoreRequest], *, topk: int, path: ScoringPath
    ) -> Iterator[TokenScores | Failure]: ...

    def close(self) -> None: ...


def document_seed(seed: int, document_id: str) -> int:
    """The sampling seed of one document, 63 bits: the same whatever the shard, batch, worker or restart."""
    digest = hashlib.sha256(f"{seed}/{document_id}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1
