"""The fused head on one rank against the dense float64 reference: gradients, extreme logits, contracts.

Tolerances: hidden states and weights are multiples of 1/32 small enough for the float32 logits to be exact,
so what is left is the rounding of exponentials, sums and the two gradient products: below 5e-7 of the norm.
"""

from dataclasses import replace

import pytest
import torch

from lopd_megatron.config import LossConfig
from lopd_megatron.loss import Loss, NonFiniteLoss
from lopd_megatron.loss.fused_head import HeadRows, _Pass, _Settings, fused_head
from lopd_megatron.loss.objectives import TokenLoss
from lopd_megatron.parallel.vocab import VocabRange
from lopd_megatron.records import LossOutput, MicroBatch
from tests.unit.loss.dense import all_masked, dense_loss, random_batch

TOLERANCE = 1e-6
OBJECTIVES = [
    "sft",
    "lightning_opd",
    "opd_importance",
    "topk_forward_kl",
    "topk_reverse_kl",
    "topk_jsd",
]
V, PADDED, H, K = 101, 120, 24, 3


def configured(**changes: object) -> LossConfig:
    return LossConfig.model_validate(changes)


def exact(shape: tuple[int, ...], scale: float, seed: int) -> torch.Tensor:
    """Random multiples of 1/32: their products and sums are exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale * 32).round() / 32


def relative(value: torch.Tensor, reference: torch.Tensor) -> float:
    return float((value.double() - reference).norm() / reference.norm())


def run(
    config: LossConfig, batch: MicroBatch, *, scales: tuple[float, ...] = (1.0,), seed: int = 1
) -> tuple[LossOutput, torch.Tensor, torch.Tensor]:
    """Loss, hidden states [t, 1, h] and padded weight, after a backward with upstream 1."""
    assert batch.labels is not None
    t = batch.labels.size(1)
    hidden = exact((t, 1, H), 1.0, seed)
    hidden *= torch.tensor(scales).repeat(t)[:t, None, None]
    hidden.requires_grad_()
    weight = exact((PADDED, H), 1.0, seed + 1).requires_grad_()
    output = Loss(config, vocab=VocabRange.of(V, PADDED, None), sequence_parallel=False)(
        hidden, weight, batch
    )
    output.numerator.backward()
    return output, hidden, weight


def check(config: LossConfig, batch: MicroBatch, scales: tuple[float, ...] = (1.0,)) -> None:
    output, hidden, weight = run(config, batch, scales=scales)
    x = hidden.detach().double()[:, 0].requires_grad_()
    w = weight.detach().double()[:V].requires_grad_()
    numerator, logprobs, entropy = dense_loss(config, x, w, batch)
    numerator.backward()
    assert x.grad is not None
    assert w.grad is not None
    assert hidden.grad is not None
    assert weight.grad is not None
    assert output.numerator.item() == pytest.approx(numerator.item(), rel=1e-6)
    assert relative(hidden.grad[:, 0], x.grad) < TOLERANCE
    assert relative(weight.grad[:V], w.grad) < TOLERANCE
    assert (weight.grad[V:] == 0).all()
    total, count = output.metric_sums["student_logprobs"].tolist()
    assert count == logprobs.numel()
    assert total == pytest.approx(logprobs.sum().item(), rel=1e-6)
    assert output.metric_sums["entropy"][0].item() == pytest.approx(entropy.sum().item(), rel=1e-5)


@pytest.mark.parametrize("normalization", ["token_mean", "per_sequence"])
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("chunk", [7, 4096])
def test_loss_and_gradients_equal_the_dense_reference(objective: str, normalization: str, chunk: int) -> None:
    config = configured(
        objective=objective, normalization=normalization, topk=K, head_chunk_tokens=chunk, advantage_clip=2.0
    )
    check(config, random_batch([11, 20, 5], vocab_size=V, topk=K))


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_extreme_logits(objective: str) -> None:
    """Rows with logits of ±5, ±50 and ±2000, where most probabilities are exactly 0 in float32."""
    batch = random_batch([19, 12], vocab_size=V, topk=K)
    check(configured(objective=objective, topk=K), batch, scales=(1.0, 10.0, 400.0))


@pytest.mark.parametrize("objective", ["topk_forward_kl", "topk_reverse_kl", "topk_jsd"])
def test_a_teacher_with_a_tail_of_1e_7(objective: str) -> None:
    batch = random_batch([19, 12], vocab_size=V, topk=K)
    assert batch.teacher_topk_logprobs is not None
    assert batch.teacher_logprobs is not None
    assert batch.labels is not None
    assert batch.teacher_topk_ids is not None
    sharp = torch.tensor([1 - 3.1e-7, 1e-7, 1e-7], dtype=torch.float64).log().float()
    batch.teacher_topk_logprobs[:] = sharp
    match = batch.teacher_topk_ids == batch.labels[..., None]
    assert match.any()
    batch.teacher_logprobs[:] = torch.where(match, sharp, -torch.inf).amax(-1).clamp(min=-18.0)
    check(configured(objective=objective, topk=K), batch)


def test_a_label_with_probability_almost_one_keeps_its_gradient() -> None:
    """1 − p = 4e-18 is below the float64 resolution of p; log p and the gradient still hold it."""
    hidden = torch.tensor([[40.0]], requires_grad=True)
    weight = torch.tensor([[1.0], [0.0]])
    weights = torch.ones(1, 1)

    def objective(student: torch.Tensor, part: slice) -> TokenLoss:
        return TokenLoss(student[:, 0], torch.cat([weights, torch.zeros(1, 1)], 1))

    rows = HeadRows(torch.tensor([0]), torch.tensor([[0]]), torch.ones(1), objective)
    numerator, _ = fused_head(
        hidden, weight, rows, vocab=VocabRange.of(2, 2, None), sequence_parallel=False, chunk_tokens=1
    )
    numerator.backward()
    rest = torch.tensor(-40.0, dtype=torch.float64).exp().item()
    assert hidden.grad is not None
    assert hidden.grad.item() == pytest.approx(rest, rel=1e-6)


def test_zero_filled_padding_would_be_seen() -> None:
    """Planted: padding rows that take part as zero logits, as they do without a mask."""
    config, batch = LossConfig(objective="sft"), random_batch([20, 20], vocab_size=V)
    _, hidden, weight = run(config, batch, scales=(0.25,))
    x, w = hidden.detach().requires_grad_(), weight.detach().clone()
    w[V:] = 0
    unmasked = Loss(config, vocab=VocabRange.of(PADDED, PADDED, None), sequence_parallel=False)
    unmasked(x, w, batch).numerator.backward()
    assert x.grad is not None
    assert hidden.grad is not None
    assert relative(x.grad, hidden.grad.double()) > 1000 * TOLERANCE


def test_student_equal_to_teacher_gives_no_gradient() -> None:
    """Scores of the student itself: what remains is float32 rounding of the log-probs."""
    batch = random_batch([30, 12], vocab_size=V, topk=K)
    hidden, weight = exact((42, 1, H), 1.0, 1), exact((PADDED, H), 1.0, 2)
    logprobs = (hidden[:, 0] @ weight[:V].T).log_softmax(-1)
    assert batch.labels is not None
    top = logprobs.topk(K)
    own = replace(
        batch,
        teacher_logprobs=logprobs.gather(1, batch.labels.T).T,
        teacher_topk_ids=top.indices[None],
        teacher_topk_logprobs=top.values[None],
    )
    for objective in ("lightning_opd", "topk_forward_kl", "topk_reverse_kl", "topk_jsd"):
        config = configured(objective=objective, topk=K)
        _, _, other = run(config, batch)
        _, _, same = run(config, own)
        assert same.grad is not None
        assert other.grad is not None
        assert same.grad.norm() < 1e-5 * other.grad.norm(), objective


@pytest.mark.parametrize("objective", ["lightning_opd", "topk_reverse_kl"])
@pytest.mark.parametrize("normalization", ["token_mean", "per_sequence"])
def test_an_all_masked_micro_batch_counts_nothing(objective: str, normalization: str) -> None:
    config = configured(objective=objective, topk=K, normalization=normalization)
    output, hidden, weight = run(config, all_masked(random_batch([9, 6], vocab_size=V, topk=K)))
    assert output.numerator.item() == 0
    assert output.denominator.item() == 0
    assert output.denominator.dtype == torch.int32
    assert hidden.grad is not None
    assert weight.grad is not None
    assert (hidden.grad == 0).all()
    assert (weight.grad == 0).all()
    assert all((pair == 0).all() for pair in output.metric_sums.values())


def test_the_report_has_the_same_keys_with_and_without_trained_tokens() -> None:
    config, batch = LossConfig(), random_batch([9, 6], vocab_size=V)
    assert list(run(config, batch)[0].metric_sums) == list(run(config, all_masked(batch))[0].metric_sums)


def test_per_sequence_counts_documents_with_trained_tokens() -> None:
    batch = random_batch([9, 6, 8], vocab_size=V)
    assert batch.loss_mask is not None
    batch.loss_mask[0, 15:] = 0  # a padding document
    batch.response_lengths[2] = 0
    output, _, _ = run(LossConfig(normalization="per_sequence"), batch)
    assert output.denominator.item() == 2


def test_the_upstream_scale_multiplies_both_gradients() -> None:
    batch = random_batch([20, 11], vocab_size=V)
    _, hidden, weight = run(LossConfig(), batch)
    loss = Loss(LossConfig(), vocab=VocabRange.of(V, PADDED, None), sequence_parallel=False)
    x, w = hidden.detach().requires_grad_(), weight.detach().requires_grad_()
    (loss(x, w, batch).numerator * 0.25).backward()
    assert torch.equal(x.grad, 0.25 * hidden.grad)
    assert torch.equal(w.grad, 0.25 * weight.grad)


def test_main_grad_takes_the_float32_gradient_of_a_bfloat16_weight() -> None:
    """Two micro-batches add up in main_grad without a rounding to bfloat16; autograd sees a placeholder."""
    batch = random_batch([20, 11], vocab_size=V)
    loss = Loss(LossConfig(), vocab=VocabRange.of(V, PADDED, None), sequence_parallel=False)
    hidden = exact((31, 1, H), 1.0, 1).bfloat16().requires_grad_()
    weight = torch.nn.Parameter(exact((PADDED, H), 1.0, 2).bfloat16())
    loss(hidden, weight, batch).numerator.backward()
    rounded = weight.grad
    weight.main_grad = torch.zeros(PADDED, H)
    weight.grad_added_to_main_grad = False
    weight.grad = None
    for _ in range(2):
        loss(hidden, weight, batch).numerator.backward()
    assert weight.grad_added_to_main_grad
    assert weight.grad.shape == weight.shape
    assert torch.equal((0.5 * weight.main_grad).bfloat16(), rounded)
    assert not torch.equal(0.5 * weight.main_grad, rounded.float())


def test_tied_embedding_gets_both_gradients() -> None:
    """`zero_out_wgrad`: the hook adds .grad to main_grad, so it must hold the lookup's gradient alone."""
    batch = random_batch([20, 11], vocab_size=V)
    loss = Loss(LossConfig(), vocab=VocabRange.of(V, PADDED, None), sequence_parallel=False)
    weight = torch.nn.Parameter(exact((PADDED, H), 1.0, 2))
    tokens = torch.arange(31) % V

    def step() -> None:
        loss(torch.nn.functional.embedding(tokens, weight)[:, None], weight, batch).numerator.backward()

    step()
    expected, weight.grad = weight.grad, None
    weight.main_grad = torch.zeros(PADDED, H)
    weight.grad_added_to_main_grad, weight.zero_out_wgrad = False, True
    step()
    torch.testing.assert_close(weight.main_grad + weight.grad, expected)


