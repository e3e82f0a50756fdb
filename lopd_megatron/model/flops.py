"""Exact floating-point operations of the student, for MFU and planning; a multiply-add counts as two."""

from __future__ import annotations

from collections.abc import Iterable

from lopd_megatron.model.student_spec import StudentSpec


def forward_flops(
    spec: StudentSpec, sequence_lengths: Iterable[int], *, head_tokens: int | None = None
) -> float:
    """One forward pass over documents of the given lengths, over all ranks.

    Linear layers: 2 · (weights that a token meets) per token; a mixture layer counts the experts chosen per
    token. Attention: query t of a document meets t + 1 keys, so QKᵀ and PV cost 2 · heads · d · s · (s + 1)
    per document and layer. Output head: `head_tokens` rows only (all tokens when None). Norms, rotary
    embedding, softmax and the embedding look-up are left out, as is usual.
    """
    config = spec.transformer_config
    lengths = list(sequence_lengths)
    tokens = sum(lengths)
    attended = sum(length * (length + 1) / 2 for length in lengths)
    query_size = config.num_attention_heads * config.kv_channels
    kv_size = config.num_query_groups * config.kv_channels
    projections = config.hidden_size * (2 * query_size + 2 * kv_size)
    linear = config.num_layers * projections + sum(_mlp_weights(spec, moe) for moe in spec.moe_layers)
    head = spec.vocab_size * config.hidden_size
    return (
        2.0 * linear * tokens
        + 2.0 * 2.0 * query_size * attended * config.num_layers
        + 2.0 * head * (tokens if head_tokens is None else head_tokens)
    )


def train_flops(
    spec: StudentSpec, sequence_lengths: Iterable[int], *, head_tokens: int | None = None
) -> float:
    """Forward and backward: three forward passes. Recomputation is not useful work and not counted."""
    return 3.0 * forward_flops(spec, sequence_lengths, head_tokens=head_tokens)


def _mlp_weights(spec: StudentSpec, moe: bool) -> int:
    config = spec.transformer_config
    if not moe:
        return 3 * config.hidden_size * config.ffn_hidden_size
    experts = config.moe_router_topk * 3 * config.hidden_size * config.moe_ffn_hidden_size
    return experts + config.hidden_size * spec.num_experts
