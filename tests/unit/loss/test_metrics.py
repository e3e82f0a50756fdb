"""Pairs pool exactly however a batch is cut; the right column is asked for by name."""

import itertools
import math
from dataclasses import replace

import pytest
import torch

from lopd_megatron.config import LossConfig
from lopd_megatron.errors import UserError
from lopd_megatron.loss import Loss, finalize_metrics
from lopd_megatron.loss.trained_tokens import TrainedTokens
from lopd_megatron.parallel.vocab import VocabRange
from lopd_megatron.records import MicroBatch
from tests.unit.loss.dense import dense_loss, random_batch

V, H = 37, 12
PER_TOKEN = (
    "labels",
    "loss_mask",
    "position_ids",
    "teacher_logprobs",
    "rollout_logprobs",
    "sequence_index",
)


def loss_of(hidden: torch.Tensor, batch: MicroBatch, **settings: object) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(9)
    weight = torch.randn(V, H, generator=generator)
    config = LossConfig.model_validate(settings)
    loss = Loss(config, vocab=VocabRange.of(V, V, None), sequence_parallel=False)
    return loss(hidden[:, None], weight, batch).metric_sums


def documents_apart(batch: MicroBatch) -> list[tuple[slice, MicroBatch]]:
    """Each document as a micro-batch of its own."""
    parts = []
    edges = batch.cu_seqlens.tolist()
    for i, (start, stop) in enumerate(itertools.pairwise(edges)):
        rows = slice(start, stop)
        columns = {name: getattr(batch, name)[:, rows] for name in PER_TOKEN}
        columns["sequence_index"] = torch.zeros_like(columns["sequence_index"])
        own = replace(
            batch,
            **columns,
            response_lengths=batch.response_lengths[i : i + 1],
            document_indices=batch.document_indices[i : i + 1],
        )
        parts.append((rows, own))
    return parts


@pytest.mark.parametrize("normalization", ["token_mean", "per_sequence"])
def test_pairs_of_the_parts_add_up_to_the_whole(normalization: str) -> None:
    batch = random_batch([40, 3, 17, 26], vocab_size=V)
    hidden = torch.randn(86, H, generator=torch.Generator().manual_seed(1))
    whole = loss_of(hidden, batch, normalization=normalization)
    parts = [
        loss_of(hidden[rows], part, normalization=normalization) for rows, part in documents_apart(batch)
    ]
    for name, pair in whole.items():
        torch.testing.assert_close(sum(part[name] for part in parts), pair, msg=name)
    pooled = finalize_metrics({name: sum(part[name] for part in parts) for name in whole})
    assert pooled == pytest.approx(finalize_metrics(whole))
    # Planted: the mean over micro-batches of their means.
    means = [finalize_metrics(part)["log_ratio_mean"] for part in parts]
    assert sum(means) / len(means) != pytest.approx(pooled["log_ratio_mean"], rel=1e-3)


def test_metrics_by_hand() -> None:
    batch = random_batch([40, 21], vocab_size=V)
    assert batch.teacher_logprobs is not None
    assert batch.rollout_logprobs is not None
    assert batch.loss_mask is not None
    hidden = torch.randn(61, H, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(9)).double()
    config = LossConfig(advantage_clip=1.5)
    _, student, entropy = dense_loss(config, hidden.double(), weight, batch)
    trained = batch.loss_mask[0] > 0
    teacher, rollout = batch.teacher_logprobs[0, trained], batch.rollout_logprobs[0, trained]
    ratio = (student - rollout).exp()
    metrics = finalize_metrics(loss_of(hidden, batch, advantage_clip=1.5))
    expected = {
        "num_tokens": len(student),
        "student_logprobs": student.mean(),
        "teacher_logprobs": teacher.mean(),
        "entropy": entropy.mean(),
        "log_ratio_mean": (student - teacher).mean(),
        "teacher_kl": (rollout - teacher).mean(),
        "k2": 0.5 * (student - teacher).square().mean(),
        "clip_fraction": ((student - teacher).abs() > 1.5).double().mean(),
        "importance_ratio_mean": ratio.mean(),
        "importance_ratio_std": ratio.std(unbiased=False),
        "effective_sample_fraction": ratio.sum() ** 2 / (len(ratio) * ratio.square().sum()),
        "loss": -((teacher - student).clamp(-1.5, 1.5) * student).mean(),
    }
    for name, value in expected.items():
        assert metrics[name] == pytest.approx(float(value), rel=1e-5), name


