"""FLOPs against torch's own counter on a real model."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from lopd_megatron.model.flops import forward_flops, train_flops
from lopd_megatron.recipes.models import QWEN3_8B
from tests.unit.model.tiny import MOE, QWEN3, spec_of


def test_linear_layers_agree_with_transformers() -> None:
    """transformers computes every position's logits; attention is compared by hand below."""
    import transformers

    torch.manual_seed(0)
    config = transformers.Qwen3Config(
        **{k: v for k, v in QWEN3.items() if k not in ("model_type", "rope_theta")}
    )
    config._attn_implementation = "eager"
    model = transformers.Qwen3ForCausalLM(config)
    length = 32
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, length, dtype=torch.int64))
    full_square = 2 * 2 * 8 * 16 * length * length * 4  # eager computes masked scores too
    ours = forward_flops(spec_of(QWEN3), [length])
    causal = 2 * 8 * 16 * length * (length + 1) * 4
    assert ours - causal == pytest.approx(counter.get_total_flops() - full_square, rel=1e-12)


def test_attention_is_counted_per_document() -> None:
    spec = spec_of(QWEN3)
    one, two = forward_flops(spec, [64]), forward_flops(spec, [32, 32])
    assert one - two == 2 * 8 * 16 * (64 * 65 - 2 * 32 * 33) * 4


def test_only_chosen_experts_and_trained_rows_count() -> None:
    spec = spec_of(MOE)
    more = spec_of(MOE | {"num_experts_per_tok": 4})
    assert forward_flops(more, [10]) - forward_flops(spec, [10]) == 2 * 10 * 4 * 2 * 3 * 64 * 32
    head = 2 * 211 * 64
    assert forward_flops(spec, [10]) - forward_flops(spec, [10], head_tokens=3) == 7 * head
    assert train_flops(spec, [10]) == 3 * forward_flops(spec, [10])


def test_size_of_the_papers_run() -> None:
    """150 steps of 256 sequences of 4,246 tokens on the 8B student: 8.02e18, as derived from the paper."""
    total = 150 * train_flops(spec_of(QWEN3_8B), [4246] * 256)
    assert total == pytest.approx(8.02e18, rel=1e-3)