def test_bfloat16_inputs_stay_close_to_float32() -> None:
    """bfloat16 keeps 8 bits: gradients within 1 % of the norm."""
    batch = random_batch([40, 23], vocab_size=V)
    loss = Loss(LossConfig(), vocab=VocabRange.of(V, PADDED, None), sequence_parallel=False)
    x, w = exact((63, 1, H), 0.5, 1).bfloat16(), exact((PADDED, H), 0.5, 2).bfloat16()
    results = []
    for dtype in (torch.float32, torch.bfloat16):
        hidden, weight = x.to(dtype).requires_grad_(), w.to(dtype).requires_grad_()
        output = loss(hidden, weight, batch)
        output.numerator.backward()
        results.append((output, hidden.grad, weight.grad))
    (full, *full_gradients), (half, *half_gradients) = results
    assert half.numerator.item() == pytest.approx(full.numerator.item(), rel=1e-2)
    for a, b in zip(half_gradients, full_gradients, strict=True):
        assert relative(a, b.double()) < 1e-2


@pytest.mark.parametrize("chunk", [64, 100, 1024, 2048, 4096])
@pytest.mark.parametrize("count", [50, 5000, 16_384])
def test_float32_logits_take_no_more_memory_than_the_chunk(chunk: int, count: int) -> None:
    """float32 logits of a block and the bfloat16 gradient of a chunk: at most chunk rows of bfloat16."""
    rows = torch.zeros(count, dtype=torch.int64)
    head_rows = HeadRows(rows, rows[:, None], rows.double(), lambda student, part: None)  # type: ignore[arg-type,return-value]
    vocab = VocabRange.of(2, 2, None)
    hidden, weight = torch.zeros(1, 1).bfloat16(), torch.zeros(2, 1).bfloat16()
    work = _Pass(hidden, weight, _Settings(head_rows, vocab, False, chunk, True))
    taken = sum(buffer.numel() * buffer.element_size() for buffer in (work._logits, work._gradient))
    assert taken <= 2 * vocab.shard_size * chunk * 1.01  # rows are whole


