"""Dense float64 reference of the loss: whole logits, autograd through everything, token by token by formula.

Written apart from the package on purpose: it shares no function with what it judges.
"""

from __future__ import annotations

from dataclasses import replace

import torch

from lopd_megatron.config import LossConfig
from lopd_megatron.records import MicroBatch


def random_batch(
    document_lengths: list[int],
    *,
    vocab_size: int,
    topk: int = 0,
    masked: float = 0.3,
    seed: int = 0,
    labels: torch.Tensor | None = None,
) -> MicroBatch:
    """Documents with a prompt of about `masked` of their tokens, random labels and teacher."""
    generator = torch.Generator().manual_seed(seed)
    t = sum(document_lengths)
    lengths = torch.tensor(document_lengths)
    sequence = torch.repeat_interleave(torch.arange(len(document_lengths)), lengths)
    position = torch.cat([torch.arange(n) for n in document_lengths])
    mask = position >= (masked * lengths[sequence]).floor()
    mask &= position < lengths[sequence] - 1  # the last label of a document belongs to the next one
    if labels is None:
        labels = torch.randint(vocab_size, (t,), generator=generator)
    teacher = torch.randn(t, vocab_size, generator=generator).mul(2).log_softmax(-1)
    teacher_logprobs = teacher.gather(1, labels[:, None]).T
    top = teacher.topk(topk) if topk else None
    return MicroBatch(
        tokens=None,
        labels=labels[None],
        loss_mask=mask.float()[None],
        position_ids=position[None],
        teacher_logprobs=teacher_logprobs,
        rollout_logprobs=teacher_logprobs + 0.3 * torch.randn(1, t, generator=generator),
        teacher_topk_ids=top.indices[None] if top else None,
        teacher_topk_logprobs=top.values[None] if top else None,
        sequence_index=sequence.int()[None],
        response_lengths=torch.zeros(len(lengths)).index_add_(0, sequence, mask.float()).int(),
        cu_seqlens=torch.cat([torch.zeros(1), lengths.cumsum(0)]).int(),
        max_seqlen=max(document_lengths),
        document_indices=tuple(range(100, 100 + len(document_lengths))),
    )


def all_masked(batch: MicroBatch) -> MicroBatch:
    assert batch.loss_mask is not None
    return replace(
        batch,
        loss_mask=torch.zeros_like(batch.loss_mask),
        response_lengths=torch.zeros_like(batch.response_lengths),
    )


def dense_loss(
    config: LossConfig, hidden: torch.Tensor, weight: torch.Tensor, batch: MicroBatch
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Numerator with a graph to `hidden` [t, h] and `weight` [V, h] (float64, no padding), the label
    log-probs [n] and the entropy [n] of the trained tokens."""
    assert batch.labels is not None
    assert batch.loss_mask is not None
    assert batch.sequence_index is not None
    logprobs = (hidden @ weight.T).log_softmax(-1)
    numerator = hidden.sum() * 0 + weight.sum() * 0
    trained = batch.loss_mask[0].nonzero().view(-1).tolist()
    for row in trained:
        scale = 1.0
        if config.normalization == "per_sequence":
            scale = 1.0 / int(batch.response_lengths[batch.sequence_index[0, row]])
        numerator = numerator + scale * _token_loss(config, logprobs[row], batch, row)
    logprobs = logprobs.detach()[trained]
    return (
        numerator,
        logprobs.gather(1, batch.labels[0, trained, None])[:, 0],
        -(logprobs.exp() * logprobs).sum(-1),
    )


def _token_loss(config: LossConfig, logprobs: torch.Tensor, batch: MicroBatch, row: int) -> torch.Tensor:
    assert batch.labels is not None
    assert batch.teacher_logprobs is not None
    label = int(batch.labels[0, row])
    student = logprobs[label]
    if config.objective == "sft":
        return -student
    teacher = batch.teacher_logprobs[0, row].double()
    limit = float("inf") if config.advantage_clip is None else config.advantage_clip
    advantage = (teacher - student.detach()).clamp(-limit, limit)
    if config.objective == "lightning_opd":
        return -advantage * student
    if config.objective == "opd_importance":
        assert batch.rollout_logprobs is not None
        ratio = (student - batch.rollout_logprobs[0, row].double()).exp()
        ratio = ratio * (config.importance_clip / ratio.detach()).clamp(max=1.0)
        clipped = ratio.clamp(1 - config.ppo_clip, 1 + config.ppo_clip)
        return torch.maximum(-ratio * advantage, -clipped * advantage)
    assert batch.teacher_topk_ids is not None
    assert batch.teacher_topk_logprobs is not None
    named = dict(
        zip(
            batch.teacher_topk_ids[0, row, : config.topk].tolist(),
            batch.teacher_topk_logprobs[0, row, : config.topk].double(),
            strict=True,
        )
    )
    named[label] = teacher
    others = torch.ones_like(logprobs, dtype=torch.bool)
    others[list(named)] = False
    # The student's rest by a sum over it, not by 1 − Σ: it may be 1e-20.
    p = torch.cat([logprobs[list(named)], logprobs[others].logsumexp(0)[None]])
    q = torch.stack(list(named.values())).exp()
    q = torch.cat([q, (1 - q.sum()).clamp(min=2.0**-24)[None]]).log()
    if config.objective == "topk_forward_kl":
        return (q.exp() * (q - p)).sum()
    if config.objective == "topk_reverse_kl":
        return (p.exp() * (p - q)).sum()
    m = (config.jsd_beta * q.exp() + (1 - config.jsd_beta) * p.exp()).log()
    return (config.jsd_beta * q.exp() * (q - m) + (1 - config.jsd_beta) * p.exp() * (p - m)).sum()
