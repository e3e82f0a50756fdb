"""Any shape, any ids, any size of logits: the head equals the dense reference, and ids only name classes."""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lopd_megatron.config import LossConfig
from lopd_megatron.loss import Loss
from lopd_megatron.parallel.vocab import VocabRange
from tests.unit.loss.dense import dense_loss, random_batch


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    objective=st.sampled_from(
        ["sft", "lightning_opd", "opd_importance", "topk_forward_kl", "topk_reverse_kl", "topk_jsd"]
    ),
    normalization=st.sampled_from(["token_mean", "per_sequence"]),
    documents=st.lists(st.integers(1, 12), min_size=1, max_size=4),
    vocab_size=st.integers(6, 70),  # more than the named ids: the rest is never empty
    padding=st.integers(0, 9),
    topk=st.integers(1, 4),
    chunk=st.integers(1, 20),
    scale=st.sampled_from([0.125, 1.0, 30.0]),
    seed=st.integers(0, 1000),
)
def test_head_equals_the_dense_reference(
    objective: str,
    normalization: str,
    documents: list[int],
    vocab_size: int,
    padding: int,
    topk: int,
    chunk: int,
    scale: float,
    seed: int,
) -> None:
    """Inputs are multiples of 1/32, so the float32 logits are exact; below 1e-12 float64 is no reference."""
    batch = random_batch(documents, vocab_size=vocab_size, topk=topk, seed=seed)
    config = LossConfig.model_validate(
        {"objective": objective, "normalization": normalization, "topk": topk, "head_chunk_tokens": chunk}
    )
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(sum(documents), 9, generator=generator) * 32).round() / 32 * scale
    w = (torch.randn(vocab_size + padding, 9, generator=generator) * 32).round() / 32
    hidden, weight = x.clone()[:, None].requires_grad_(), w.clone().requires_grad_()
    vocab = VocabRange.of(vocab_size, vocab_size + padding, None)
    output = Loss(config, vocab=vocab, sequence_parallel=False)(hidden, weight, batch)
    output.numerator.backward()
    dense_x, dense_w = x.double().requires_grad_(), w[:vocab_size].double().requires_grad_()
    numerator, logprobs, _ = dense_loss(config, dense_x, dense_w, batch)
    numerator.backward()
    assert hidden.grad is not None
    assert weight.grad is not None
    assert abs(output.numerator.item() - numerator.item()) <= 1e-6 * max(1.0, abs(numerator.item()))
    assert abs(float(output.metric_sums["student_logprobs"][0] - logprobs.sum())) <= 1e-6 * max(
        1.0, float(logprobs.abs().sum())
    )
    for gradient, reference in ((hidden.grad[:, 0], dense_x.grad), (weight.grad[:vocab_size], dense_w.grad)):
        assert reference is not None
        assert float((gradient.double() - reference).norm()) <= 1e-6 * float(reference.norm()) + 1e-12
