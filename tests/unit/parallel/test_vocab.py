"""Shards of the vocabulary: whole, disjoint, padding last."""

import itertools

import pytest

from lopd_megatron.parallel.vocab import VocabRange


class FakeGroup:
    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size

    def rank(self) -> int:
        return self._rank

    def size(self) -> int:
        return self._size


@pytest.mark.parametrize(
    ("vocab_size", "padded", "size"), [(211, 256, 4), (30, 512, 4), (8, 8, 2), (5, 5, 1)]
)
def test_shards_cover_every_token_once(vocab_size: int, padded: int, size: int) -> None:
    shards = [VocabRange.of(vocab_size, padded, FakeGroup(rank, size)) for rank in range(size)]
    assert shards[0].vocab_start_index == 0
    assert shards[-1].vocab_end_index == padded
    assert all(a.vocab_end_index == b.vocab_start_index for a, b in itertools.pairwise(shards))
    assert sum(shard.num_real for shard in shards) == vocab_size
    for shard in shards:
        real = range(shard.vocab_start_index, shard.vocab_start_index + shard.num_real)
        assert all(token < vocab_size for token in real)


def test_one_rank_holds_all() -> None:
    whole = VocabRange.of(5, 8, None)
    assert (whole.vocab_start_index, whole.vocab_end_index, whole.num_real, whole.group_size) == (0, 8, 5, 1)


@pytest.mark.parametrize(("vocab_size", "padded"), [(8, 9), (9, 8)])
def test_sizes_that_do_not_fit_are_refused(vocab_size: int, padded: int) -> None:
    with pytest.raises(ValueError, match=str(padded)):
        VocabRange.of(vocab_size, padded, FakeGroup(0, 2))