def test_no_gradient_is_formed_without_grad_mode() -> None:
    batch = random_batch([20, 11], vocab_size=V)
    loss = Loss(LossConfig(), vocab=VocabRange.of(V, PADDED, None), sequence_parallel=False)
    hidden, weight = exact((31, 1, H), 1.0, 1).requires_grad_(), exact((PADDED, H), 1.0, 2).requires_grad_()
    with torch.no_grad():
        quiet = loss(hidden, weight, batch).numerator
    assert not quiet.requires_grad
    assert quiet.item() == loss(hidden, weight, batch).numerator.item()


def test_a_frozen_head_still_passes_the_gradient_on() -> None:
    batch = random_batch([20, 11], vocab_size=V)
    _, hidden, weight = run(LossConfig(), batch)
    loss = Loss(LossConfig(), vocab=VocabRange.of(V, PADDED, None), sequence_parallel=False)
    x = hidden.detach().requires_grad_()
    loss(x, weight.detach(), batch).numerator.backward()
    assert torch.equal(x.grad, hidden.grad)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_non_finite_token_is_named(value: float) -> None:
    batch = random_batch([20, 11], vocab_size=V)
    loss = Loss(LossConfig(), vocab=VocabRange.of(V, PADDED, None), sequence_parallel=False)
    hidden, weight = exact((31, 1, H), 1.0, 1), exact((PADDED, H), 1.0, 2)
    loss.finite.raise_if_any(loss(hidden, weight, batch).metric_sums)
    hidden[25] = value  # document 101 starts at row 20; row 25 is about its token 6
    sums = loss(hidden, weight, batch).metric_sums
    with pytest.raises(NonFiniteLoss, match=r"document 101, token 6 is not finite \(1 such"):
        loss.finite.raise_if_any(sums)
    loss(hidden, weight, batch)
    with pytest.raises(NonFiniteLoss, match=r"of document #101, token 6"):
        loss.finite.raise_if_any(sums, "#{}".format)
    with pytest.raises(NonFiniteLoss, match="another rank"):
        loss.finite.raise_if_any(sums)  # the step is forgotten; only the pooled count speaks


