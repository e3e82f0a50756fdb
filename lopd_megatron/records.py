"""READ FIRST: every record and column that crosses a stage. Nothing else is shared between stages.

Conventions
    token-aligned   value t describes tokens[t]: everything on disk
    label-aligned   value t describes labels[t] = tokens[t + 1]: everything in a batch
    log-probs       natural logarithm, nats, float32, at temperature 1 unless a manifest says otherwise
    response        the generated part of a rollout, with its EOS when it was sampled; a truncated
                    response (finish_reason "length") has none, and none is invented

Between the offline programs records travel as Parquet shards, `shard-00000.parquet`, each beside its
`shard-00000.json` (counts, hash, lineage); a shard without its JSON does not exist. The dataset for training
is columnar: see `COLUMNS`. The only shift from token- to label-aligned is made in `lopd_megatron.data`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pyarrow as pa

if TYPE_CHECKING:  # seconds of every start, and prompts and files need no tensor
    import torch

SCHEMA_VERSION = 1

PROMPT_SCHEMA = pa.schema(
    [
        pa.field("prompt_id", pa.string(), nullable=False),  # stable: a hash of the content
        pa.field("prompt_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("answer", pa.string()),  # the reference answer where there is one
        pa.field("source", pa.string()),  # the file it came from
    ]
)
"""`prompts/shard-*.parquet`. The prompt as the model sees it: template applied, tokenized once."""

ROLLOUT_SCHEMA = pa.schema(
    [
        pa.field("document_id", pa.string(), nullable=False),  # "{prompt_id}/{sample_index}"
        pa.field("prompt_id", pa.string(), nullable=False),
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("prompt_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("response_tokens", pa.list_(pa.int32()), nullable=False),  # [r], EOS included
        pa.field("rollout_logprobs", pa.list_(pa.float32()), nullable=False),  # [r], of the sampler
        pa.field("finish_reason", pa.string(), nullable=False),  # "stop" | "length"
        pa.field("answer", pa.string()),
    ]
)
"""`rollouts/shard-*.parquet`."""

SCORE_SCHEMA = pa.schema(
    [
        *ROLLOUT_SCHEMA,
        pa.field("teacher_logprobs", pa.list_(pa.float32()), nullable=False),  # [r]
        # Row-major [r, k], most likely first; empty where k = 0. The sampled token may or may not be in.
        pa.field("teacher_topk_ids", pa.list_(pa.int32()), nullable=False),
        pa.field("teacher_topk_logprobs", pa.list_(pa.float32()), nullable=False),
    ]
)
"""`scores/shard-*.parquet`: a rollout and what the teacher says of exactly those token ids."""

PROBLEM_RESULT_SCHEMA = pa.schema(
    [
        pa.field("problem_id", pa.string(), nullable=False),  # stable: a hash of the content
        pa.field("source", pa.string(), nullable=False),  # the file it came from
        pa.field("row", pa.int32(), nullable=False),  # its row there, from 0
        pa.field("sample_index", pa.int32(), nullable=False),
        pa.field("response_tokens", pa.list_(pa.int32()), nullable=False),
        pa.field("finish_reason", pa.string(), nullable=False),
        pa.field("extracted", pa.string()),  # the answer found in the response
        pa.field("answer", pa.string(), nullable=False),
        pa.field("correct", pa.bool_(), nullable=False),
    ]
)
"""`evaluation/results.parquet`: one row per sampled answer."""


@dataclass(frozen=True)
class Column:
    """One Megatron IndexedDataset, `<prefix>.<name>.bin/.idx`; one sequence per document."""

    name: str
    dtype: type[np.generic]
    per_topk: bool = False
    """k values per token, row-major, so a document of s tokens has s·k values."""
    on_prompt: float = 0
    """What stands at prompt tokens, which have no value of their own."""


COLUMNS = {
    column.name: column
    for column in (
        Column("tokens", np.int32),  # prompt + response
        Column("loss_mask", np.uint8),  # 1 where the token is a trained response token
        Column("teacher_logprobs", np.float32),
        Column("rollout_logprobs", np.float32),
        Column("teacher_topk_ids", np.int32, per_topk=True, on_prompt=-1),
        # float16 bits stored through uint16, which IndexedDataset has and float16 it has not
        Column("teacher_topk_logprobs", np.uint16, per_topk=True),
    )
}
"""Token-aligned columns of a dataset, 13 bytes a token for the first four. Every dataset has `tokens` and
`loss_mask`; the manifest lists which of the others it has."""


@dataclass
class MicroBatch:
    """What one forward pass takes: `micro_batch_size` packed rows end to end, one THD row of t tokens.

    Label-aligned; padding tokens form a last document of their own with loss_mask 0. Under context
    parallelism the per-token fields hold this rank's part and `cu_seqlens` still the whole rows.
    A pipeline stage that does not read a column gets None for it.
    """

    tokens: torch.Tensor | None  # int64 [1, t]
    labels: torch.Tensor | None  # int64 [1, t]; tokens shifted left inside each document
    loss_mask: torch.Tensor | None  # float32 [1, t]; 1 where labels[t] is a trained response token
    position_ids: torch.Tensor | None  # int64 [1, t], from 0 in each document
    teacher_logprobs: torch.Tensor | None  # float32 [1, t]
    rollout_logprobs: torch.Tensor | None  # float32 [1, t]
    teacher_topk_ids: torch.Tensor | None  # int64 [1, t, k]
    teacher_topk_logprobs: torch.Tensor | None  # float32 [1, t, k]
    sequence_index: torch.Tensor | None  # int32 [1, t]; which of the n documents
    response_lengths: torch.Tensor  # int32 [n]; trained tokens of the whole document, 0 for padding
    cu_seqlens: torch.Tensor  # int32 [n + 1]
    max_seqlen: int
    document_indices: tuple[int, ...]  # index in the dataset of each document, −1 for padding


@dataclass
class LossOutput:
    """What the loss returns for one micro-batch: sums and counts; nothing is divided before the last sum.

    `numerator` is a float32 scalar with a graph; the gradient of a step is the sum of its gradients over
    micro-batches, data-parallel and context-parallel ranks, divided once by the sum of `denominator`.
    """

    numerator: torch.Tensor  # [] float32
    denominator: torch.Tensor  # [] int32: trained tokens, or trained sequences under per_sequence
    metric_sums: dict[str, torch.Tensor]  # name → float64 [2]: numerator, denominator
