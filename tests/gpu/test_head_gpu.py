"""The fused head on CUDA: its compiled exponentials and bfloat16 products against the dense reference."""

import pytest
import torch

from lopd_megatron.config import LossConfig
from lopd_megatron.loss import Loss
from lopd_megatron.parallel.vocab import VocabRange
from tests.unit.loss.dense import dense_loss, random_batch

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA"),
]

V, PADDED, H, T = 1003, 1024, 128, 300


@pytest.mark.parametrize("objective", ["lightning_opd", "topk_reverse_kl"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 1e-2)])
def test_gradients_equal_the_dense_reference(
    objective: str, dtype: torch.dtype, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """bfloat16 keeps 8 bits; float32 is computed without TF32."""
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)
    batch = random_batch([120, 100, 80], vocab_size=V, topk=4)
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(T, H, generator=generator).to(dtype)
    w = (0.2 * torch.randn(PADDED, H, generator=generator)).to(dtype)
    config = LossConfig.model_validate({"objective": objective, "topk": 4, "head_chunk_tokens": 64})

    hidden, weight = x.cuda()[:, None].requires_grad_(), w.cuda().requires_grad_()
    moved = {name: value.cuda() if torch.is_tensor(value) else value for name, value in vars(batch).items()}
    loss = Loss(config, vocab=VocabRange.of(V, PADDED, None), sequence_parallel=False)
    output = loss(hidden, weight, type(batch)(**moved))
    output.numerator.backward()
    loss.finite.raise_if_any(output.report)

    dense_x, dense_w = x.double().requires_grad_(), w[:V].double().requires_grad_()
    numerator, _, _ = dense_loss(config, dense_x, dense_w, batch)
    numerator.backward()
    assert output.numerator.item() == pytest.approx(numerator.item(), rel=tolerance)
    for gradient, reference in ((hidden.grad[:, 0], dense_x.grad), (weight.grad[:V], dense_w.grad)):
        assert reference is not None
        assert float((gradient.cpu().double() - reference).norm() / reference.norm()) < tolerance


def test_work_memory_does_not_grow_with_the_tokens() -> None:
    """One chunk of logits, whatever T: the [tokens, vocabulary] matrix never exists."""
    peaks = []
    for tokens in (1024, 4096):
        batch = random_batch([tokens], vocab_size=32_000)
        moved = {
            name: value.cuda() if torch.is_tensor(value) else value for name, value in vars(batch).items()
        }
        hidden = torch.randn(tokens, 1, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        weight = torch.randn(32_000, 64, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        loss = Loss(
            LossConfig(head_chunk_tokens=256),
            vocab=VocabRange.of(32_000, 32_000, None),
            sequence_parallel=False,
        )
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        loss(hidden, weight, type(batch)(**moved)).numerator.backward()
        peaks.append(torch.cuda.max_memory_allocated() - before)
        del hidden, weight, loss, moved
    # Hidden states and per-token values do grow: a few hundred bytes a token against 64 kB of logits.
    assert peaks[1] - peaks[0] < 3072 * 1024
