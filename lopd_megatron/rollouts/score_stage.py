"""Rollouts → scored rollouts: what the teacher says of exactly those token ids."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from lopd_megatron.inference.requests import Engine, Failure, ScoreRequest, ScoringPath, TokenScores
from lopd_megatron.lineage import Lineage
from lopd_megatron.records import ROLLOUT_SCHEMA, SCORE_SCHEMA
from lopd_megatron.rollouts.shard_files import Kind


@dataclass
class ScoreJob:
    """`worker.ShardJob` for rollouts → scored."""

    topk: int
    lineage: Lineage
    path: ScoringPath = "stock"
    kind: Kind = "scores"
    source_schema: pa.Schema = ROLLOUT_SCHEMA

    @property
    def requests_per_row(self) -> int:
        return 1

    def requests(self, index: int, source: pa.Table) -> list[ScoreRequest]:
        prompts = source["prompt_tokens"].to_pylist()
        responses = source["response_tokens"].to_pylist()
        return [
            ScoreRequest((index, row), prompt + response, len(prompt))
            for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True))
        ]

    def document_id(self, source: pa.Table, position: int) -> str:
        return source["document_id"][position].as_py()

    def answers(self, engine: Engine, requests: Iterable[ScoreRequest]) -> Iterator[TokenScores | Failure]:
        return engine.score(requests, topk=self.topk, path=self.path)

    def table(self, source: pa.Table, answers: dict[int, TokenScores]) -> pa.Table:
        rows = sorted(answers)
        scores = [answers[row] for row in rows]
        columns = [source.take(rows)[name] for name in ROLLOUT_SCHEMA.names]
        columns.append(pa.array([s.logprobs for s in scores], SCORE_SCHEMA.field("teacher_logprobs").type))
        ids = [s.topk_ids.ravel() for s in scores]
        columns.append(pa.array(ids, SCORE_SCHEMA.field("teacher_topk_ids").type))
        logprobs = [s.topk_logprobs.ravel() for s in scores]
        columns.append(pa.array(logprobs, SCORE_SCHEMA.field("teacher_topk_logprobs").type))
        return pa.Table.from_arrays(columns, schema=SCORE_SCHEMA)


def score_tokens(
    engine: Engine, documents: Sequence[tuple[Sequence[int], Sequence[int]]], *, path: ScoringPath = "flat"
) -> list[np.ndarray]:
    """Log-probs under the engine's model of each response given its prompt; float32, token-aligned.

    `documents` are (prompt_tokens, response_tokens), both of at least one token. Raises on the first one
    that the engine refuses.
    """
    requests = [
        ScoreRequest((0, row), [*prompt, *response], len(prompt))
        for row, (prompt, response) in enumerate(documents)
    ]
    found: dict[int, np.ndarray] = {}
    for answer in engine.score(requests, topk=0, path=path):
        if isinstance(answer, Failure):
            raise ValueError(f"document {answer.key[1]}: {answer.error}")
        found[answer.key[1]] = answer.logprobs
    return [found[row] for row in range(len(documents))]
