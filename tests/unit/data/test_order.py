"""The order of documents is a function of (seed, consumed) alone."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lopd_megatron.data.order import Order, permutation


@settings(max_examples=60, deadline=None)
@given(
    size=st.integers(1, 50),
    seed=st.integers(0, 2**31),
    steps=st.lists(st.integers(1, 70), min_size=1, max_size=8),
)
def test_epochs_are_exact_however_the_sequence_is_cut(size: int, seed: int, steps: list[int]) -> None:
    cuts = np.cumsum([0, *steps]).tolist()
    pieces = [Order(size, seed).take(start, count) for start, count in zip(cuts[:-1], steps, strict=True)]
    together = np.concatenate(pieces)
    assert np.array_equal(together, Order(size, seed).take(0, cuts[-1]))
    for epoch in range(cuts[-1] // size):
        assert sorted(together[epoch * size : (epoch + 1) * size].tolist()) == list(range(size))


def test_epochs_and_seeds_differ() -> None:
    orders = {tuple(permutation(20, seed, epoch).tolist()) for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_every_document_is_as_likely_everywhere() -> None:
    """Counts of (document, place) over 5,000 permutations: binomial, so 5 standard deviations is never."""
    counts = np.zeros((6, 6))
    for epoch in range(5_000):
        counts[permutation(6, 1, epoch), np.arange(6)] += 1
    expected = 5_000 / 6
    assert np.abs(counts - expected).max() < 5 * np.sqrt(expected * 5 / 6)


@pytest.mark.parametrize(
    ("seed", "epoch", "expected"),
    [(1234, 0, [5, 0, 6, 7, 4, 3, 1, 9, 8, 2]), (7, 3, [2, 6, 7, 1, 5, 9, 3, 4, 8, 0])],
)
def test_the_order_never_changes(seed: int, epoch: int, expected: list[int]) -> None:
    """A checkpoint of today must go on in its order under every later numpy."""
    assert permutation(10, seed, epoch).tolist() == expected
    assert Order(10, seed).take(10 * epoch, 10).tolist() == expected
