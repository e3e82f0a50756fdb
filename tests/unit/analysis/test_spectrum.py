"""Spectra against dense NumPy: exact ones to rounding, randomized ones within the errors they state."""

import numpy as np
import pytest
import torch

from lopd_megatron.analysis import metrics
from lopd_megatron.analysis.spectrum import Spectrum, spectrum


def matrix_with(values: torch.Tensor, shape: tuple[int, int], seed: int = 0) -> torch.Tensor:
    """A random matrix with these singular values, float64."""
    generator = torch.Generator().manual_seed(seed)
    count = len(values)
    left, _ = torch.linalg.qr(torch.randn(shape[0], count, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(shape[1], count, generator=generator, dtype=torch.float64))
    return (left * values) @ right.T


def decay(count: int, power: float) -> torch.Tensor:
    return torch.arange(1, count + 1, dtype=torch.float64) ** -power


def exact(matrix: torch.Tensor, top: int = 5) -> Spectrum:
    found = spectrum(matrix, top=top, exact_limit=10**6)
    assert found is not None
    return found


def randomized(matrix: torch.Tensor, seed: int = 0) -> Spectrum:
    found = spectrum(matrix, top=5, exact_limit=0, seed=seed)
    assert found is not None
    return found


@pytest.mark.parametrize("shape", [(60, 90), (90, 60), (64, 64)])
def test_exact_equals_numpy(shape: tuple[int, int]) -> None:
    matrix = 1e-4 * torch.from_numpy(np.random.default_rng(3).normal(size=shape))
    left, values, right = np.linalg.svd(matrix.numpy(), full_matrices=False)
    found = exact(matrix)
    # Through the Gram matrix small values have a relative error of ε·(s_1/s)²; here s_1/s < 100.
    np.testing.assert_allclose(found.values.numpy(), values, rtol=1e-11)
    np.testing.assert_allclose(abs(found.right.numpy().T @ right[:5].T), np.eye(5), atol=1e-9)
    assert abs(float(found.left.numpy() @ left[:, 0])) == pytest.approx(1)
    p = values / values.sum()
    assert found.numbers()["effective_rank"] == pytest.approx(np.exp(-(p * np.log(p)).sum()))
    assert found.numbers()["spectral_to_frobenius"] == pytest.approx(values[0] / np.linalg.norm(matrix))
    assert found.residual < 1e-12


def test_rank_counts_values_that_are_not_zero() -> None:
    found = exact(matrix_with(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64), (40, 50)))
    assert found.rank == 3
    assert found.right.shape == (50, 3)
    assert found.numbers()["top1_percent_norm_ratio"] == pytest.approx(3 / 14**0.5)


def test_zero_has_no_spectrum() -> None:
    assert spectrum(torch.zeros(4, 5), top=2, exact_limit=10) is None


@pytest.mark.parametrize("shape", [(300, 420), (420, 300)])
@pytest.mark.parametrize("power", [1.0, 0.5])
def test_randomized_is_within_its_stated_errors(shape: tuple[int, int], power: float) -> None:
    values = 1e-3 * decay(300, power)
    matrix = matrix_with(values, shape).float()
    truth, found = exact(matrix), randomized(matrix)
    assert not found.exact
    bound = found.residual * found.values[0] + 1e-9  # and float32
    assert float((found.values[:5] - truth.values[:5]).abs().max()) <= bound
    numbers, expected = found.numbers(), truth.numbers()
    assert numbers["top1_percent_norm_ratio"] == pytest.approx(expected["top1_percent_norm_ratio"], rel=1e-3)
    assert metrics.subspace_alignment(found.right, truth.right) > 0.99
    # Four standard errors, themselves from 16 probes.
    assert abs(found.effective_rank - truth.effective_rank) < 4 * found.effective_rank_error
    assert 0 < found.effective_rank_error < 0.04 * truth.effective_rank


def test_randomized_effective_rank_is_unbiased_and_its_error_is_honest() -> None:
    matrix = matrix_with(decay(200, 0.7), (200, 260)).float()
    truth = exact(matrix).effective_rank
    runs = [randomized(matrix, seed) for seed in range(20)]
    estimates = np.array([run.effective_rank for run in runs])
    stated = np.mean([run.effective_rank_error for run in runs])
    assert abs(estimates.mean() - truth) < 4 * estimates.std() / 20**0.5
    assert 0.5 < stated / estimates.std() < 2  # the spread of 20 runs is itself good to 16 %
    leading = [float(run.values.sum()) for run in runs]
    assert max(leading) < 0.7 * float(decay(200, 0.7).sum())  # planted: the leading part alone is far off


def test_the_seed_leaves_the_global_generator_alone_and_decides_the_result() -> None:
    matrix = matrix_with(decay(100, 0.5), (100, 120)).float()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    first = randomized(matrix)
    assert torch.equal(torch.rand(3), expected)
    assert randomized(matrix).effective_rank == first.effective_rank
