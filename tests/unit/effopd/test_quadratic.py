"""EffOPD on a quadratic equals a NumPy reference with the cumulative arithmetic of the released code."""

import numpy as np
import pytest
import torch

from lopd_megatron.config import EffOPDConfig
from lopd_megatron.effopd.extrapolation import Extrapolation
from lopd_megatron.effopd.search import HeldOutScore
from lopd_megatron.effopd.weights import ParameterShard, WeightLine

DIMENSION, STEPS, LR = 30, 40, 0.02


def problem() -> tuple[np.ndarray, np.ndarray]:
    """L = ½ d'Ad − b'd with eigenvalues over two decades: slow directions for extrapolation to win on."""
    generator = np.random.default_rng(0)
    basis, _ = np.linalg.qr(generator.normal(size=(DIMENSION, DIMENSION)))
    return basis @ np.diag(np.logspace(-1.5, 0.5, DIMENSION)) @ basis.T, generator.normal(size=DIMENSION)


def loss(weights: np.ndarray, matrix: np.ndarray, vector: np.ndarray) -> float:
    return float(0.5 * weights @ matrix @ weights - vector @ weights)


def reference(max_k: int, strict: bool, first: int) -> tuple[np.ndarray, list[int]]:
    """W ← W + f·(W − base) with f = 2, 2/3, 2/5, …, base ← the accepted weights: METHOD 11.2."""
    matrix, vector = problem()
    weights, base, taken = np.zeros(DIMENSION), np.zeros(DIMENSION), []
    for step in range(1, STEPS + 1):
        weights = weights - LR * (matrix @ weights - vector)
        if step < first or bin(step).count("1") != 1:
            continue
        best, best_loss, factor, multiplier = weights.copy(), loss(weights, matrix, vector), 2.0, 0
        candidate = weights.copy()
        for k in range(1, max_k + 1):
            candidate = candidate + factor * (candidate - base)
            factor /= 1 + factor
            value = loss(candidate, matrix, vector)
            if not (value < best_loss or (value == best_loss and not strict)):
                break
            best, best_loss, multiplier = candidate.copy(), value, 2 * k
        weights, base = best, best.copy()
        taken.append(multiplier)
    return weights, taken


class Run:
    """Gradient descent in torch with the real search; the parameter is cut in two shards."""

    def __init__(self, config: EffOPDConfig) -> None:
        self.matrix, self.vector = problem()
        self.parameter = torch.nn.Parameter(torch.zeros(DIMENSION, dtype=torch.float64))
        flat = self.parameter.detach()
        cuts = (slice(0, 13), slice(13, None))
        shards = [ParameterShard("0.w", flat[cut], self.parameter, cut.start) for cut in cuts]
        self.resets = 0
        self.effopd = Extrapolation(
            config,
            WeightLine(shards),
            score=lambda: HeldOutScore(-self.loss(), 0.0, 1),
            publish=lambda: None,
            reset_moments=self._count_reset,
        )
        self.optimizer = torch.optim.SGD([self.parameter], lr=LR)

    def _count_reset(self) -> None:
        self.resets += 1

    def loss(self) -> float:
        return loss(self.parameter.detach().numpy(), self.matrix, self.vector)

    def train(self, first: int, last: int, search: bool = True) -> None:
        matrix, vector = torch.from_numpy(self.matrix), torch.from_numpy(self.vector)
        for step in range(first, last + 1):
            self.optimizer.zero_grad()
            (0.5 * self.parameter @ matrix @ self.parameter - vector @ self.parameter).backward()
            self.optimizer.step()
            before = self.loss()
            if search:
                self.effopd.after_iteration(step)
                assert self.loss() <= before  # never worse than going on without it, at every trigger


@pytest.mark.parametrize("acceptance", ["at_least", "strict"])
@pytest.mark.parametrize(("max_k", "first"), [(5, 1), (2, 1), (5, 4)])
def test_equals_the_numpy_reference(acceptance: str, max_k: int, first: int) -> None:
    expected, multipliers = reference(max_k, acceptance == "strict", first)
    run = Run(EffOPDConfig(max_k=max_k, acceptance=acceptance, first_trigger=first))
    run.train(1, STEPS)
    assert [entry["multiplier"] for entry in run.effopd.history] == multipliers
    assert max(multipliers) == 2 * max_k
    # float64; the reference accumulates one rounding more for each factor
    np.testing.assert_allclose(run.parameter.detach().numpy(), expected, rtol=1e-12, atol=1e-12)


def test_a_delta_from_the_initial_weights_is_another_algorithm() -> None:
    """Planted: the trap of a resume that takes the initial weights for the accepted ones."""
    expected, _ = reference(5, False, 1)
    run = Run(EffOPDConfig())
    run.train(1, 8)
    for accepted in run.effopd.line.accepted:
        accepted.zero_()
    run.train(9, STEPS)
    assert np.abs(run.parameter.detach().numpy() - expected).max() > 1e-3


def test_ends_better_than_plain_descent_here() -> None:
    plain, extrapolated = Run(EffOPDConfig()), Run(EffOPDConfig())
    plain.train(1, STEPS, search=False)
    extrapolated.train(1, STEPS)
    assert extrapolated.loss() < plain.loss() - 0.1 * abs(plain.loss())


def test_resume_is_exact() -> None:
    """Weights, accepted weights and history from the state of a run stopped between two triggers."""
    whole = Run(EffOPDConfig())
    whole.train(1, STEPS)
    first, second = Run(EffOPDConfig()), Run(EffOPDConfig())
    first.train(1, 11)
    second.parameter.data.copy_(first.parameter.data)
    for mine, saved in zip(second.effopd.line.accepted, first.effopd.line.accepted, strict=True):
        mine.copy_(saved)
    second.effopd.history = list(first.effopd.history)
    second.train(12, STEPS)
    assert torch.equal(second.parameter, whole.parameter)
    strip = [{k: v for k, v in entry.items() if k != "seconds"} for entry in whole.effopd.history]
    assert [{k: v for k, v in entry.items() if k != "seconds"} for entry in second.effopd.history] == strip


def test_moments_are_reset_only_when_asked_and_only_after_a_jump() -> None:
    keep, reset = Run(EffOPDConfig()), Run(EffOPDConfig(reset_moments=True))
    keep.train(1, STEPS)
    reset.train(1, STEPS)
    jumps = sum(entry["multiplier"] > 0 for entry in reset.effopd.history)
    assert keep.resets == 0
    assert reset.resets == jumps > 0
