"""Each analytic gradient weight against autograd, and the identities of the method."""

import math

import pytest
import torch

from lopd_megatron.loss import objectives
from lopd_megatron.loss.classes import ABSENT, TAIL_FLOOR, class_ids, teacher_class_logprobs
from lopd_megatron.loss.objectives import TokenLoss

N = 400


def logprobs(seed: int, scale: float = 2.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return -(scale * torch.randn(N, generator=generator, dtype=torch.float64)).abs()


def distributions(seed: int, classes: int = 5) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(N, classes, generator=generator, dtype=torch.float64).mul(2).log_softmax(-1)


def test_sft_weight_is_the_derivative() -> None:
    student = logprobs(0).requires_grad_()
    (-student).sum().backward()
    assert torch.equal(objectives.sft(student.detach()).weights, student.grad)


@pytest.mark.parametrize("clip", [None, 10.0, 0.5])
def test_lightning_opd_is_the_huber_function_of_the_log_ratio(clip: float | None) -> None:
    student, teacher = logprobs(0).requires_grad_(), logprobs(1)
    threshold = 1e9 if clip is None else clip
    torch.nn.functional.huber_loss(student, teacher, reduction="sum", delta=threshold).backward()
    result = objectives.lightning_opd(student.detach(), teacher, clip)
    torch.testing.assert_close(result.weights, student.grad)
    if clip == 0.5:
        assert ((student - teacher).abs() > clip).float().mean() > 0.5  # the clip really acts here


def test_a_forgotten_stop_gradient_is_another_gradient() -> None:
    """With A left in the graph of −A·log π, or with −A alone as the loss, the gradient is a wrong one."""
    student, teacher = logprobs(0).requires_grad_(), logprobs(1)
    right = objectives.lightning_opd(student.detach(), teacher, None).weights
    attached = torch.autograd.grad((-(teacher - student) * student).sum(), student)[0]
    alone = torch.autograd.grad((-(teacher - student)).sum(), student)[0]
    # METHOD: the attached form is stationary at ½ log π_T, the lone one pushes every token down.
    half = (0.5 * teacher).requires_grad_()
    assert torch.autograd.grad((-(teacher - half) * half).sum(), half)[0].abs().max() < 1e-12
    assert (alone == 1).all()
    for wrong in (attached, alone):
        assert (wrong - right).norm() > 0.5 * right.norm()


def test_lightning_opd_carries_no_graph_through_the_advantage() -> None:
    """The package's own function, differentiated by autograd, gives its own weights."""
    student, teacher = logprobs(0).requires_grad_(), logprobs(1)
    result = objectives.lightning_opd(student, teacher, 0.7)
    result.loss.sum().backward()
    torch.testing.assert_close(student.grad, result.weights)


@pytest.mark.parametrize("seed", range(3))
def test_opd_importance_weight_is_the_derivative_of_the_ppo_form(seed: int) -> None:
    student, teacher, rollout = logprobs(seed).requires_grad_(), logprobs(seed + 10), logprobs(seed + 20)
    ratio = (student - rollout).exp()
    factor = (3.0 / ratio.detach()).clamp(max=1.0)
    advantages = (teacher - student.detach()).clamp(-1, 1)
    loss = -torch.minimum(factor * ratio * advantages, (factor * ratio).clamp(0.8, 1.2) * advantages)
    loss.sum().backward()
    result = objectives.opd_importance(
        student.detach(), teacher, rollout, advantage_clip=1.0, importance_clip=3.0, ppo_clip=0.2
    )
    torch.testing.assert_close(result.loss, loss.detach())
    torch.testing.assert_close(result.weights, student.grad)
    assert (factor < 1).any()  # truncated ratios, in both directions of the advantage
    assert ((result.weights == 0) & (advantages > 0)).any()
    assert ((result.weights == 0) & (advantages < 0)).any()


def test_opd_importance_on_fresh_rollouts_is_lightning_opd() -> None:
    student, teacher = logprobs(0), logprobs(1)
    settings = {"advantage_clip": 10.0, "importance_clip": 5.0, "ppo_clip": 0.2}
    fresh = objectives.opd_importance(student, teacher, student, **settings)
    torch.testing.assert_close(fresh.weights, objectives.lightning_opd(student, teacher, 10.0).weights)


def through_logits(result: TokenLoss, logits: torch.Tensor) -> torch.Tensor:
    """Gradient of the logits from weights on log-probs: the head's job, done by autograd."""
    return torch.autograd.grad((result.weights.detach() * logits.log_softmax(-1)).sum(), logits)[0]


@pytest.mark.parametrize("name", ["forward", "reverse", "jsd"])
def test_topk_weights_are_the_derivative(name: str) -> None:
    """Through the softmax: weights may differ from ∂ℓ/∂log p by a multiple of p, which moves no logit."""
    logits, teacher = distributions(0).requires_grad_(), distributions(1)
    p, q = logits.log_softmax(-1), teacher
    if name == "forward":
        result = objectives.topk_forward_kl(p.detach(), q)
        loss = (q.exp() * (q - p)).sum(-1)
    elif name == "reverse":
        result = objectives.topk_reverse_kl(p.detach(), q)
        loss = (p.exp() * (p - q)).sum(-1)
    else:
        result = objectives.topk_jsd(p.detach(), q, beta=0.3)
        m = (0.3 * q.exp() + 0.7 * p.exp()).log()
        loss = (0.3 * q.exp() * (q - m) + 0.7 * p.exp() * (p - m)).sum(-1)
    expected = torch.autograd.grad(loss.sum(), logits, retain_graph=True)[0]
    torch.testing.assert_close(result.loss, loss.detach())
    torch.testing.assert_close(through_logits(result, logits), expected)


@pytest.mark.parametrize(
    "objective",
    [
        objectives.topk_forward_kl,
        objectives.topk_reverse_kl,
        lambda p, q: objectives.topk_jsd(p, q, beta=0.5),
        lambda p, q: objectives.topk_jsd(p, q, beta=0.1),
    ],
)
def test_student_equal_to_teacher_has_no_loss_and_no_gradient(objective: object) -> None:
    logits = distributions(0).requires_grad_()
    result = objective(logits.detach(), logits.detach())  # type: ignore[operator]
    assert result.loss.abs().max() < 1e-14
    assert through_logits(result, logits).abs().max() < 1e-14


def test_disjoint_one_hot_distributions_pin_each_factor() -> None:
    """p and q apart: JSD is −β log β − (1 − β) log(1 − β), and log 2 at β = ½."""
    p = torch.tensor([[0.0, -torch.inf]], dtype=torch.float64)
    q = p.flip(1)
    assert objectives.topk_jsd(p, q, beta=0.5).loss.item() == pytest.approx(math.log(2))
    beta = 0.2
    expected = -beta * math.log(beta) - (1 - beta) * math.log(1 - beta)
    assert objectives.topk_jsd(p, q, beta=beta).loss.item() == pytest.approx(expected)


def test_an_absent_class_changes_nothing() -> None:
    p, q = distributions(0), distributions(1)
    absent = torch.full((N, 1), -torch.inf, dtype=torch.float64)
    for objective in (
        objectives.topk_forward_kl,
        objectives.topk_reverse_kl,
        lambda p, q: objectives.topk_jsd(p, q, 0.5),
    ):
        small, large = objective(p, q), objective(torch.cat([p, absent], 1), torch.cat([q, absent], 1))
        torch.testing.assert_close(large.loss, small.loss)
        torch.testing.assert_close(large.weights[:, :-1], small.weights)
        assert (large.weights[:, -1] == 0).all()


def test_class_ids_name_the_label_once() -> None:
    ids = class_ids(torch.tensor([7, 3]), torch.tensor([[5, 7], [1, 2]]))
    assert ids.tolist() == [[7, 5, ABSENT], [3, 1, 2]]


def test_a_teacher_tail_of_1e_7_keeps_its_mass() -> None:
    ids = torch.tensor([[7, ABSENT]])
    label = torch.tensor([math.log1p(-1e-7)], dtype=torch.float64)
    classes = teacher_class_logprobs(ids, label, torch.tensor([[-1.0]]))
    assert classes[0, 1] == -torch.inf
    assert classes[0, 2].exp().item() == pytest.approx(1e-7, rel=1e-8)


def test_a_rounded_teacher_above_one_keeps_the_floor() -> None:
    ids = torch.tensor([[7, 5]])
    classes = teacher_class_logprobs(
        ids, torch.tensor([math.log(0.5)]), torch.tensor([[math.log(0.5) + 2.4e-4]])
    )
    assert classes[0, 2].exp().item() == pytest.approx(TAIL_FLOOR)
    assert classes.isfinite().all()
