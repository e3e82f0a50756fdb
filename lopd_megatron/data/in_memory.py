"""Documents that were just made, as a dataset: packed and shifted by the same code as those on disk."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lopd_megatron.data.column_files import checked_cast
from lopd_megatron.data.documents import Document, column_of
from lopd_megatron.data.store import ConcatDataset, DocumentColumns
from lopd_megatron.records import COLUMNS


def memory_dataset(documents: Sequence[Document]) -> ConcatDataset:
    """A dataset of documents in memory; all must have the columns of the first, and the same k.

    Top-k log-probs are rounded to float16, as on disk. ValueError where another value would change.
    """
    first = documents[0]
    topk = 0 if first.teacher_topk_ids is None else first.teacher_topk_ids.shape[1]
    values = {
        name: checked_cast(
            np.concatenate([column_of(document, name, topk) for document in documents]), column.dtype, name
        )
        for name, column in COLUMNS.items()
        if getattr(first, name) is not None
    }
    lengths = np.array([len(document.tokens) for document in documents], np.int32)
    ids = [document.document_id for document in documents] if first.document_id else []
    return ConcatDataset([DocumentColumns("documents in memory", values, lengths, topk, ids)])
