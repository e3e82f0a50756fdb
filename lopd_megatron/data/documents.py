"""A rollout as the columns of the dataset: one value of each column per token, prompt then response."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from lopd_megatron.data.shard_reader import RolloutBatch
from lopd_megatron.records import COLUMNS


@dataclass(frozen=True)
class Document:
    """One document of s tokens, token-aligned; see `records.COLUMNS`."""

    tokens: np.ndarray  # [s]
    loss_mask: np.ndarray  # [s]
    teacher_logprobs: np.ndarray | None = None  # [s]
    rollout_logprobs: np.ndarray | None = None  # [s]
    teacher_topk_ids: np.ndarray | None = None  # [s, k]
    teacher_topk_logprobs: np.ndarray | None = None  # [s, k] float
    document_id: str = ""


def document_of(
    document_id: str, prompt_tokens: Sequence[int], response_tokens: Sequence[int], **on_response: np.ndarray
) -> Document:
    """One rollout whose response tokens are all trained, with columns [r] or [r, k] of its response."""
    prompt = len(prompt_tokens)
    mask = np.ones(len(response_tokens), np.uint8)
    columns = {
        name: np.concatenate(
            [np.full((prompt, *values.shape[1:]), COLUMNS[name].on_prompt, values.dtype), values]
        )
        for name, values in {"loss_mask": mask, **on_response}.items()
    }
    tokens = np.array([*prompt_tokens, *response_tokens], np.int32)
    return Document(tokens=tokens, document_id=document_id, **columns)


def flat_columns(batch: RolloutBatch) -> dict[str, np.ndarray]:
    """Token-aligned columns of a batch: prompt then response of each document, end to end."""
    both = np.stack([batch.prompt_lengths, batch.response_lengths], axis=1).ravel()
    is_response = np.repeat(np.tile([False, True], len(batch.prompt_lengths)), both)
    tokens = np.empty(len(is_response), np.int32)
    tokens[~is_response] = batch.prompt_tokens
    tokens[is_response] = batch.response_tokens
    on_response = {"loss_mask": batch.response_mask, **batch.logprobs}
    if batch.topk:
        on_response["teacher_topk_ids"] = batch.topk_ids.reshape(-1, batch.topk)
        logprobs = batch.topk_logprobs.reshape(-1, batch.topk).astype(np.float16)
        on_response["teacher_topk_logprobs"] = logprobs.view(np.uint16)
    columns = {"tokens": tokens}
    for name, values in on_response.items():
        column = COLUMNS[name]
        columns[name] = np.full((len(is_response), *values.shape[1:]), column.on_prompt, column.dtype)
        columns[name][is_response] = values
    return columns


def column_of(document: Document, name: str, topk: int) -> np.ndarray:
    """The values of a column as they are stored, flat; ValueError where a token has not one (or k)."""
    values = getattr(document, name)
    if values is None:
        raise ValueError(f"a document lacks {name}, which the first one has")
    values = np.asarray(values)
    tokens = len(document.tokens)
    if values.shape != ((tokens, topk) if COLUMNS[name].per_topk else (tokens,)):
        # Not left to the sum over documents: one that is short and one that is long would pass it, shifted.
        what = f"{tokens} tokens" + (f" and k = {topk}" if COLUMNS[name].per_topk else "")
        raise ValueError(f"{name} has the shape {values.shape}, its document has {what}")
    if name == "teacher_topk_logprobs":
        values = values.astype(np.float16).view(np.uint16)
    return values.reshape(-1)
