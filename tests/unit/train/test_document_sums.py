"""Sums by held-out document: against dense float64 token by token, whatever the packing."""

from __future__ import annotations

import pytest
import torch

from lopd_megatron.config import LossConfig
from lopd_megatron.loss import Loss
from lopd_megatron.parallel.vocab import VocabRange
from lopd_megatron.records import MicroBatch
from lopd_megatron.train.held_out import DocumentSums, HeldOutMetric, Validation

VOCAB, HIDDEN, TOPK = 13, 6, 3
LENGTHS, DOCUMENTS = (5, 4, 3), (4, 1, -1)  # the last one is padding
TOTAL = sum(LENGTHS)


def micro_batch(teacher: torch.Tensor) -> MicroBatch:
    """Labels, and what the teacher's whole distribution [t, V] leaves in the columns."""
    generator = torch.Generator().manual_seed(1)
    labels = torch.randint(0, VOCAB, (1, TOTAL), generator=generator)
    index = torch.repeat_interleave(torch.arange(3), torch.tensor(LENGTHS))[None].int()
    mask = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0.0]])
    values, ids = teacher.topk(TOPK)
    return MicroBatch(
        tokens=None,
        labels=labels,
        loss_mask=mask,
        position_ids=torch.cat([torch.arange(n) for n in LENGTHS])[None],
        teacher_logprobs=teacher.gather(1, labels[0][:, None]).squeeze(1)[None],
        rollout_logprobs=None,
        teacher_topk_ids=ids[None],
        teacher_topk_logprobs=values[None],
        sequence_index=index,
        response_lengths=torch.tensor([3, 2, 0], dtype=torch.int32),
        cu_seqlens=torch.tensor([0, 5, 9, 12], dtype=torch.int32),
        max_seqlen=5,
        document_indices=DOCUMENTS,
    )


def dense(metric: str, student: torch.Tensor, teacher: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Loss of every token [t] from whole distributions, the classes summed out one by one."""
    assert batch.labels is not None
    labels = batch.labels[0]
    if metric == "k2":
        rows = torch.arange(TOTAL)
        return 0.5 * (student[rows, labels] - teacher[rows, labels]) ** 2
    losses = []
    for p, q, label in zip(student.exp(), teacher.exp(), labels.tolist(), strict=True):
        named = sorted({label, *q.topk(TOPK).indices.tolist()})
        rest = [v for v in range(VOCAB) if v not in named]
        classes = [[v] for v in named] + [rest]
        losses.append(sum(p[c].sum() * (p[c].sum() / q[c].sum()).log() for c in classes))
    return torch.stack([torch.as_tensor(loss) for loss in losses])


def summed(
    metric: HeldOutMetric, student: tuple[torch.Tensor, torch.Tensor], batch: MicroBatch, chunk: int
) -> Validation:
    """What one forward pass leaves of the documents, through the loss of a run."""
    objective = "topk_reverse_kl" if metric == "reverse_kl" else "lightning_opd"
    config = LossConfig(objective=objective, topk=TOPK, head_chunk_tokens=chunk)
    loss = Loss(config, vocab=VocabRange.of(VOCAB, VOCAB, None), sequence_parallel=False)
    sums = DocumentSums(metric, 6)
    loss.observe = sums.add
    with torch.no_grad():
        loss(*student, batch)
    values, tokens, _ = sums.pooled([])
    return Validation(0, metric, values, tokens)


@pytest.mark.parametrize("metric", ["reverse_kl", "k2"])
@pytest.mark.parametrize("chunk", [2, 64])
def test_equals_dense(metric: HeldOutMetric, chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOTAL, 1, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    teacher = torch.randn(TOTAL, VOCAB, generator=generator).double().log_softmax(1)
    batch = micro_batch(teacher)
    found = summed(metric, (hidden, weight), batch, chunk)

    student = (hidden.squeeze(1).double() @ weight.double().T).log_softmax(1)
    losses = dense(metric, student, teacher, batch)
    assert batch.loss_mask is not None
    trained = batch.loss_mask[0].bool()
    # The head works in float32; the losses are of order 1.
    assert found.value == pytest.approx(float(losses[trained].mean()), rel=1e-5)
    assert found.value != pytest.approx(float(losses.mean()), rel=1e-2)  # planted: prompt and padding in
    assert len(found.sums) == 2
    means = torch.stack([losses[1:4].mean(), losses[5:7].mean()])
    residuals = (means - found.value) * torch.tensor([3.0, 2.0])
    expected = float(residuals.norm() * 2**0.5 / 5)  # two documents: d/(d − 1) = 2
    assert found.standard_error == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("metric", ["reverse_kl", "k2"])
def test_the_teacher_itself_is_at_zero(metric: HeldOutMetric) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOTAL, 1, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    teacher = (hidden.squeeze(1).double() @ weight.double().T).log_softmax(1)
    found = summed(metric, (hidden, weight), micro_batch(teacher), 64)
    assert found.value == pytest.approx(0.0, abs=1e-6)
