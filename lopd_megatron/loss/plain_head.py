"""The plain head, reference of the fused one: whole logits and Megatron's `vocab_parallel_cross_entropy`."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from lopd_megatron.loss.fused_head import HeadRows, TokenValues
from lopd_megatron.parallel.vocab import VocabRange


def plain_head(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    rows: HeadRows,
    *,
    vocab: VocabRange,
    sequence_parallel: bool,
) -> tuple[torch.Tensor, TokenValues]:
    """Same contract as `fused_head`, differentiated by autograd; needs Megatron's process groups.

    Logits are float32, from a float32 copy of the weight where it is bfloat16. Keeps one float32 softmax
    [n, V/TP] per named id. The tail's probability is 1 − Σ, so a tail below 1e-6 is
    rounding noise here.
    """
    from megatron.core import tensor_parallel

    if sequence_parallel:
        hidden = tensor_parallel.gather_from_sequence_parallel_region(hidden, group=vocab.group)
    else:
        hidden = tensor_parallel.copy_to_tensor_model_parallel_region(hidden, group=vocab.group)
    logits = F.linear(hidden[rows.rows].float(), weight.float())
    padding = torch.arange(vocab.shard_size, device=logits.device) >= vocab.num_real
    logits = logits.masked_fill(padding, -torch.inf)

    named = torch.stack([_logprobs(logits, ids) for ids in rows.ids.unbind(1)], dim=1).double()
    tail = (1.0 - named.exp().sum(1, keepdim=True)).clamp(min=1e-12).log()
    logprobs = torch.cat([named, tail], dim=1)
    loss, weights = rows.objective(logprobs.detach(), slice(None))
    # A sum with the gradient of the loss and the value of it: the objective itself needs no autograd.
    surrogate = torch.where(weights != 0, weights.detach() * logprobs, 0.0).sum(1)
    per_token = surrogate + (loss - surrogate).detach()
    numerator = (per_token * rows.token_weights).sum().float()
    return numerator, TokenValues(loss, named[:, 0].detach(), _entropy(logits.detach(), vocab))


def _logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """log p of one id per row [n]; −∞ for `classes.ABSENT`."""
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    present = ids >= 0
    # float32 logits are overwritten by the call, so each id gets its own copy.
    loss = vocab_parallel_cross_entropy(logits.clone(), ids.clamp(min=0))
    return (-loss).masked_fill(~present, -torch.inf)


def _entropy(logits: torch.Tensor, vocab: VocabRange) -> torch.Tensor:
    from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

    logprobs = gather_from_tensor_model_parallel_region(logits, group=vocab.group).double().log_softmax(1)
    return -torch.where(logprobs > -torch.inf, logprobs.exp() * logprobs, 0.0).sum(1)
