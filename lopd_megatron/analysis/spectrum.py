"""The spectrum of one matrix: exact where that is quick, randomized with stated errors where it is not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from lopd_megatron.analysis import metrics

OVERSAMPLING = 10
POWER_ITERATIONS = 4
NUM_PROBES = 16
LANCZOS_STEPS = 30


@dataclass(frozen=True)
class Spectrum:
    """The leading part of a spectrum, with what the whole of it adds up to."""

    values: torch.Tensor
    """float64, falling: all r of them where exact, at least the top 1 % where randomized."""
    left: torch.Tensor
    """[out] first left singular vector."""
    right: torch.Tensor
    """[in, K] first right singular vectors."""
    rank: int
    frobenius: float
    effective_rank: float
    effective_rank_error: float
    """Standard error over the random probes; 0 where exact."""
    residual: float
    """Largest ‖ΔW·v_i − s_i·u_i‖ or ‖ΔWᵀ·u_i − s_i·v_i‖ of the first K, over s_1.

    No s_i of them is further than that·s_1 from a singular value.
    """
    exact: bool

    def numbers(self) -> dict[str, float]:
        """The metrics by name."""
        spectral = float(self.values[0])
        return {
            "spectral_norm": spectral,
            "spectral_to_frobenius": spectral / self.frobenius,
            "stable_rank": (self.frobenius / spectral) ** 2,
            "rank": self.rank,
            "effective_rank": self.effective_rank,
            "effective_rank_error": self.effective_rank_error,
            "top1_percent_norm_ratio": metrics.top_fraction_norm_ratio(
                self.values, self.frobenius, self.rank
            ),
            "residual": self.residual,
        }


def spectrum(matrix: torch.Tensor, *, top: int, exact_limit: int, seed: int = 0) -> Spectrum | None:
    """Decompose a float32 or float64 [out, in] matrix; None where it is zero.

    `top`: K, singular vectors kept (fewer in a smaller matrix). Exact for min(out, in) ≤ `exact_limit`:
    about 10·min³ operations in float64. Otherwise a few hundred products of the matrix with vectors.
    """
    if not bool(matrix.any()):
        return None
    top = min(top, *matrix.shape)
    if min(matrix.shape) <= exact_limit:
        return _exact(matrix.double(), top)
    return _randomized(matrix, top, seed)


def _exact(matrix: torch.Tensor, top: int) -> Spectrum:
    """Through the Gram matrix of the shorter side: three times quicker than a full SVD.

    Its eigenvalues are good to about n·ε·s_1², so singular values below s_1·√(n·ε) ≈ 1e-6·s_1 are not
    resolved and count as zero.
    """
    wide = matrix.shape[0] <= matrix.shape[1]
    tall = matrix.T if wide else matrix
    eigenvalues, vectors = torch.linalg.eigh(tall.T @ tall)
    eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
    noise = max(matrix.shape) * torch.finfo(matrix.dtype).eps * eigenvalues[0]
    values = eigenvalues[eigenvalues > noise].sqrt()
    top = min(top, values.numel())
    short = vectors[:, :top]
    long = tall @ short / values[:top]
    left, right = (short, long) if wide else (long, short)
    return Spectrum(
        values=values,
        left=left[:, 0],
        right=right,
        rank=values.numel(),
        frobenius=float(matrix.norm()),
        effective_rank=metrics.effective_rank(values),
        effective_rank_error=0.0,
        residual=_residual(matrix, left, values[:top], right),
        exact=True,
    )


def _randomized(matrix: torch.Tensor, top: int, seed: int) -> Spectrum:
    """Leading values by subspace iteration, effective rank by them plus stochastic Lanczos on the rest."""
    rank = min(matrix.shape)
    wanted = max(top, metrics.top_fraction_count(rank))
    with torch.random.fork_rng(devices=[matrix.device] if matrix.is_cuda else []):
        torch.manual_seed(seed)
        left, values, right = torch.svd_lowrank(matrix, q=wanted + OVERSAMPLING, niter=POWER_ITERATIONS)
        # The oversampled ones are not converged; the Lanczos part takes them again.
        left, values, right = left[:, :wanted], values[:wanted].double(), right[:, :wanted]
        rest = _rest_sums(matrix, left, right)
    known = torch.stack((values.sum(), torch.special.xlogy(values, values).sum()))
    estimate, error = _jackknife(known, rest)
    return Spectrum(
        values=values,
        left=left[:, 0].double(),
        right=right[:, :top].double(),
        rank=rank,
        frobenius=float(torch.linalg.vector_norm(matrix, dtype=torch.float64)),
        effective_rank=estimate,
        effective_rank_error=error,
        residual=_residual(matrix, left[:, :top], values[:top], right[:, :top]),
        exact=False,
    )


def _residual(matrix: torch.Tensor, left: torch.Tensor, values: torch.Tensor, right: torch.Tensor) -> float:
    left, values, right = (factor.to(matrix.dtype) for factor in (left, values, right))
    sides = (matrix @ right - left * values, matrix.T @ left - right * values)
    return float(max(side.norm(dim=0).max() for side in sides) / values[0])


def _rest_sums(matrix: torch.Tensor, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
    """[probes, 2]: unbiased estimates of Σ s and Σ s·log s over the values beside the leading ones.

    Stochastic Lanczos quadrature (Ubaru, Chen and Saad 2017): z'f(A)z for a random z of ±1 is
    ‖z‖²·Σ τ_k²·f(θ_k) over the Ritz values θ of A = B·Bᵀ, B the matrix without its leading part, from the
    side that is shorter.
    """
    tall, basis = (matrix.T, left) if matrix.shape[0] <= matrix.shape[1] else (matrix, right)

    def apply(block: torch.Tensor) -> torch.Tensor:
        image = tall.T @ (tall @ block)
        return image - basis @ (basis.T @ image)

    probes = torch.randint(0, 2, (tall.shape[1], NUM_PROBES), device=matrix.device).to(matrix.dtype) * 2 - 1
    probes -= basis @ (basis.T @ probes)
    squares = probes.square().sum(0)
    diagonal, off_diagonal = _lanczos(apply, probes / squares.sqrt())
    tridiagonal = (
        torch.diag_embed(diagonal) + torch.diag_embed(off_diagonal, 1) + torch.diag_embed(off_diagonal, -1)
    )
    ritz, vectors = torch.linalg.eigh(tridiagonal)
    values = ritz.clamp(min=0).sqrt()
    weights = vectors[:, 0, :].square() * squares.double().cpu()[:, None]
    functions = torch.stack((values, torch.special.xlogy(values, values)), dim=2)
    return (weights[:, :, None] * functions).sum(1)


def _lanczos(
    apply: Callable[[torch.Tensor], torch.Tensor], start: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """One Lanczos run per column of `start` [n, p]: diagonals [p, m] and off-diagonals [p, m − 1], float64.

    Every new vector is made orthogonal to all earlier ones, which costs m·n·p numbers of memory.
    """
    steps = min(LANCZOS_STEPS, start.shape[0])
    history = start[None]  # [steps so far, n, p]
    diagonal, off_diagonal = [], []
    for step in range(steps):
        image = apply(history[-1])
        diagonal.append((image * history[-1]).sum(0))
        for _ in range(2):  # twice is enough to be orthogonal to working precision
            image = image - (history * (history * image).sum(1, keepdim=True)).sum(0)
        if step == steps - 1:
            break
        length = image.norm(dim=0)
        off_diagonal.append(length)
        # A run that has found its whole Krylov space goes on with zeros, whose Ritz weight is zero.
        history = torch.cat((history, (image / length.clamp(min=1e-30))[None]))
    return torch.stack(diagonal, 1).double().cpu(), torch.stack(off_diagonal, 1).double().cpu()


def _jackknife(known: torch.Tensor, rest: torch.Tensor) -> tuple[float, float]:
    """Effective rank from the mean over probes, and its standard error by leaving each probe out."""
    total = rest.sum(0)
    count = len(rest)

    def estimate(sums: torch.Tensor) -> float:
        nuclear, entropy = (known.cpu() + sums).tolist()
        return metrics.effective_rank_of_sums(nuclear, entropy)

    left_out = torch.tensor([estimate((total - row) / (count - 1)) for row in rest], dtype=torch.float64)
    error = ((left_out - left_out.mean()).square().sum() * (count - 1) / count).sqrt()
    return estimate(total / count), float(error)
