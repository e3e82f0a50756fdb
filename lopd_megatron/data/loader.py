"""(seed, consumed samples) → the packed micro-batches of a step. Here token-aligned becomes label-aligned.

    labels[t] = tokens[t + 1] inside each document; every other per-token column moves with it; the last
    position of a document predicts nothing and has loss_mask 0

The documents of a step do not depend on data-parallel size, micro-batch size, workers or restarts. All ranks
compute the same plan from the lengths, so there is no communication.
"""

from __future__ import annotations

import math
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lopd_megatron.data.order import Order
from lopd_megatron.data.packing import CROSSOVER_8B, plan_step
from lopd_megatron.data.store import Dataset, Documents, Span
from lopd_megatron.errors import UserError
from lopd_megatron.records import COLUMNS, MicroBatch

TOKEN_FIELDS: dict[str, tuple[str, type[np.generic]]] = {
    "tokens": ("tokens", np.int64),
    "labels": ("tokens", np.int64),
    "loss_mask": ("loss_mask", np.float32),
    "teacher_logprobs": ("teacher_logprobs", np.float32),
    "rollout_logprobs": ("rollout_logprobs", np.float32),
    "teacher_topk_ids": ("teacher_topk_ids", np.int64),
    "teacher_topk_logprobs": ("teacher_topk_logprobs", np.float32),
}
"""Per-token field of a MicroBatch → the column on disk it is read from, and its dtype in the batch."""

