"""Token ids against the vocabulary of the model: an id outside has no embedding, or a meaningless one."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from lopd_megatron.data.shard_reader import RolloutBatch
from lopd_megatron.errors import UserError


def check_batch(batch: RolloutBatch, vocab_size: int, path: Path, row: int) -> None:
    """UserError with the first row of `batch`, whose first one is `row` of `path`, that has a foreign id."""
    parts = [
        ("prompt token", batch.prompt_tokens, batch.prompt_lengths),
        ("response token", batch.response_tokens, batch.response_lengths),
        ("top-k token of the teacher", batch.topk_ids, batch.response_lengths * batch.topk),
    ]
    for what, ids, lengths in parts:
        place = first_foreign(ids, vocab_size)
        if place is not None:
            index = int(np.searchsorted(np.cumsum(lengths), place, side="right"))
            raise UserError(
                f"{path}, row {row + index} (prompt {batch.prompt_ids[index]}): {what} {ids[place]} is not "
                f"one of the {vocab_size} ids of model.student; make the file again with its tokenizer"
            )


def first_foreign(ids: np.ndarray, vocab_size: int) -> int | None:
    """Place of the first id at or above `vocab_size`."""
    if not ids.size or int(ids.max()) < vocab_size:
        return None
    return int(np.flatnonzero(ids >= vocab_size)[0])
