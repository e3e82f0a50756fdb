"""Held-out scores of a micro-batch against dense float64, token by token and document by document."""

from __future__ import annotations

import pytest
import torch

from lopd_megatron.config import LossConfig
from lopd_megatron.effopd.held_out import HeldOutLoss, HeldOutScore
from lopd_megatron.effopd.scores import HeldOutSums
from lopd_megatron.parallel.vocab import VocabRange
from lopd_megatron.records import MicroBatch

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


def dense(score: str, student: torch.Tensor, teacher: torch.Tensor, batch: MicroBatch) -> torch.Tensor:
    """Loss of every token [t] from whole distributions, the classes summed out one by one."""
    assert batch.labels is not None
    labels = batch.labels[0]
    if score == "squared_log_ratio":
        rows = torch.arange(TOTAL)
        return 0.5 * (student[rows, labels] - teacher[rows, labels]) ** 2
    losses = []
    for p, q, label in zip(student.exp(), teacher.exp(), labels.tolist(), strict=True):
        named = sorted({label, *q.topk(TOPK).indices.tolist()})
        rest = [v for v in range(VOCAB) if v not in named]
        classes = [[v] for v in named] + [rest]
        losses.append(sum(p[c].sum() * (p[c].sum() / q[c].sum()).log() for c in classes))
    return torch.stack([torch.as_tensor(loss) for loss in losses])


@pytest.mark.parametrize("score", ["topk_kl", "squared_log_ratio"])
@pytest.mark.parametrize("chunk", [2, 64])
def test_equals_dense(score: HeldOutScore, chunk: int) -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOTAL, 1, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    teacher = torch.randn(TOTAL, VOCAB, generator=generator).double().log_softmax(1)
    batch = micro_batch(teacher)
    sums = HeldOutSums(6)
    config = LossConfig(topk=TOPK, head_chunk_tokens=chunk)
    vocab = VocabRange.of(VOCAB, VOCAB, None)
    HeldOutLoss(score, config, sums, vocab=vocab, sequence_parallel=False)(hidden, weight, batch)

    student = (hidden.squeeze(1).double() @ weight.double().T).log_softmax(1)
    losses = dense(score, student, teacher, batch)
    assert batch.loss_mask is not None
    trained = batch.loss_mask[0].bool()
    # The head works in float32; the losses are of order 1.
    assert sums.score().value == pytest.approx(-float(losses[trained].mean()), rel=1e-5)
    assert sums.score().value != pytest.approx(
        -float(losses.mean()), rel=1e-2
    )  # planted: prompt and padding in
    assert sums.score().count == 2
    means = torch.stack([losses[1:4].mean(), losses[5:7].mean()])
    counts = torch.tensor([3.0, 2.0])
    residuals = (means + sums.score().value) * counts
    expected = float(residuals.norm() * 2**0.5 / 5)  # two documents: d/(d − 1) = 2
    assert sums.score().standard_error == pytest.approx(expected, rel=1e-4)


def test_the_teacher_itself_has_the_best_score() -> None:
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOTAL, 1, HIDDEN, generator=generator)
    weight = torch.randn(VOCAB, HIDDEN, generator=generator)
    teacher = (hidden.squeeze(1).double() @ weight.double().T).log_softmax(1)
    for score in ("topk_kl", "squared_log_ratio"):
        sums = HeldOutSums(6)
        loss = HeldOutLoss(
            score,
            LossConfig(topk=TOPK),
            sums,
            vocab=VocabRange.of(VOCAB, VOCAB, None),
            sequence_parallel=False,
        )
        loss(hidden, weight, micro_batch(teacher))
        assert sums.score().value == pytest.approx(0.0, abs=1e-6)