COMPUTED_FIELDS = frozenset({"position_ids", "sequence_index"})
FIELDS = frozenset(TOKEN_FIELDS) | COMPUTED_FIELDS


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step as this rank sees it."""

    microbatches: list[MicroBatch]
    """Equally many on every rank; a data-parallel rank may get one that is padding only."""
    seq_length: int
    """t: tokens of every micro-batch of this step on every rank, with padding, before context parallelism."""
    num_sequences: int
    """Documents of the whole step, all data-parallel ranks."""
    num_tokens: int
    """Trained tokens of the whole step."""
    num_total_tokens: int
    """Prompt and response tokens of the whole step, without padding: what throughput counts."""
    sequence_lengths: np.ndarray
    """int32 [num_sequences]: tokens of every document of the whole step, for its FLOPs."""


class StepLoader:
    """Gives the micro-batches of any step; holds no position of its own.

    `columns` are the per-token fields of `records.MicroBatch` that this pipeline stage reads (None: all that
    the dataset has); the others stay None and their files are not touched, except that the trained tokens of
    each document are always counted from loss_mask (one byte a token). A micro-batch is `micro_batch_size`
    rows of at most `seq_length` tokens, end to end. `pad_to_multiple_of` holds for the tokens of one
    context-parallel rank (sequence parallelism asks for TP); with context parallelism each document is padded
    to a multiple of 2·CP, and this rank holds chunks r and 2·CP − 1 − r of each.
    """

    def __init__(
        self,
        dataset: Dataset,
        *,
        seed: int,
        global_batch_size: int,
        micro_batch_size: int,
        seq_length: int,
        data_parallel_rank: int,
        data_parallel_size: int,
        context_parallel_rank: int = 0,
        context_parallel_size: int = 1,
        num_microbatches_multiple_of: int = 1,
        pad_to_multiple_of: int = 1,
        columns: frozenset[str] | None = None,
        flop_crossover: float = CROSSOVER_8B,
        prefetch: bool = False,
    ) -> None:
        self.dataset = dataset
        self.global_batch_size = global_batch_size
        self.order = Order(len(dataset), seed)
        self.columns = _check_columns(dataset, columns)
        self._rank, self._size = data_parallel_rank, data_parallel_size
        self._cp_rank, self._cp_size = context_parallel_rank, context_parallel_size
        self._document_multiple = 1 if context_parallel_size == 1 else 2 * context_parallel_size
        self._round_to = math.lcm(self._document_multiple, pad_to_multiple_of * context_parallel_size)
        self._multiple_of = num_microbatches_multiple_of
        self._crossover = flop_crossover
        self._capacity = micro_batch_size * seq_length // self._round_to * self._round_to
        self._padded = _round_up(dataset.lengths, self._document_multiple)
        longest = int(self._padded.max())
        limit = seq_length // self._round_to * self._round_to
        if longest > limit:
            raise UserError(
                f"document {int(self._padded.argmax())} has {longest} tokens with its padding, a row has "
                f"{limit}; raise data.seq_length or build the dataset with a lower one"
            )
        self._prefetch = ThreadPoolExecutor(1, thread_name_prefix="loader") if prefetch else None
        self._next: tuple[int, Future[StepBatch]] | None = None

    def step(self, consumed_train_samples: int) -> StepBatch:
        """The step that follows `consumed_train_samples` documents; the same at every call."""
        if self._prefetch is None:
            return self._build(consumed_train_samples)
        ready = self._next
        if ready is not None and ready[0] == consumed_train_samples:
            batch = ready[1].result()
        else:
            batch = self._build(consumed_train_samples)
        following = consumed_train_samples + self.global_batch_size
        self._next = (following, self._prefetch.submit(self._build, following))
        return batch

    def documents(self, consumed_train_samples: int) -> np.ndarray:
        """int64 [global_batch_size]: the documents of a step, in the order of the run."""
        return self.order.take(consumed_train_samples, self.global_batch_size)

    def _build(self, consumed: int) -> StepBatch:
        return self.pack(self.documents(consumed))

    def pack(self, documents: np.ndarray) -> StepBatch:
        """A step made of these documents (int64 [n]), whatever the order of the run says."""
        plan = plan_step(
            self._padded[documents],
            data_parallel_size=self._size,
            capacity=self._capacity,
            multiple_of=self._multiple_of,
            round_to=self._round_to,
            crossover=self._crossover,
        )
        spans = self.dataset.spans(documents)
        trained = [_count_trained(*span) for span in spans]
        return StepBatch(
            microbatches=[
                self._microbatch(documents, spans, trained, row, plan.seq_length)
                for row in plan.microbatches[self._rank]
            ],
            seq_length=plan.seq_length,
            num_sequences=len(documents),
            num_tokens=sum(trained),
            num_total_tokens=int(self.dataset.lengths[documents].sum(dtype=np.int64)),
            sequence_lengths=self.dataset.lengths[documents],
        )

    def _microbatch(
        self, documents: np.ndarray, spans: list[Span], trained: list[int], row: list[int], total: int
    ) -> MicroBatch:
        """The micro-batch of the documents at places `row` of the step."""
        indices = documents[row].tolist()
        lengths = self._padded[indices].tolist()
        response_lengths = [trained[place] for place in row]
        if sum(lengths) < total:
            lengths.append(total - sum(lengths))
            indices.append(-1)
            response_lengths.append(0)
        starts = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)])
        here = [spans[place] for place in row]
        fields = {name: self._fill(name, here, starts, total) for name in self.columns & TOKEN_FIELDS.keys()}
        if "position_ids" in self.columns:
            ramp = np.arange(max(lengths))
            fields["position_ids"] = np.concatenate([ramp[:length] for length in lengths])
        if "sequence_index" in self.columns:
            fields["sequence_index"] = np.repeat(np.arange(len(lengths), dtype=np.int32), lengths)
        if self._cp_size > 1:
            mine = zigzag_indices(np.array(lengths), self._cp_rank, self._cp_size)
            fields = {name: values[mine] for name, values in fields.items()}
        tensors: dict[str, Any] = {
            name: torch.from_numpy(fields[name])[None] if name in fields else None for name in FIELDS
        }
        return MicroBatch(
            **tensors,
            response_lengths=torch.tensor(response_lengths, dtype=torch.int32),
            cu_seqlens=torch.from_numpy(starts.astype(np.int32)),
            max_seqlen=max(lengths),
            document_indices=tuple(indices),
        )

    def _fill(self, field: str, spans: list[Span], starts: np.ndarray, total: int) -> np.ndarray:
        """[total] or [total, k]: one field of all documents, shifted to the labels except for the tokens."""
        column, dtype = TOKEN_FIELDS[field]
        shift = 0 if field == "tokens" else 1
        width = self.dataset.topk if COLUMNS[column].per_topk else 1
        out = np.zeros(total * width, dtype)
        # After the documents `starts` goes on with the padding and the end of the row.
        for start, (part, first, stop) in zip(starts[: len(spans)].tolist(), spans, strict=True):
            values = part.values[column][(first + shift) * width : stop * width]
            if column == "teacher_topk_logprobs":
                values = values.view(np.float16)
            out[start * width : (start + stop - first - shift) * width] = values
        return out.reshape(total, width) if COLUMNS[column].per_topk else out


def _count_trained(part: Documents, first: int, stop: int) -> int:
    """Trained tokens of a document; the first token is never one."""
    return int(np.count_nonzero(part.values["loss_mask"][first:stop]))


def zigzag_indices(lengths: np.ndarray, rank: int, size: int) -> np.ndarray:
    """int64 [Σ lengths / size]: tokens of context-parallel `rank` r: chunks r and 2·size − 1 − r of each.

    Causal attention over a long document costs every rank the same this way. Lengths are multiples of 2·size.
    """
    starts = np.cumsum(lengths) - lengths
    pieces = []
    for start, chunk in zip(starts.tolist(), (lengths // (2 * size)).tolist(), strict=True):
        for place in (rank, 2 * size - 1 - rank):
            pieces.append(np.arange(start + place * chunk, start + (place + 1) * chunk))
    return np.concatenate(pieces)


def _check_columns(dataset: Dataset, columns: frozenset[str] | None) -> frozenset[str]:
    present = {field for field, (column, _) in TOKEN_FIELDS.items() if column in dataset.columns}
    if columns is None:
        return frozenset(present) | COMPUTED_FIELDS
    missing = sorted(columns - present - COMPUTED_FIELDS)
    if missing:
        names = ", ".join(part.prefix for part in dataset.prefixes)
        raise UserError(
            f"{names}: no column {missing[0]} (there are {', '.join(sorted(dataset.columns))}); "
            "score the rollouts with it and build again, or set another loss.objective"
        )
    return columns


def _round_up(lengths: np.ndarray, multiple: int) -> np.ndarray:
    return -(-lengths.astype(np.int64) // multiple) * multiple
