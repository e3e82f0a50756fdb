"""Held-out scores: sums divided once, standard errors over documents."""

import math

import pytest
import torch

from lopd_megatron.effopd.scores import HeldOutSums, agree


def test_mean_is_over_tokens() -> None:
    sums = HeldOutSums(4)
    sums.add(torch.tensor([1.0, 2.0, 3.0, 4.0]), torch.tensor([0, 1, 1, 1]))
    score = sums.score()
    assert score.value == pytest.approx(-10 / 4)
    assert score.value != pytest.approx(-(1 + 3) / 2)  # planted: the mean of document means
    assert score.count == 2


def test_the_result_does_not_depend_on_the_packing() -> None:
    generator = torch.Generator().manual_seed(1)
    losses, documents = torch.rand(40, generator=generator), torch.arange(40) // 5
    whole, parts = HeldOutSums(8), HeldOutSums(8)
    whole.add(losses, documents)
    for piece in torch.randperm(40, generator=generator).split(7):
        parts.add(losses[piece], documents[piece])
    assert parts.score().value == pytest.approx(whole.score().value, abs=1e-15)


def test_standard_error_covers_the_truth() -> None:
    """Documents of random length with correlated tokens: the error is that of documents, not of tokens."""
    generator = torch.Generator().manual_seed(2)
    inside, naive_inside, rounds = 0, 0, 300
    for _ in range(rounds):
        lengths = torch.randint(5, 30, (40,), generator=generator)
        documents = torch.arange(40).repeat_interleave(lengths)
        losses = (1 + torch.randn(40, generator=generator))[documents]
        sums = HeldOutSums(40)
        sums.add(losses, documents)
        score = sums.score()
        inside += abs(-score.value - 1.0) < 1.96 * score.standard_error
        naive_inside += abs(-score.value - 1.0) < 1.96 * float(losses.std()) / math.sqrt(len(losses))
    # 95 % nominal; a linearised ratio of 40 documents is a little short; 300 rounds have an error of 1.3 %.
    assert inside / rounds > 0.90
    assert naive_inside / rounds < 0.6  # planted: tokens counted as independent


def test_one_document_has_no_spread() -> None:
    sums = HeldOutSums(2)
    sums.add(torch.tensor([1.0, 2.0]), torch.tensor([1, 1]))
    assert (sums.score().standard_error, sums.score().count) == (0.0, 1)


def test_nothing_to_score_is_an_error() -> None:
    with pytest.raises(ValueError, match="no held-out token"):
        HeldOutSums(3).score()


def test_the_deciding_rank_needs_a_score() -> None:
    with pytest.raises(ValueError, match="compute the score"):
        agree(None)
