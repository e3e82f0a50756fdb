"""(seed, consumed samples) → the packed micro-batches of a step. Here token-aligned becomes label-aligned.

    labels[t] = tokens[t + 1] inside each document; every other per-token column moves with it; the last
    position of a document predicts nothing and has loss_mask 0

The documents of a step do not depend on data-parallel size, micro-batch size, workers or restarts. All ranks
compute the same plan from the lengths, so there is no communication.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lopd_megatron.data.order import Order
from lopd_megatron.data.packing import ATTENTION_CROSSOVER_LENGTH_8B, plan_step
from lopd_megatron.data.store import ConcatDataset, DocumentColumns, Span
from lopd_megatron.errors import UserError
from lopd_megatron.parallel.context import zigzag_indices
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
_DTYPES = {name: dtype for name, (_, dtype) in TOKEN_FIELDS.items()} | {
    "position_ids": np.int64,
    "sequence_index": np.int32,
}
_PER_TOPK = frozenset(name for name, (column, _) in TOKEN_FIELDS.items() if COLUMNS[column].per_topk)


@dataclass(frozen=True)
class StepBatch:
    """One optimizer step as this rank sees it."""

    microbatches: list[MicroBatch]
    """Equally many on every rank; a data-parallel rank may get one that is padding only."""
    seq_length: int
    """t: tokens of every micro-batch of this step on every rank, with padding, before context parallelism."""
    num_tokens: int
    """Trained tokens of the whole step."""
    num_total_tokens: int
    """Prompt and response tokens of the whole step, without padding: what throughput counts."""
    sequence_lengths: np.ndarray
    """int32 [n]: tokens of each document of the whole step, all data-parallel ranks; for its FLOPs."""
    document_label: Callable[[int], str] = str
    """How messages name a document, by its index in the dataset."""


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
        dataset: ConcatDataset,
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
        attention_crossover_length: float = ATTENTION_CROSSOVER_LENGTH_8B,
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
        self._attention_crossover_length = attention_crossover_length
        self._capacity = micro_batch_size * seq_length // self._round_to * self._round_to
        self._padded = _round_up(dataset.lengths, self._document_multiple)
        longest = int(self._padded.max())
        limit = seq_length // self._round_to * self._round_to
        if longest > limit:
            label = dataset.document_label(int(self._padded.argmax()))
            raise UserError(
                f"document {label} has {longest} tokens with its padding, a row has "
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
            attention_crossover_length=self._attention_crossover_length,
        )
        spans = self.dataset.spans(documents)
        trained = [_count_trained(*span) for span in spans]
        lengths = self.dataset.lengths[documents]
        return StepBatch(
            microbatches=self._microbatches(
                documents, spans, trained, plan.microbatches[self._rank], plan.seq_length
            ),
            seq_length=plan.seq_length,
            num_tokens=sum(trained),
            num_total_tokens=int(lengths.sum(dtype=np.int64)),
            sequence_lengths=lengths,
            document_label=self.dataset.document_label,
        )

    def _microbatches(
        self,
        documents: np.ndarray,
        spans: list[Span],
        trained: list[int],
        rows: list[list[int]],
        total: int,
    ) -> list[MicroBatch]:
        """One micro-batch of `total` tokens for the documents at the places of each row of the step."""
        padded = self._padded[documents].tolist()
        lengths = [[padded[place] for place in row] for row in rows]
        for row in lengths:
            if (rest := total - sum(row)) > 0:
                row.append(rest)
        fields = self._allocate(len(rows) * total)
        for name in self.columns & TOKEN_FIELDS.keys():
            self._fill(name, spans, rows, lengths, fields[name])
        if "position_ids" in self.columns:
            ramp = np.arange(max(map(max, lengths)))
            pieces = [ramp[:length] for row in lengths for length in row]
            np.concatenate(pieces, out=fields["position_ids"])
        if "sequence_index" in self.columns:
            index = np.concatenate([np.arange(len(row), dtype=np.int32) for row in lengths])
            fields["sequence_index"][:] = np.repeat(index, [length for row in lengths for length in row])
        if self._cp_size > 1:
            mine = np.concatenate(
                [
                    zigzag_indices(np.array(row), self._cp_rank, self._cp_size) + place * total
                    for place, row in enumerate(lengths)
                ]
            )
            fields = {name: values.reshape(-1, *self._shape(name))[mine] for name, values in fields.items()}
        tensors = {
            name: torch.from_numpy(values.reshape(len(rows), -1, *self._shape(name))).split(1)
            for name, values in fields.items()
        }
        return [
            self._microbatch(
                {name: tensors[name][place] if name in tensors else None for name in FIELDS},
                documents[row].tolist(),
                [trained[document] for document in row],
                lengths[place],
            )
            for place, row in enumerate(rows)
        ]

    def _microbatch(
        self, tensors: dict[str, Any], indices: list[int], response_lengths: list[int], lengths: list[int]
    ) -> MicroBatch:
        if len(lengths) > len(indices):
            indices, response_lengths = [*indices, -1], [*response_lengths, 0]
        return MicroBatch(
            **tensors,
            response_lengths=torch.tensor(response_lengths, dtype=torch.int32),
            cu_seqlens=torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32),
            max_seqlen=max(lengths),
            document_indices=tuple(indices),
        )

    def _allocate(self, tokens: int) -> dict[str, np.ndarray]:
        """An array for every field, flat, all in one buffer.

        The allocator keeps the memory of the last buffer for the next one; of many smaller ones it gives back
        what is above twice the largest, and each step would pay a page fault for every 4 KiB.
        """
        sizes = {
            name: (np.dtype(_DTYPES[name]), tokens * math.prod(self._shape(name))) for name in self.columns
        }
        buffer = np.empty(sum(dtype.itemsize * count for dtype, count in sizes.values()), np.uint8)
        fields, start = {}, 0
        # The wide ones first: each stays aligned.
        for name, (dtype, count) in sorted(sizes.items(), key=lambda item: -item[1][0].itemsize):
            stop = start + dtype.itemsize * count
            fields[name] = buffer[start:stop].view(dtype)
            start = stop
        return fields

    def _shape(self, field: str) -> tuple[int, ...]:
        """Of the values of one token."""
        return (self.dataset.topk,) if field in _PER_TOPK else ()

    def _fill(
        self, field: str, spans: list[Span], rows: list[list[int]], lengths: list[list[int]], out: np.ndarray
    ) -> None:
        """A field of all micro-batches end to end, shifted to the labels but for the tokens.

        `lengths` are those of the documents with their padding, and behind them of the rest of the row.
        """
        column = TOKEN_FIELDS[field][0]
        shift = 0 if field == "tokens" else 1
        width = math.prod(self._shape(field))
        zeros = np.zeros(max(map(max, lengths)) * width, out.dtype)
        pieces = []
        for row, padded in zip(rows, lengths, strict=True):
            for place, length in zip(row, padded[: len(row)], strict=True):
                part, first, stop = spans[place]
                values = part.values[column][(first + shift) * width : stop * width]
                pieces.append(values.view(np.float16) if column == "teacher_topk_logprobs" else values)
                if gap := length - (stop - first) + shift:
                    pieces.append(zeros[: gap * width])
            if len(padded) > len(row):
                pieces.append(zeros[: padded[-1] * width])
        np.concatenate(pieces, out=out, casting="safe")


def _count_trained(part: DocumentColumns, first: int, stop: int) -> int:
    """Trained tokens of a document; the first token is never one."""
    return int(np.count_nonzero(part.values["loss_mask"][first:stop]))


def _check_columns(dataset: ConcatDataset, columns: frozenset[str] | None) -> frozenset[str]:
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
