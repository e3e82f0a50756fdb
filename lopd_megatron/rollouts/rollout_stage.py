"""Prompts → rollouts: responses sampled by the student or the teacher, as token ids with log-probs.

The seed of a document follows from its id, so shards, batches, workers and restarts do not change it. On CPU
the response is then the same, bit for bit. On CUDA vLLM's kernels depend on what shares the batch, and a
document made again can leave its old path at a near tie; what was written is kept as it is.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from lopd_megatron.hf_folder import read_config
from lopd_megatron.inference.requests import (
    Engine,
    Failure,
    Generation,
    GenerationRequest,
    Sampling,
    document_seed,
)
from lopd_megatron.lineage import Lineage
from lopd_megatron.records import PROMPT_SCHEMA, ROLLOUT_SCHEMA
from lopd_megatron.rollouts.shard_files import Kind


@dataclass
class RolloutJob:
    """`num_samples` responses per prompt; `worker.ShardJob` for prompts → rollouts."""

    sampling: Sampling
    num_samples: int
    seed: int
    lineage: Lineage
    kind: Kind = "rollouts"
    source_schema: pa.Schema = PROMPT_SCHEMA

    def requests(self, index: int, source: pa.Table) -> list[GenerationRequest]:
        prompts = source["prompt_tokens"].to_pylist()
        ids = source["prompt_id"].to_pylist()
        return [
            GenerationRequest(
                (index, row * self.num_samples + sample),
                prompt,
                document_seed(self.seed, f"{prompt_id}/{sample}"),
            )
            for row, (prompt_id, prompt) in enumerate(zip(ids, prompts, strict=True))
            for sample in range(self.num_samples)
        ]

    @property
    def requests_per_row(self) -> int:
        return self.num_samples

    def document_id(self, source: pa.Table, position: int) -> str:
        row, sample = divmod(position, self.num_samples)
        return f"{source['prompt_id'][row].as_py()}/{sample}"

    def answers(
        self, engine: Engine, requests: Iterable[GenerationRequest]
    ) -> Iterator[Generation | Failure]:
        return engine.generate(requests, self.sampling)

    def table(self, source: pa.Table, answers: dict[int, Generation]) -> pa.Table:
        prompts = source.to_pylist()
        rows = []
        for position in sorted(answers):
            row, sample = divmod(position, self.num_samples)
            prompt, answer = prompts[row], answers[position]
            rows.append(
                {
                    "document_id": self.document_id(source, position),
                    "prompt_id": prompt["prompt_id"],
                    "sample_index": sample,
                    "prompt_tokens": prompt["prompt_tokens"],
                    "response_tokens": answer.response_tokens,
                    "rollout_logprobs": answer.logprobs,
                    "finish_reason": answer.finish_reason,
                    "answer": prompt["answer"],
                }
            )
        return pa.Table.from_pylist(rows, schema=ROLLOUT_SCHEMA)


def stop_token_ids(model: str, extra: Iterable[int] = ()) -> tuple[int, ...]:
    """Every id that ends a response: of the model's generation config (else its config), and `extra`."""
    found = set(extra)
    generation_config = Path(model) / "generation_config.json"
    for config in (_read(generation_config), read_config(model)):
        ids = config.get("eos_token_id")
        if ids is not None:
            found.update([ids] if isinstance(ids, int) else ids)
            break
    return tuple(sorted(found))


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
