"""Means and ratios: sums divided once, errors over documents."""

import math

import numpy as np
import pytest

from lopd_megatron.estimates import mean, ratio


def test_a_mean_and_its_error() -> None:
    values = [1.0, 2.0, 4.0]
    found = mean(values)
    assert found.value == pytest.approx(7 / 3)
    assert found.standard_error == pytest.approx(np.std(values, ddof=1) / math.sqrt(3))
    assert mean([True]) == (1.0, 0.0)


def test_a_ratio_is_over_tokens() -> None:
    found = ratio([1.0, 9.0], [1, 3])
    assert found.value == pytest.approx(10 / 4)
    assert found.value != pytest.approx((1 + 3) / 2)  # planted: the mean of document means


def test_with_equal_counts_a_ratio_is_a_mean() -> None:
    values = [0.5, 1.0, 3.5, 2.0]
    assert ratio(values, [1] * 4) == pytest.approx(mean(values))


def test_the_error_of_a_ratio_covers_the_truth() -> None:
    """Documents of random length with correlated tokens: the error is that of documents, not of tokens."""
    rng = np.random.default_rng(2)
    inside, naive_inside, rounds = 0, 0, 300
    for _ in range(rounds):
        lengths = rng.integers(5, 30, 40)
        levels = 1 + rng.standard_normal(40)
        found = ratio(levels * lengths, lengths)
        inside += abs(found.value - 1.0) < 1.96 * found.standard_error
        tokens = np.repeat(levels, lengths)
        naive_inside += abs(found.value - 1.0) < 1.96 * tokens.std() / math.sqrt(len(tokens))
    # 95 % nominal; a linearised ratio of 40 documents is a little short; 300 rounds have an error of 1.3 %.
    assert inside / rounds > 0.90
    assert naive_inside / rounds < 0.6  # planted: tokens counted as independent


def test_one_document_says_nothing_of_the_others() -> None:
    assert ratio([3.0], [2]) == (1.5, math.inf)