def test_huber_gradient_reaches_the_hidden_states() -> None:
    """Lightning OPD through the head = autograd of the Huber function of the log-ratio."""
    batch = random_batch([25, 14], vocab_size=V)
    config = LossConfig(advantage_clip=1.0)
    _, hidden, weight = run(config, batch)
    x = hidden.detach().double()[:, 0].requires_grad_()
    logprobs = (x @ weight.detach().double()[:V].T).log_softmax(-1)
    assert batch.labels is not None
    assert batch.teacher_logprobs is not None
    assert batch.loss_mask is not None
    student = logprobs.gather(1, batch.labels.T)[:, 0]
    huber = torch.nn.functional.huber_loss(
        student, batch.teacher_logprobs[0].double(), reduction="none", delta=1.0
    )
    (huber * batch.loss_mask[0]).sum().backward(retain_graph=True)
    assert hidden.grad is not None
    assert x.grad is not None
    assert relative(hidden.grad[:, 0], x.grad) < TOLERANCE
    # Planted: the advantage left in the graph.
    attached = -(batch.teacher_logprobs[0].double() - student).clamp(-1, 1) * student
    (wrong,) = torch.autograd.grad((attached * batch.loss_mask[0]).sum(), x)
    assert relative(wrong, x.grad) > 0.01
