"""What the theory of Lightning OPD says, in numbers, on policies small enough to enumerate."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from lopd_megatron.loss import objectives

VOCAB, LENGTH = 4, 3
DTYPE = torch.float64


def descend(
    token_loss: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    reference: torch.Tensor,
    teacher: torch.Tensor,
    start: torch.Tensor,
    steps: int = 20_000,
) -> torch.Tensor:
    """Log-probs where gradient descent on Σ_a reference(a)·token_loss(a) comes to rest."""
    logits = start.clone().requires_grad_()
    for _ in range(steps):
        student = logits.log_softmax(-1)
        (gradient,) = torch.autograd.grad((reference * token_loss(student, teacher)).sum(), logits)
        if gradient.abs().max() < 1e-13:
            break
        logits.data -= 0.5 * gradient
    assert gradient.abs().max() < 1e-12, "did not come to rest"
    return logits.detach().log_softmax(-1)


def lightning(clip: float | None) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    return lambda student, teacher: objectives.lightning_opd(student, teacher, clip).loss


def random_logprobs(seed: int, spread: float = 1.5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (spread * torch.randn(VOCAB, generator=generator, dtype=DTYPE)).log_softmax(-1)


@pytest.mark.parametrize("clip", [None, 0.1], ids=["no_clip", "clip"])
@pytest.mark.parametrize("seed", range(4))
def test_the_teacher_is_the_only_fixed_point(seed: int, clip: float | None) -> None:
    """Identity 6: with exact expectations over π_ref, wherever training starts it ends at π_θ = π_T.

    Stationary means π_ref(a)·u(a) = π_θ(a)·Σ π_ref·u with u = log π_θ − log π_T: all u have one sign, and as
    both policies sum to one, u = 0. Clipping keeps signs, so it moves nothing.
    """
    teacher, reference = random_logprobs(seed), random_logprobs(100 + seed).exp()
    for start in (reference.log(), random_logprobs(200 + seed, spread=3.0), -5 * teacher):
        end = descend(lightning(clip), reference, teacher, start)
        torch.testing.assert_close(end, teacher, rtol=0, atol=1e-9)


def test_forgetting_the_stop_gradient_moves_the_fixed_point() -> None:
    """Planted: −A·log π with A attached. Its token-wise stationary point is log π_θ = ½ log π_T."""
    teacher, reference = random_logprobs(0), random_logprobs(100).exp()
    attached = descend(lambda s, t: -(t - s) * s, reference, teacher, reference.log())
    assert (attached - teacher).abs().max() > 0.1


def test_one_frozen_sample_pins_only_the_sampled_token() -> None:
    """Identity 7: the rest of the mass keeps the proportions that it drifted to, not those of the teacher."""
    teacher, start = random_logprobs(1), random_logprobs(101)
    sampled = torch.nn.functional.one_hot(torch.tensor(2), VOCAB).to(DTYPE)
    end = descend(lightning(None), sampled, teacher, start)
    assert end[2] == pytest.approx(float(teacher[2]), abs=1e-9)
    others = [0, 1, 3]
    assert (end[others] - teacher[others]).abs().max() > 0.05


def test_replayed_tokens_are_pushed_down_at_the_start() -> None:
    """Identity 5: E_ref[A] = −KL(π_ref‖π_T) < 0 at initialisation."""
    teacher, reference = random_logprobs(2), random_logprobs(102)
    mean = (reference.exp() * (teacher - reference)).sum()
    kl = torch.nn.functional.kl_div(teacher, reference, reduction="sum", log_target=True)
    assert float(mean) == pytest.approx(-float(kl))
    assert mean < 0


class Policy:
    """A recurrent network over responses of `LENGTH` tokens, small enough to sum over all of them."""

    WIDTH = 5

    def __init__(self, seed: int, scale: float = 1.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        shapes = [(VOCAB + 1, self.WIDTH), (self.WIDTH, self.WIDTH), (self.WIDTH, VOCAB)]
        self.parameters = [
            (scale * torch.randn(shape, generator=generator, dtype=DTYPE)).requires_grad_()
            for shape in shapes
        ]

    def moved(self, by: list[torch.Tensor], step: float) -> Policy:
        """A policy whose parameters are these plus step·by."""
        other = Policy(0)
        other.parameters = [
            (p + step * d).detach().requires_grad_() for p, d in zip(self.parameters, by, strict=True)
        ]
        return other

    def logprobs(self) -> torch.Tensor:
        """[responses, LENGTH]: log π(a_t | a_<t) of every response."""
        return self.all_logprobs().gather(2, RESPONSES[:, :, None]).squeeze(2)

    def all_logprobs(self) -> torch.Tensor:
        """[responses, LENGTH, VOCAB]."""
        embedding, recurrence, head = self.parameters
        previous = torch.cat((torch.full((len(RESPONSES), 1), VOCAB), RESPONSES[:, :-1]), dim=1)
        hidden, outputs = torch.zeros(len(RESPONSES), self.WIDTH, dtype=DTYPE), []
        for t in range(LENGTH):
            hidden = torch.tanh(embedding[previous[:, t]] + hidden @ recurrence)
            outputs.append((hidden @ head).log_softmax(-1))
        return torch.stack(outputs, dim=1)


RESPONSES = torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH)


def jacobian(value: torch.Tensor, parameters: list[torch.Tensor]) -> torch.Tensor:
    """[value.numel(), number of parameters]."""
    rows = torch.eye(value.numel(), dtype=DTYPE)
    parts = torch.autograd.grad(value.flatten(), parameters, rows, is_grads_batched=True, retain_graph=True)
    return torch.cat([part.flatten(1) for part in parts], dim=1)


@dataclass
class Exact:
    """The quantities of METHOD 9, with every expectation a sum over all responses."""

    on: torch.Tensor  # ∇J_on = E_ref[w f]
    off: torch.Tensor  # ∇J_off = E_ref[f]
    covariance: torch.Tensor  # Cov_ref[w, f]
    chi: float  # √χ²(π_θ‖π_ref), of whole responses
    largest_score: float  # G = max ‖∇log π_θ(a|s)‖ over all states and tokens
    sigma: float  # σ_A


def exact(student: Policy, reference: Policy, teacher: Policy) -> Exact:
    logprobs = student.logprobs()
    scores = jacobian(logprobs, student.parameters).view(len(RESPONSES), LENGTH, -1)
    log_student = logprobs.detach()
    log_reference, log_teacher = reference.logprobs().detach(), teacher.logprobs().detach()
    weight = (log_student - log_reference).sum(1).exp()
    probability = log_reference.sum(1).exp()
    advantages = log_teacher - log_student
    f = (advantages[:, :, None] * scores).sum(1)
    on, off = (probability * weight) @ f, probability @ f
    centred = f - off
    largest = jacobian(student.all_logprobs(), student.parameters).norm(dim=1).max()
    return Exact(
        on=on,
        off=off,
        covariance=(probability * (weight - 1)) @ centred,
        chi=float((probability @ weight.square() - 1).clamp(min=0).sqrt()),
        largest_score=float(largest),
        sigma=float((probability @ advantages.abs().sum(1).square()).sqrt()),
    )


def directions(seed: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=generator, dtype=DTYPE) for p in Policy(0).parameters]


@pytest.mark.parametrize("seed", range(3))
def test_gradient_gap_stays_below_its_bound(seed: int) -> None:
    """Theorem 3.5: ‖∇J_on − ∇J_off‖ ≤ G·σ_A·√χ², and 3.7: ∇J_off = ∇J_on − Cov_ref[w, f], exactly."""
    reference, teacher = Policy(seed), Policy(50 + seed)
    for step in (0.001, 0.1, 0.5):
        found = exact(reference.moved(directions(seed), step), reference, teacher)
        gap = float((found.on - found.off).norm())
        bound = found.largest_score * found.sigma * found.chi
        assert 0 < gap <= bound
        assert gap > bound / 200, "the bound says nothing here"
        if step == 0.001:  # planted: χ² in place of its root is too small near the start
            assert gap > bound * found.chi
        torch.testing.assert_close(found.off, found.on - found.covariance, rtol=0, atol=1e-12)


def test_gap_is_zero_at_the_start_and_grows_with_the_distance() -> None:
    """Corollary A.2: O(η·k) after k steps; ten times the way is ten times the gap while the way is short."""
    reference, teacher = Policy(7), Policy(57)
    at_start = exact(reference, reference, teacher)
    # χ² is a difference of numbers near 1, so √χ² is exact to about √1e-16.
    assert float((at_start.on - at_start.off).norm()) < 1e-12
    assert at_start.chi < 1e-7
    gaps = []
    for step in (1e-5, 1e-4):
        found = exact(reference.moved(directions(7), step), reference, teacher)
        gaps.append(float((found.on - found.off).norm()))
    assert gaps[1] / gaps[0] == pytest.approx(10, rel=0.02)


def test_both_gradients_vanish_at_the_teacher() -> None:
    """Theorem 3.6, for a teacher that the student can represent."""
    reference, teacher = Policy(8), Policy(58)
    found = exact(teacher, reference, teacher)
    assert float(found.on.norm()) < 1e-12
    assert float(found.off.norm()) < 1e-12


@pytest.mark.parametrize("seed", range(3))
def test_mismatched_teachers_bias_the_gradient_from_the_start(seed: int) -> None:
    """Theorems 3.8 and 3.9: a bias ≤ G·σ_Δ at initialisation, where χ² is 0; the gap itself stays 0 there."""
    reference, sft_teacher, opd_teacher = Policy(seed), Policy(60 + seed), Policy(70 + seed)
    mismatched, consistent = (exact(reference, reference, t) for t in (opd_teacher, sft_teacher))
    probability = reference.logprobs().detach().sum(1).exp()
    delta = (sft_teacher.logprobs() - opd_teacher.logprobs()).detach().abs().sum(1)
    sigma_delta = float((probability @ delta.square()).sqrt())
    bias = float((mismatched.off - consistent.off).norm())
    assert 0 < bias <= mismatched.largest_score * sigma_delta
    # v1 of the paper bounded the *gap* by G·(σ_A·√χ² + σ_Δ), which does not vanish here; v2 corrected it.
    assert float((mismatched.on - mismatched.off).norm()) < 1e-12

    moved = exact(reference.moved(directions(seed), 0.1), reference, opd_teacher)
    gap = float((moved.on - moved.off).norm())
    consistent_sigma = exact(reference.moved(directions(seed), 0.1), reference, sft_teacher).sigma
    assert gap <= moved.largest_score * (consistent_sigma + sigma_delta) * moved.chi
