"""Which tokens of a document a context-parallel rank holds: the one rule for data and attention."""

from __future__ import annotations

import numpy as np


def zigzag_indices(lengths: np.ndarray, rank: int, size: int) -> np.ndarray:
    """int64 [Σ lengths / size]: places of the tokens of context-parallel `rank`, documents end to end.

    A document is cut into 2·size equal chunks, of which rank r holds chunks r and 2·size − 1 − r. Causal
    attention over a long document then costs every rank the same. Lengths are multiples of 2·size.
    """
    starts = np.cumsum(lengths) - lengths
    pieces = []
    for start, chunk in zip(starts.tolist(), (lengths // (2 * size)).tolist(), strict=True):
        for place in (rank, 2 * size - 1 - rank):
            pieces.append(np.arange(start + place * chunk, start + (place + 1) * chunk))
    return np.concatenate(pieces)
