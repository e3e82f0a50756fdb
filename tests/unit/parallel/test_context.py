"""Which tokens of a document a context-parallel rank holds."""

import numpy as np
import pytest

from lopd_megatron.parallel.context import zigzag_indices


def test_zigzag_by_eye() -> None:
    lengths = np.array([8, 4])
    assert zigzag_indices(lengths, 0, 2).tolist() == [0, 1, 6, 7, 8, 11]
    assert zigzag_indices(lengths, 1, 2).tolist() == [2, 3, 4, 5, 9, 10]


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_every_token_has_one_rank_and_all_ranks_have_equal_causal_work(size: int) -> None:
    lengths = np.array([2, 10, 4]) * size
    ranks = [zigzag_indices(lengths, rank, size) for rank in range(size)]
    assert sorted(np.concatenate(ranks)) == list(range(int(lengths.sum())))
    positions = np.concatenate([np.arange(length) for length in lengths])
    assert len({int(positions[rank].sum()) for rank in ranks}) == 1
