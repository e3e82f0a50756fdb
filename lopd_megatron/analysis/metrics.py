"""Numbers that describe the spectrum of a weight update ΔW = W − W_base = U·S·Vᵀ.

Pure functions of singular values s_1 ≥ … ≥ s_r > 0 or of singular vectors; definitions of EffOPD
(arXiv 2605.11739, appendix), and of arXiv 2606.07082 where that one is unambiguous and the other is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch


def effective_rank(values: torch.Tensor) -> float:
    """exp(−Σ p_i log p_i) with p_i = s_i/Σ s_j: of the values, not of their squares. Between 1 and r."""
    return effective_rank_of_sums(float(values.sum()), float(torch.special.xlogy(values, values).sum()))


def effective_rank_of_sums(nuclear: float, entropy_sum: float) -> float:
    """The same from N = Σ s and E = Σ s·log s: −Σ p log p = log N − E/N."""
    return math.exp(math.log(nuclear) - entropy_sum / nuclear)


def top_fraction_count(rank: int, fraction: float = 0.01) -> int:
    """k = ⌈r·fraction⌉, at least one: how many singular values the top 1 % are."""
    # A fraction such as 0.01 is a little more than 1/100 in binary; 100 values have a top 1 % of one.
    return max(1, math.ceil(rank * fraction - 1e-9))


def top_fraction_norm_ratio(values: torch.Tensor, frobenius: float, rank: int) -> float:
    """√(Σ_{i ≤ k} s_i² / Σ s_j²) with k = ⌈r/100⌉. `values` may hold only the leading k of them."""
    k = top_fraction_count(rank)
    assert values.numel() >= k, (values.numel(), k)
    return float(values[:k].square().sum().sqrt()) / frobenius


def subspace_alignment(right: torch.Tensor, final: torch.Tensor) -> float:
    """Sim_K = ‖V_K(t)ᵀ·V_K(end)‖_F²/K of two [in, K] orthonormal bases: 1 for one span, K/in by chance."""
    assert right.shape == final.shape, (right.shape, final.shape)
    return float((right.T @ final).square().sum()) / right.shape[1]


def vector_cosine(vector: torch.Tensor, final: torch.Tensor) -> float:
    """|u(t)·u(end)| of two unit vectors; the sign of a singular vector means nothing."""
    return float((vector @ final).abs())


def trajectory_concentration(vectors: Sequence[torch.Tensor]) -> float:
    """EVR_{0:2} = (l_1 + l_2)/Σ l_i of the PCA of the first left singular vectors of a series.

    Each [out] vector gets the sign that it has beside the last one. At least three of them: the centred
    ones lie on a line otherwise.
    """
    assert len(vectors) >= 3, len(vectors)
    signs = [1.0 if float(vector @ vectors[-1]) >= 0 else -1.0 for vector in vectors]
    stacked = torch.stack([sign * vector for sign, vector in zip(signs, vectors, strict=True)])
    variances = torch.linalg.svdvals(stacked - stacked.mean(0)).square()
    total = float(variances.sum())
    return float(variances[:2].sum()) / total if total > 0 else 1.0