@pytest.mark.parametrize("objective", ["lightning_opd", "topk_forward_kl", "topk_reverse_kl", "topk_jsd"])
def test_reverse_kl_is_that_of_the_classes(objective: str) -> None:
    """Against whole logits; at least 0 on every token, where the mean log-ratio may be anything."""
    batch = random_batch([40, 21], vocab_size=V, topk=4)
    assert batch.loss_mask is not None
    assert batch.labels is not None
    assert batch.teacher_topk_ids is not None
    assert batch.teacher_topk_logprobs is not None
    assert batch.teacher_logprobs is not None
    hidden = torch.randn(61, H, generator=torch.Generator().manual_seed(1))
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(9)).double()
    logits = (hidden.double() @ weight.T).log_softmax(-1)
    total, count = 0.0, 0
    for t in batch.loss_mask[0].nonzero()[:, 0].tolist():
        label, named = int(batch.labels[0, t]), batch.teacher_topk_ids[0, t].tolist()
        teacher = dict(zip(named, batch.teacher_topk_logprobs[0, t].double().exp().tolist(), strict=True))
        teacher[label] = float(batch.teacher_logprobs[0, t].double().exp())
        q = torch.tensor([*teacher.values(), 1 - sum(teacher.values())], dtype=torch.float64)
        p = logits[t].exp()[list(teacher)]
        p = torch.cat([p, 1 - p.sum(0, keepdim=True)])
        kl = float((p * (p / q).log()).sum())
        assert kl >= 0
        total, count = total + kl, count + 1
    settings = {"objective": objective, "topk": 0 if objective == "lightning_opd" else 4}
    metrics = finalize_metrics(loss_of(hidden, batch, **settings))
    assert metrics["reverse_kl"] == pytest.approx(total / count, rel=1e-5)
    assert metrics["log_ratio_mean"] != pytest.approx(metrics["reverse_kl"], rel=0.1)


@pytest.mark.parametrize("topk", [0, 4])
def test_the_kl_estimate_is_unbiased_for_the_whole_kl(topk: int) -> None:
    """Labels drawn 3,000 times from the policy of the rollouts, which is not the student."""
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(1, H, generator=generator)
    weight = torch.randn(V, H, generator=generator) * 0.5
    student = (hidden @ weight.T).double().log_softmax(-1)[0]
    rollout = (student + 0.3 * torch.randn(V, generator=generator)).log_softmax(-1)
    teacher = (student + 0.8 * torch.randn(V, generator=generator)).log_softmax(-1)
    whole = float((student.exp() * (student - teacher)).sum())
    draws = 3000
    labels = torch.multinomial(rollout.exp(), draws, replacement=True, generator=generator)
    batch = random_batch([draws + 1], vocab_size=V, topk=topk, masked=0.0)
    top = teacher.topk(topk or 1)
    own = replace(
        batch,
        labels=torch.cat([labels, labels[:1]])[None],
        teacher_logprobs=teacher[torch.cat([labels, labels[:1]])][None],
        rollout_logprobs=rollout[torch.cat([labels, labels[:1]])][None],
        teacher_topk_ids=top.indices.expand(1, draws + 1, -1) if topk else None,
        teacher_topk_logprobs=top.values.expand(1, draws + 1, -1) if topk else None,
    )
    loss = Loss(LossConfig(), vocab=VocabRange.of(V, V, None), sequence_parallel=False)
    seen: list[torch.Tensor] = []
    loss.observe = lambda signals, documents: seen.append(signals.kl_estimate)  # type: ignore[arg-type]
    sums = loss(hidden.expand(draws + 1, H)[:, None], weight, own).metric_sums["kl_estimate"]
    error = float(seen[0].std() / draws**0.5)
    assert float(sums[0] / sums[1]) == pytest.approx(whole, abs=3 * error)
    # Planted: without the weight it is the mean log-ratio, which is no KL of this student.
    plain = float((student[labels] - teacher[labels]).mean())
    assert abs(plain - whole) > 4 * error
    if topk:
        assert error < 0.8 * float(
            ((student - rollout).exp() * (student - teacher))[labels].std() / draws**0.5
        )


