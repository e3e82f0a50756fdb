"""The metrics against closed forms and dense NumPy, with the wrong readings of the definitions."""

import math

import numpy as np
import pytest
import torch

from lopd_megatron.analysis import metrics


def test_effective_rank_of_equal_values_is_their_number() -> None:
    assert metrics.effective_rank(torch.full((37,), 0.2, dtype=torch.float64)) == pytest.approx(37)
    assert metrics.effective_rank(torch.tensor([3.0, 0.0, 0.0])) == pytest.approx(1)


def test_effective_rank_uses_values_not_squares() -> None:
    values = torch.tensor([2.0, 1.0, 1.0], dtype=torch.float64)
    # p = ½, ¼, ¼: entropy 1.5·log 2
    assert metrics.effective_rank(values) == pytest.approx(2**1.5)
    assert metrics.effective_rank(values.square()) != pytest.approx(2**1.5, rel=0.05)  # planted


def test_effective_rank_does_not_depend_on_scale() -> None:
    values = torch.rand(50, dtype=torch.float64) + 0.01
    assert metrics.effective_rank(1e-6 * values) == pytest.approx(metrics.effective_rank(values))


@pytest.mark.parametrize(("rank", "expected"), [(1, 1), (99, 1), (100, 1), (101, 2), (4096, 41), (700, 7)])
def test_top_one_percent_rounds_up(rank: int, expected: int) -> None:
    assert metrics.top_fraction_count(rank) == expected


def test_top_one_percent_norm_ratio() -> None:
    values = torch.tensor([3.0, 2.0, *[1.0] * 148], dtype=torch.float64)
    frobenius = float(values.norm())
    expected = math.sqrt((9 + 4) / (9 + 4 + 148))
    assert metrics.top_fraction_norm_ratio(values, frobenius, 150) == pytest.approx(expected)
    assert (3 + 2) / float(values.sum()) != pytest.approx(expected, rel=0.05)  # planted: values, not squares


def test_alignment_of_spans_not_of_vectors() -> None:
    generator = torch.Generator().manual_seed(0)
    basis, _ = torch.linalg.qr(torch.randn(30, 6, generator=generator, dtype=torch.float64))
    rotation, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    first, other = basis[:, :3], basis[:, 3:]
    assert metrics.subspace_alignment(first @ rotation, first) == pytest.approx(1)
    assert metrics.subspace_alignment(other, first) == pytest.approx(0, abs=1e-12)
    half = torch.stack((first[:, 0], first[:, 1], other[:, 0]), dim=1)
    assert metrics.subspace_alignment(half, first) == pytest.approx(2 / 3)
    # planted: the mean cosine of the k-th vectors changes under a rotation of the same span
    assert float((first @ rotation * first).sum(0).abs().mean()) < 0.99


def test_alignment_by_chance_is_k_over_n() -> None:
    generator = torch.Generator().manual_seed(1)
    found = []
    for _ in range(200):
        pair = [
            torch.linalg.qr(torch.randn(40, 4, generator=generator, dtype=torch.float64))[0] for _ in "ab"
        ]
        found.append(metrics.subspace_alignment(*pair))
    # 200 draws with a standard deviation near 0.03: the mean is good to 0.002
    assert np.mean(found) == pytest.approx(4 / 40, abs=0.01)


def test_cosine_has_no_sign() -> None:
    vector = torch.nn.functional.normalize(torch.arange(1.0, 5.0), dim=0)
    assert metrics.vector_cosine(-vector, vector) == pytest.approx(1)


def test_trajectory_concentration_equals_pca_and_ignores_signs() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(6, 12)) + 4.0
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    variances = np.linalg.eigvalsh(np.cov(vectors.T))[::-1]
    expected = variances[:2].sum() / variances.sum()
    flipped = vectors * np.array([1, -1, 1, -1, -1, 1])[:, None]
    assert metrics.trajectory_concentration(list(torch.from_numpy(flipped))) == pytest.approx(expected)
    assert expected < 0.9
    line = [torch.tensor([1.0, t, 0.0], dtype=torch.float64) for t in (0.0, 0.1, 0.2, 0.3)]
    assert metrics.trajectory_concentration(line) == pytest.approx(1)