def test_a_measured_class_kl_leaves_loss_and_gradient_of_a_sampled_token_objective() -> None:
    with_topk = random_batch([40, 21], vocab_size=V, topk=4)
    without = replace(with_topk, teacher_topk_ids=None, teacher_topk_logprobs=None)
    hidden = torch.randn(61, 1, H, generator=torch.Generator().manual_seed(1), requires_grad=True)
    weight = torch.randn(V, H, generator=torch.Generator().manual_seed(9), requires_grad=True)
    found = []
    for batch in (with_topk, without):
        loss = Loss(LossConfig(), vocab=VocabRange.of(V, V, None), sequence_parallel=False)
        output = loss(hidden, weight, batch)
        gradients = torch.autograd.grad(output.numerator, (hidden, weight))
        found.append((output.numerator, *gradients))
        assert ("reverse_kl" in output.metric_sums) == (batch is with_topk)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)  # other summation order in fp32


def test_deciles_follow_the_position_in_the_response() -> None:
    """A gap that grows with the position: each decile reports its own, whatever the length of the prompt."""
    batch = random_batch([24, 45], vocab_size=V, masked=0.3)
    assert batch.loss_mask is not None
    assert batch.labels is not None
    hidden, weight = torch.zeros(69, H), torch.zeros(V, H)
    position = torch.cat([torch.arange(int(n)) for n in batch.response_lengths])
    lengths = torch.repeat_interleave(batch.response_lengths, batch.response_lengths.long())
    decile = (10 * position / lengths).floor()
    teacher = torch.zeros_like(batch.loss_mask)
    teacher[batch.loss_mask > 0] = -math.log(V) + decile
    loss = Loss(LossConfig(), vocab=VocabRange.of(V, V, None), sequence_parallel=False)
    sums = loss(hidden[:, None], weight, replace(batch, teacher_logprobs=teacher)).metric_sums
    metrics = finalize_metrics(sums)
    for i in range(10):
        assert metrics[f"teacher_student_gap_decile_{i}"] == pytest.approx(i, abs=1e-6)
        assert sums[f"teacher_student_gap_decile_{i}"][1] == int((decile == i).sum())


def test_a_dataset_without_scores_reports_what_it_can() -> None:
    batch = replace(random_batch([24, 45], vocab_size=V), teacher_logprobs=None, rollout_logprobs=None)
    metrics = finalize_metrics(loss_of(torch.randn(69, H), batch, objective="sft"))
    assert set(metrics) == {"loss", "num_tokens", "student_logprobs", "entropy"}


@pytest.mark.parametrize(
    ("objective", "column"),
    [
        ("lightning_opd", "teacher_logprobs"),
        ("opd_importance", "rollout_logprobs"),
        ("topk_reverse_kl", "teacher_topk_ids"),
    ],
)
def test_a_missing_column_is_named(objective: str, column: str) -> None:
    batch = random_batch([24, 45], vocab_size=V, topk=2)
    setattr(batch, column, None)
    with pytest.raises(UserError, match=f"{objective} needs the column {column}"):
        loss_of(torch.randn(69, H), batch, objective=objective, topk=2)


def test_more_teacher_tokens_than_were_scored_are_refused() -> None:
    batch = random_batch([24, 45], vocab_size=V, topk=2)
    with pytest.raises(UserError, match=r"loss.topk=3 is more than the 2"):
        loss_of(torch.randn(69, H), batch, objective="topk_forward_kl", topk=3)


def test_fewer_teacher_tokens_than_were_scored_use_the_most_likely() -> None:
    batch = random_batch([24, 45], vocab_size=V, topk=5)
    assert batch.teacher_topk_ids is not None
    assert batch.teacher_topk_logprobs is not None
    two = replace(
        batch,
        teacher_topk_ids=batch.teacher_topk_ids[..., :2],
        teacher_topk_logprobs=batch.teacher_topk_logprobs[..., :2],
    )
    hidden = torch.randn(69, H)
    first = loss_of(hidden, batch, objective="topk_reverse_kl", topk=2)
    assert torch.equal(first["loss"], loss_of(hidden, two, objective="topk_reverse_kl", topk=2)["loss"])


def test_a_stage_without_the_columns_of_the_loss_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="position_ids"):
        TrainedTokens.of(replace(random_batch([9], vocab_size=V), position_ids=None))
